"""Reader of .csv and .tsv tables: strict about the number of cells, and about lines inside quotation marks.

Rows end at a line feed, with or without a carriage return before it. So form feeds and the line separators of Unicode
are text in every cell.
"""

import csv
from collections.abc import Iterator
from pathlib import Path

from .formats import format_of, read_lines
from .records import ReadOptions, Record, header_problem


DELIMITERS = (",", ";", "\t", "|")
LONGEST_CELL = 2**31 - 1  # characters; csv's default of 131,072 is less than many documents have

Row = tuple[int, list[str], list[str] | csv.Error]  # number of its first line, its lines, its cells


def read(path: Path, options: ReadOptions) -> Iterator[Record]:
    """The rows of a table as records; the first row names the columns."""
    csv.field_size_limit(LONGEST_CELL)
    delimiter, ambiguous = (options.delimiter, None) if options.delimiter else _recognise_delimiter(path)
    if ambiguous:
        yield Record(str(path), problem=ambiguous)
        return
    header: list[str] = []
    for first, lines, cells in _rows(path, delimiter):
        place = f"{path}, line {first:,}"
        if not header:
            if not cells:
                continue
            if isinstance(cells, csv.Error):
                yield Record(place, problem=_explain(cells, first, lines))
                return
            header = cells
            if problem := header_problem(place, header, options):
                yield problem
                return
        elif isinstance(cells, csv.Error):
            yield from _recover(path, first, lines, cells, header, delimiter)
        elif cells:
            remark = _swallowed(first, lines, header, delimiter) if len(lines) > 1 else None
            yield _record(place, cells, header, remark)


def _record(place: str, cells: list[str], header: list[str], remark: str | None = None) -> Record:
    if len(cells) != len(header):
        return Record(place, problem=f"{len(cells)} cells where the header has {len(header)}")
    return Record(place, columns=dict(zip(header, cells)), remark=remark)


def _rows(path: Path, delimiter: str) -> Iterator[Row]:
    lines: list[str] = []  # of the row that is being read

    def take() -> Iterator[str]:
        for line in read_lines(path):
            lines.append(line)
            yield line

    rows = csv.reader(take(), delimiter=delimiter, strict=True)
    first = 1
    while True:
        cells: list[str] | csv.Error
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            cells = error
        yield first, lines, cells
        first += len(lines)
        lines.clear()


def _recognise_delimiter(path: Path) -> tuple[str, str | None]:
    """The format's own delimiter if the header has it, else the one other that it has; or a problem."""
    own = "," if format_of(path) == ".csv" else "\t"
    header = next((line for line in read_lines(path) if line.strip()), "")
    found = [delimiter for delimiter in DELIMITERS if len(_alone(header, delimiter, strict=True)) > 1]
    if own in found or not found:
        return own, None
    if len(found) == 1:
        return found[0], None
    which = " or ".join(map(repr, found))
    return own, f"its header may be separated by {which}: {header.strip()[:80]!r}; name one with delimiter"


def _alone(line: str, delimiter: str, *, strict: bool = False) -> list[str]:
    """The cells of a single line; quotation marks are plain characters unless `strict`."""
    try:
        if strict:
            return next(csv.reader([line], delimiter=delimiter, strict=True), [])
        return next(csv.reader([line], delimiter=delimiter, quoting=csv.QUOTE_NONE), [])
    except csv.Error:
        return []


def _recover(
    path: Path, first: int, lines: list[str], error: csv.Error, header: list[str], delimiter: str
) -> Iterator[Record]:
    """The records of lines that are not valid together.

    If each line after the first is a row by itself, only the first is bad: its quotation mark is a plain character.
    Otherwise it may be a long text that is incomplete, and none of its lines is used.
    """
    further = [(number, _alone(line, delimiter, strict=True), line) for number, line in enumerate(lines[1:], first + 1)]
    are_rows = all(len(cells) == len(header) or not line.strip() for _, cells, line in further)
    num_lost = 1 if are_rows else len(lines)
    yield Record(f"{path}, line {first:,}", problem=_explain(error, first, lines), num_lost=num_lost)
    if are_rows:
        for number, cells, _ in further:
            if cells:
                yield _record(f"{path}, line {number:,}", cells, header)


def _explain(error: csv.Error, first: int, lines: list[str]) -> str:
    what = str(error)
    if "new-line character" in what:
        what = "a carriage return without a line feed, outside quotation marks"
    elif "end of data" in what:
        what = "a quotation mark opens a cell and never closes it"
    last = first + len(lines) - 1
    return f"not valid CSV: {what}" + (f" (lines {first:,} to {last:,})" if len(lines) > 1 else "")


def _swallowed(first: int, lines: list[str], header: list[str], delimiter: str) -> str | None:
    """A remark on a row whose quoted cell holds lines that look like rows of the table."""
    has_shape = [len(_alone(line, delimiter)) == len(header) for line in lines]
    inner = has_shape[1:-1]
    if len(header) == 1 or not (all(has_shape) or (sum(inner) >= 2 and 2 * sum(inner) >= len(inner))):
        return None
    return (
        f"the lines {first:,} to {first + len(lines) - 1:,} are one row, and look like {sum(has_shape):,} rows: a "
        "quoted cell holds their line ends. Where a quotation mark is a plain character, double it and quote its cell"
    )
