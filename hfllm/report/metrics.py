"""Metrics of several models side by side, and added to a run's metrics.json."""

import json
from pathlib import Path
from typing import Any

from ..runs.files import write_json


NAMES_KEY = "evaluated"  # in metrics.json: the names that were added, and may be replaced
OTHER_NAME = "evaluate_"  # prefix for a name that training has written


def add_metrics(folder: str | Path, numbers: dict[str, Any]) -> str:
    """Add the numbers to a folder's metrics.json atomically; returns what was done, in words.

    Numbers from training stay: a new number of the same name gets another name.

    Raises:
        ValueError: the metrics.json is not a JSON object.
        FloatingPointError: a number is not finite.
    """
    path = Path(folder) / "metrics.json"
    metrics = read_metrics(folder)
    ours = metrics.get(NAMES_KEY, [])
    renamed = {key: f"{OTHER_NAME}{key}" for key in numbers if key in metrics and key not in ours}
    numbers = {renamed.get(key, key): value for key, value in numbers.items()}
    metrics |= {**numbers, NAMES_KEY: sorted({*ours, *numbers})}
    write_json(path, metrics)
    said = f"{path}: {len(numbers)} numbers written"
    if renamed:
        return f"{path} has {', '.join(renamed)} already, from training: ours are named {OTHER_NAME}... there.\n{said}"
    return said


def read_metrics(folder: str | Path) -> dict[str, Any]:
    """What stands in a folder's metrics.json; empty if there is none.

    Raises:
        ValueError: it is not a JSON object.
    """
    path = Path(folder) / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        metrics.get(NAMES_KEY)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a JSON object, so nothing can be added to it. Repair or delete it.") from error
    return metrics


def metrics_table(results: dict[str, dict[str, Any]]) -> str:
    """A row for each number and a column for each model; values that are not single numbers are left out."""
    cells = [(key, cell) for numbers in results.values() for key, cell in numbers.items()]
    names = list(dict.fromkeys(key for key, cell in cells if not isinstance(cell, dict | list)))
    width = max(20, *(len(name) + 2 for name in results))
    first = max(len(name) for name in names) + 2
    lines = [" " * first + "".join(f"{name:>{width}}" for name in results)]
    for key in names:
        texts = [_in_words(numbers.get(key, "")) for numbers in results.values()]
        lines.append(f"{key:{first}}" + "".join(f"{text:>{width}}" for text in texts))
    return "\n".join(lines)


def _in_words(cell: Any) -> str:
    return f"{cell:.6g}" if isinstance(cell, float) else f"{cell:,}" if isinstance(cell, int) else str(cell)
