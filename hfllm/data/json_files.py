"""Reader of JSON files: a list, one object per line, or one object after another, in any layout."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from .formats import PIECE_CHARACTERS, encoding_of, open_bytes, open_text, read_lines
from .records import ReadOptions, Record, json_type, lacks_required


SPACE = re.compile(r"[ \t\r\n]*")
NEXT_OBJECT = re.compile(r"\n(?=\{)")
LONGEST_TOKEN = 16  # characters at a buffer's end that may be the beginning of a number, a name or an escape
TOO_DEEP = "objects and lists are nested too deeply"


def _as_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r} more than once")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_as_object)


def read_lines_of_json(path: Path, options: ReadOptions, *, within: range | None = None) -> Iterator[Record]:
    """The objects of a .jsonl file, one per line; with `within`, of the lines that begin in that range of bytes."""
    for place, text in _lines(path, within):
        if not text.strip():
            continue
        try:
            value = DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            yield Record(place, problem=f"not valid JSON: {_explain(error)}")
        else:
            yield _record(place, value, options)


def _lines(path: Path, within: range | None) -> Iterator[tuple[str, str]]:
    """Place and text of each line, which ends at a line feed only."""
    if not encoding_of(path).startswith("utf-8"):
        for number, text in enumerate(read_lines(path), start=1):
            yield f"{path}, line {number:,}", text
        return
    with open_bytes(path) as file:
        if begins_inside := within is not None and within.start > 0:
            file.seek(within.start - 1)
            file.readline()  # what is left of the line before; if that ends where the range begins, its last byte
        offset = file.tell() if begins_inside else 0
        for number, line in enumerate(file, start=1):
            if within is not None and offset >= within.stop:
                return
            place = f"{path}, the line at byte {offset:,}" if begins_inside else f"{path}, line {number:,}"
            text = line.decode("utf-8-sig" if offset == 0 else "utf-8", errors="surrogateescape")
            offset += len(line)
            yield place, text


def read(path: Path, options: ReadOptions) -> Iterator[Record]:
    """The objects of a .json file: in a list, in `{"data": [...]}`, or one after another, in any layout."""
    with open_text(path, newline="") as file:
        text = _JsonText(file)
        if text.next_character() == "[":
            yield from _read_list(path, text, options)
        else:
            yield from _read_sequence(path, text, options)


def _read_list(path: Path, text: "_JsonText", options: ReadOptions) -> Iterator[Record]:
    text.skip(1)
    if text.next_character() == "]":
        text.skip(1)
    else:
        while True:
            text.next_character()
            place = f"{path}, line {text.line:,}"
            try:
                value = text.value()
            except (ValueError, RecursionError) as error:
                problem = f"not valid JSON: {_explain(error)}; the rest of the file cannot be read"
                yield Record(place, problem=problem)
                return
            delimiter = text.next_character()
            yield _record(place, value, options)
            if delimiter not in (",", "]"):
                problem = "not valid JSON: a comma or a closing bracket is missing; the rest of the file cannot be read"
                yield Record(f"{path}, line {text.line:,}", problem=problem)
                return
            text.skip(1)
            if delimiter == "]":
                break
    if text.next_character():
        yield Record(f"{path}, line {text.line:,}", problem="not valid JSON: there is something after the list")


def _read_sequence(path: Path, text: "_JsonText", options: ReadOptions) -> Iterator[Record]:
    is_first = True
    while text.next_character():
        place = f"{path}, line {text.line:,}"
        try:
            value = text.value()
        except (ValueError, RecursionError) as error:
            next_step = "is a list of objects, or objects one after another"
            yield Record(place, problem=f"not valid JSON: {_explain(error)} (a .json file {next_step})")
            text.skip_to_next_object()
        else:
            rows = value.get("data") if is_first and isinstance(value, dict) else None
            if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows) and text.is_at_end():
                unread = tuple(name for name in value if name != "data")
                for number, row in enumerate(rows, start=1):
                    record = _record(f"{path}, item {number:,} of 'data'", row, options)
                    yield Record(record.place, columns=record.columns, problem=record.problem, unread=unread)
                return
            yield _record(place, value, options)
        is_first = False


def _record(place: str, value: Any, options: ReadOptions) -> Record:
    if not isinstance(value, dict):
        columns = f" with a column {next(iter(options.required))!r}" if options.required else " with columns"
        return Record(place, problem=f"{json_type(value)}, not an object{columns}")
    if problem := lacks_required(value, options):
        return Record(place, problem=problem, lacks_column=True)
    return Record(place, columns=value)


def _explain(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return TOO_DEEP
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno:,}"
    return str(error)


class _JsonText:
    """The text of a file, decoded value by value; no more of it is in memory than a value needs."""

    def __init__(self, file: TextIO):
        self.file = file
        self.buffer, self.start = "", 0
        self.line = 1  # of the character at `start`

    def next_character(self) -> str:
        """The next character that is not whitespace; "" at the end of the file."""
        while True:
            self._move_to(SPACE.match(self.buffer, self.start).end())  # type: ignore[union-attr]  # it matches ""
            if self.start < len(self.buffer):
                return self.buffer[self.start]
            if not self._read_more():
                return ""

    def is_at_end(self) -> bool:
        return not self.next_character()

    def skip(self, num_characters: int) -> None:
        self._move_to(self.start + num_characters)

    def value(self) -> Any:
        """The value that begins here. It is known to be complete when the buffer holds a character after it."""
        while True:
            try:
                value, end = DECODER.raw_decode(self.buffer, self.start)
            except json.JSONDecodeError as error:
                is_cut = error.pos > len(self.buffer) - LONGEST_TOKEN or error.msg.startswith("Unterminated string")
                line = self.line + self.buffer.count("\n", self.start, error.pos)
                if not is_cut or not self._read_more():
                    raise ValueError(f"{error.msg} in line {line:,}") from error
                continue
            length = end - self.start
            if end < len(self.buffer) or not self._read_more():
                self.skip(length)
                return value

    def skip_to_next_object(self) -> None:
        """Go to the next line that begins with a brace, or to the end."""
        while not (match := NEXT_OBJECT.search(self.buffer, self.start)):
            self._move_to(max(self.start, len(self.buffer) - 1))
            if not self._read_more():
                self._move_to(len(self.buffer))
                return
        self._move_to(match.end())

    def _move_to(self, end: int) -> None:
        self.line += self.buffer.count("\n", self.start, end)
        self.start = end

    def _read_more(self) -> bool:
        more = self.file.read(max(PIECE_CHARACTERS, len(self.buffer) - self.start))
        self.buffer, self.start = self.buffer[self.start :] + more, 0
        return bool(more)
