"""A run's `log.jsonl`, with one line for each logged step, and its `samples.txt`.

    --- step 100                 pretraining: what the model wrote after that step
    Once upon a time
    --- What is 3 + 4?           fine-tuning: a question, and below it the answers
    expected: 7
    after:    7

A line of a text that looks like a heading has one more space before it in the file.
"""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from .files import find_non_finite


logger = logging.getLogger(__name__)

HEADING = re.compile(r"^--- (.*)$", re.MULTILINE)
STEP_HEADING = re.compile(r"^--- step (\d+)$", re.MULTILINE)
# With any number of spaces before it, so that removing one space restores every text.
LIKE_A_HEADING = re.compile(r"(?:^|(?<=\r))(?= *--- )", re.MULTILINE)  # Python reads \r as the end of a line too
ESCAPED = re.compile(r"^ (?= *--- )", re.MULTILINE)
LIKE_A_STEP = re.compile(r" *step \d+")


def append_to_log(path: str | Path, entry: dict[str, Any]) -> None:
    """Add a line to a run's `log.jsonl`, without the numbers that are not finite, which JSON does not have.

    A line that was left incomplete by a kill is ended first, so that this line stays separate.
    """
    entry = {name: value for name, value in entry.items() if not find_non_finite(value)}
    with Path(path).open("a+b") as file:
        is_torn = False
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            is_torn = file.read(1) != b"\n"
        file.write(("\n" if is_torn else "").encode() + json.dumps(entry, allow_nan=False).encode() + b"\n")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a run's `log.jsonl` in the order of their steps, without steps that were trained again.

    A run that was killed resumes from its last checkpoint: entries after that step, from before the kill, are dropped.
    An incomplete line, as a kill leaves it, is left out with a warning.
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
            logger.warning("%s, line %d is incomplete or not a log entry, and left out: %.60r", path, number, line)
            continue
        while entries and (last := next(reversed(entries))) > step:
            del entries[last]
        entries[step] = entries.get(step, {}) | entry
    return list(entries.values())


def format_sample(heading: int | str, text: str) -> str:
    """A part of `samples.txt`: a text that the model wrote, under its step or under the question that it answers."""
    if isinstance(heading, int):
        heading = f"step {heading}"
    else:
        heading = "\\n".join(heading.splitlines())
        heading = f" {heading}" if LIKE_A_STEP.fullmatch(heading) else heading
    return f"--- {heading}\n{LIKE_A_HEADING.sub(' ', text)}\n"


def read_samples(path: str | Path) -> list[tuple[int | str, str]]:
    """The parts of a run's `samples.txt`, each with its step or its question; the inverse of `format_sample`.

    A run that was killed resumes from a checkpoint and writes some samples again; the last ones are kept.
    """
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    if not STEP_HEADING.match(text):
        pieces = HEADING.split(text)
        return [(_unescape_question(heading), _unescape(body)) for heading, body in zip(pieces[1::2], pieces[2::2])]
    pieces = STEP_HEADING.split(text)
    samples: dict[int, str] = {}
    for step, body in zip(map(int, pieces[1::2]), pieces[2::2]):
        samples = {earlier: kept for earlier, kept in samples.items() if earlier < step}
        samples[step] = _unescape(body)
    return list(samples.items())


def _unescape(body: str) -> str:
    return ESCAPED.sub("", body).strip("\n")


def _unescape_question(heading: str) -> str:
    is_escaped = heading.startswith(" ") and LIKE_A_STEP.fullmatch(heading)
    return heading[1:] if is_escaped else heading
