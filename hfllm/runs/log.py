"""A run's `log.jsonl`: one object a line for each logged step."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from .files import find_non_finite


logger = logging.getLogger(__name__)


def append_to_log(path: str | Path, entry: dict[str, Any]) -> None:
    """Add a line to a run's `log.jsonl`, without the numbers that are not finite, which JSON does not have.

    A line that a kill has torn is ended first, so that it takes no other with it.
    """
    entry = {name: value for name, value in entry.items() if not find_non_finite(value)}
    with Path(path).open("a+b") as file:
        is_torn = False
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            is_torn = file.read(1) != b"\n"
        file.write(("\n" if is_torn else "").encode() + json.dumps(entry, allow_nan=False).encode() + b"\n")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a run's `log.jsonl` in the order of their steps, as the model that came out of it saw them.

    A run that was killed resumes from its last checkpoint and goes back in its log: what it logged after that step no
    longer counts. A torn line, as a kill leaves it, is left out with a warning.
    """
    entries: dict[int, dict[str, Any]] = {}
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s, line %d is torn or no entry of a log, and left out: %.60r", path, number, line)
            continue
        while entries and (last := next(reversed(entries))) > step:
            del entries[last]
        entries[step] = entries.get(step, {}) | entry
    return list(entries.values())
