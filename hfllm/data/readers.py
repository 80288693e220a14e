"""Files and columns -> records: each document's text and its place, or what is wrong with it."""

import codecs
import csv
import difflib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
PIECE_CHARACTERS = 1 << 20  # how much of a text file is in memory at a time
JSON_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Record:
    """One document, its text in pieces of any size; or, if `problem` is set, a record that has none to give."""

    place: str  # "books.jsonl, line 3"
    text: Iterable[str] = ()
    problem: str | None = None
    lacks_column: bool = False


def read_records(path: Path, text_column: str, *, within: range | None = None) -> Iterator[Record]:
    """The records of one file, in order. A byte-order mark at the file's start is not part of the text.

    With `within`, only a piece of the file: of a .jsonl the lines that begin in that range of bytes, of a .parquet
    those row groups. Pieces that cover a file have each of its records exactly once.
    """
    suffix = path.suffix.lower()
    assert within is None or suffix in (".jsonl", ".parquet")
    if suffix == ".parquet":
        return _read_parquet(path, text_column, within)
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        remedy = f"convert it with: iconv -f UTF-16 -t UTF-8 {path.name}"
        return iter([Record(str(path), problem=f"the file is UTF-16, not UTF-8; {remedy}")])
    if suffix == ".txt":
        return _read_text(path)
    if suffix == ".csv":
        return _read_csv(path, text_column)
    if suffix == ".json" and start.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
        return _read_json_list(path, text_column)
    return _read_json_lines(path, text_column, within)


def column_records(place: str, column: pa.ChunkedArray | pa.Array, name: str, *, first_row: int) -> Iterator[Record]:
    """The records of an Arrow column; `place` and the row number say where each one stands."""
    for row, scalar in enumerate(column, start=first_row):
        try:
            value = scalar.as_py()
        except UnicodeDecodeError as error:
            problem = f"its {name!r} holds bytes that are not UTF-8 (at byte {error.start:,} of the value)"
            yield Record(f"{place}, row {row:,}", problem=problem)
        else:
            yield _record(f"{place}, row {row:,}", {name: value}, name)


def lacking(column: str, columns: Iterable[str]) -> str:
    """What to say of a table or an object that lacks a column: the nearest name, and all there are."""
    columns = list(columns)
    nearest = difflib.get_close_matches(column, columns, n=1)
    hint = f"; did you mean text_column={nearest[0]!r}?" if nearest else ""
    return f"there is no column {column!r} but {columns}{hint}"


def repeated(header: Iterable[str]) -> str:
    """What to say of a table whose header has a name twice, so that a row's cells have two meanings; "" if none is."""
    counts = Counter(name for name in header if name)  # columns without a name mean nothing
    names = [repr(name) for name, count in counts.items() if count > 1]
    return f"the header has {', '.join(names)} more than once; give each column a name of its own" if names else ""


def _record(place: str, value: Any, text_column: str) -> Record:
    """The record that a parsed JSON value or a table's row stands for."""
    if not isinstance(value, dict):
        return Record(place, problem=f"a JSON {_json_type(value)}, not an object with a column {text_column!r}")
    if text_column not in value:
        return Record(place, problem=lacking(text_column, value), lacks_column=True)
    text = value[text_column]
    if not isinstance(text, str):
        return Record(place, problem=f"its {text_column!r} is {_json_type(text)}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # Readers below decode with "surrogateescape", so bytes that are not UTF-8 arrive here as surrogates too.
        where = f"at character {error.start:,}"
        problem = f"its {text_column!r} holds bytes that are not UTF-8, or half a surrogate pair ({where})"
        return Record(place, problem=problem)
    return Record(place, text=(text,))


def _json_type(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number" if isinstance(value, int | float) else type(value).__name__)


def _read_text(path: Path) -> Iterator[Record]:
    """The file as one document. It is checked first, so that no half of a bad one is ever passed on."""
    problem = _utf8_problem(path)
    yield Record(str(path), problem=problem) if problem else Record(str(path), text=_text_pieces(path))


def _text_pieces(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:  # newline="": line ends stay as they are
        while piece := file.read(PIECE_CHARACTERS):
            yield piece


def _utf8_problem(path: Path) -> str | None:
    """Where the file's first byte that is not UTF-8 stands, or None."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset, line, ended = 0, 1, False
    with path.open("rb") as file:
        while not ended:
            chunk = file.read(PIECE_CHARACTERS)
            ended = not chunk
            undecoded = len(decoder.getstate()[0])  # the first bytes of a character that the last chunk cut
            try:
                decoder.decode(chunk, final=ended)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                return f"line {line:,} holds bytes that are not UTF-8 (at byte {offset - undecoded + error.start:,})"
            offset += len(chunk)
            line += chunk.count(b"\n")
    return None


def _read_json_lines(path: Path, text_column: str, within: range | None) -> Iterator[Record]:
    rule = "" if path.suffix.lower() == ".jsonl" else " (a .json file is a list of objects, or has one object a line)"
    with path.open("rb") as file:  # bytes, because text files also end lines at a lone carriage return
        if begins_inside := within is not None and within.start > 0:
            file.seek(within.start - 1)
            file.readline()  # what is left of the line before; if that ends where the range begins, its last byte
        offset = file.tell()
        for number, line in enumerate(file, start=1):
            if within is not None and offset >= within.stop:
                return
            place = f"{path}, the line at byte {offset:,}" if begins_inside else f"{path}, line {number:,}"
            text = line.decode("utf-8-sig" if offset == 0 else "utf-8", errors="surrogateescape")
            offset += len(line)
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except (ValueError, RecursionError) as error:
                yield Record(place, problem=f"not valid JSON: {error}{rule}")
            else:
                yield _record(place, value, text_column)


def _read_json_list(path: Path, text_column: str) -> Iterator[Record]:
    items = _json_items(path)
    line = 1
    while True:
        try:
            line, value = next(items)
        except StopIteration:
            return
        except (ValueError, RecursionError) as error:
            problem = f"not valid JSON after the item of line {line:,}: {error}; the rest of the file cannot be read"
            yield Record(str(path), problem=problem)
            return
        yield _record(f"{path}, line {line:,}", value, text_column)


def _json_items(path: Path) -> Iterator[tuple[int, Any]]:
    """The items of a JSON list and the line in which each begins, reading no more of the file than an item needs."""
    decode = json.JSONDecoder().raw_decode
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        buffer = file.read(PIECE_CHARACTERS)
        start, counted, line = buffer.index("[") + 1, 0, 1
        while True:
            start = JSON_SPACE.match(buffer, start).end()  # type: ignore[union-attr]  # it matches the empty string too
            if buffer.startswith("]", start):
                return
            problem: Exception = ValueError("a comma or a closing bracket is missing")
            try:
                value, end = decode(buffer, start)
                end = JSON_SPACE.match(buffer, end).end()  # type: ignore[union-attr]
                delimiter = buffer[end : end + 1]
            except ValueError as error:
                problem, delimiter = error, ""
            # An item is known to be whole when the comma or bracket after it is in sight; else there is more to read.
            if not delimiter:
                more = file.read(max(PIECE_CHARACTERS, len(buffer) - start))
                if not more:
                    raise problem
                line += buffer.count("\n", counted, start)
                buffer, start, counted = buffer[start:] + more, 0, 0
                continue
            line += buffer.count("\n", counted, start)
            counted = start
            yield line, value
            if delimiter not in ",]":
                raise problem
            start = end + (delimiter == ",")


def _read_csv(path: Path, text_column: str) -> Iterator[Record]:
    limit = csv.field_size_limit(2**31 - 1)  # its default of 131,072 characters is shorter than many documents
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            rows = csv.reader(file, strict=True)
            header: list[str] = []
            while True:
                place = f"{path}, line {rows.line_num + 1:,}"
                try:
                    row = next(rows)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield Record(place, problem=f"not valid CSV: {error}")
                    if not header:
                        return
                    continue
                if not row:
                    continue
                if not header:
                    header = row
                    if problem := repeated(header):
                        yield Record(place, problem=problem)
                        return
                    if text_column not in header:
                        yield Record(place, problem=lacking(text_column, header), lacks_column=True)
                        return
                elif len(row) != len(header):
                    yield Record(place, problem=f"{len(row)} fields where the header has {len(header)}")
                else:
                    yield _record(place, dict(zip(header, row)), text_column)
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path, text_column: str, within: range | None) -> Iterator[Record]:
    try:
        with pq.ParquetFile(path) as file:
            if text_column not in file.schema_arrow.names:
                problem = lacking(text_column, file.schema_arrow.names)
                yield Record(str(path), problem=problem, lacks_column=True)
                return
            groups = within or range(file.num_row_groups)
            row = 1 + sum(file.metadata.row_group(group).num_rows for group in range(groups.start))
            for batch in file.iter_batches(batch_size=64, row_groups=list(groups), columns=[text_column]):
                yield from column_records(str(path), batch.column(0), text_column, first_row=row)
                row += len(batch)
    except (pa.ArrowException, OSError) as error:
        yield Record(str(path), problem=f"not a readable Parquet file: {error}")
