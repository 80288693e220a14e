"""The reader of all files: each record with its place, or with its problem."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from . import arrow_files, json_files, tables
from .formats import (
    ARROW,
    DAMAGED,
    JSON,
    JSON_LINES,
    PIECE_CHARACTERS,
    TABLES,
    decoding_problem,
    encoding_of,
    format_of,
    open_text,
    read_lines,
    refusal,
)
from .records import ReadOptions, Record, as_document


def read_file(path: Path, options: ReadOptions, *, within: range | None = None) -> Iterator[Record]:
    """The records of one file, in order: a text is a document, a row or a JSON object has columns.

    With `within`, only a piece of the file: of a .jsonl the lines that begin in that range of bytes, of a .parquet
    those row groups (see `can_be_cut`). Pieces that cover a file have each of its records exactly once.
    """
    suffix = format_of(path)
    assert within is None or can_be_cut(path)
    read: Callable[..., Iterator[Record]]
    if suffix in ARROW:
        read = partial(arrow_files.read, within=within)
    elif suffix in TABLES:
        read = tables.read
    elif suffix in JSON_LINES:
        read = partial(json_files.read_lines_of_json, within=within)
    elif suffix in JSON:
        read = json_files.read
    else:
        read = read_text
    place = str(path)
    try:
        if suffix not in ARROW and (problem := refusal(path)):
            yield Record(place, problem=problem)
            return
        for record in read(path, options):
            place = record.place
            yield record
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, or the file is gone
        after = "" if place == str(path) else f" after {place}"
        yield Record(str(path), problem=f"the file cannot be read{after}: {str(error) or type(error).__name__}")


def can_be_cut(path: Path) -> bool:
    """Whether `read_file` can read a piece of the file."""
    suffix = path.suffix.lower()
    return suffix == ".parquet" or (suffix in JSON_LINES and encoding_of(path).startswith("utf-8"))


def read_documents(
    path: Path, text_column: str, options: ReadOptions | None = None, *, within: range | None = None
) -> Iterator[Record]:
    """The documents of one file; in a table or in JSON they are in `text_column`."""
    options = replace(options or ReadOptions(), required={text_column: "text_column"}, only={text_column})
    for record in read_file(path, options, within=within):
        yield as_document(record, text_column, source=str(path))


def read_text(path: Path, options: ReadOptions) -> Iterator[Record]:
    """The file as one document, or as those that a separator cuts it into.

    It is checked first, so that no half of a bad one is ever passed on.
    """
    if problem := decoding_problem(path):
        yield Record(str(path), problem=problem)
    elif options.document_separator is None:
        yield Record(str(path), text=_text_pieces(path))
    else:
        yield from _separated_documents(path, options.document_separator)


def _text_pieces(path: Path) -> Iterator[str]:
    with open_text(path, newline="") as file:  # newline="": line ends stay as they are
        while piece := file.read(PIECE_CHARACTERS):
            yield piece


def _separated_documents(path: Path, separator: str) -> Iterator[Record]:
    lines: list[str] = []
    first, is_cut = 1, False
    for number, line in enumerate(read_lines(path), start=1):
        if line.rstrip("\r\n") != separator:
            lines.append(line)
            continue
        yield Record(f"{path}, line {first:,}", text=lines)
        lines, first, is_cut = [], number + 1, True
    remark = None if is_cut else f"no line is {separator!r}, so the whole file is one document"
    if lines or not is_cut:
        yield Record(f"{path}, line {first:,}", text=lines, remark=remark)


def whole_text(path: Path, *, what: str) -> str:
    """A small text file as a string, without its byte-order mark; `what` it is, for the error: "chat_template"."""
    if problem := refusal(path) or decoding_problem(path):
        raise ValueError(f"{what}={str(path)!r}: {problem}.")
    return "".join(_text_pieces(path))
