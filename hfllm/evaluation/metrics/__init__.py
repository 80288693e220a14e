"""Metrics for the `evaluate` library. Each folder is opened by `evaluate.load`, offline too, and is a Space."""

from pathlib import Path
from typing import Any


FOLDER = Path(__file__).parent
METRICS = sorted(path.parent.name for path in FOLDER.glob("*/README.md"))


def load_metric(name: str, **options: Any) -> Any:
    """The `evaluate.Metric` of that name; `options` are those of `evaluate.load`, such as `num_process`."""
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(METRICS)}.")
    import evaluate  # takes seconds, so only here

    return evaluate.load(str(FOLDER / name), **options)
