"""`evaluate` modules of our own: a folder each, which `evaluate.load` opens offline and which is a Space."""

import sys
from pathlib import Path
from typing import Any


FOLDER = Path(__file__).parent
METRICS = sorted(path.parent.name for path in FOLDER.glob("*/README.md"))


def load_metric(name: str, **options: Any) -> Any:
    """The `evaluate.Metric` of that name; `options` are those of `evaluate.load`, such as `num_process`.

    A script's own folder comes first in sys.path, and recipes/ has an evaluate.py: the library is imported without it.
    """
    if name not in METRICS:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(METRICS)}.")
    path = list(sys.path)
    try:
        sys.path[:] = [entry for entry in path if not (Path(entry or ".") / "evaluate.py").exists()]
        import evaluate  # takes seconds, so only here
    finally:
        sys.path[:] = path
    return evaluate.load(str(FOLDER / name), **options)
