"""Reader of Parquet and Arrow files; numbers of a `ClassLabel` become its names."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .formats import DAMAGED, format_of, is_compressed, open_bytes
from .records import ReadOptions, Record, header_problem


BATCH_ROWS = 64
# Beside Arrow's own errors: a damaged file may hold a value that is not a valid date, text or number.
UNREADABLE = (*DAMAGED, ValueError, OverflowError)

ClassNames = Mapping[str, list[str]]  # of the columns that are numbers of classes


def read(path: Path, options: ReadOptions, *, within: range | None = None) -> Iterator[Record]:
    """The rows of a file; with `within`, only of these row groups of a .parquet."""
    kind = "Parquet" if format_of(path) == ".parquet" else "Arrow"
    row = 1
    try:
        source = pa.BufferReader(open_bytes(path).read()) if is_compressed(path) else pa.OSFile(str(path))
        with source:
            schema, first_row, num_rows, batches = (_parquet if kind == "Parquet" else _arrow)(source, options, within)
            row += first_row
            if problem := header_problem(str(path), schema.names, options):
                yield problem
                return
            unread = tuple(name for name in schema.names if options.only is not None and name not in options.only)
            names = class_names(schema)
            for batch in batches:
                yield from batch_records(str(path), batch, first_row=row, class_names=names, unread=unread)
                row += len(batch)
            if num_rows is not None and row - 1 - first_row < num_rows:
                what = f"not a readable {kind} file after row {row - 1:,}, and it says that it has more"
                yield Record(str(path), problem=what)
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        after = f" after row {row - 1:,}" if row > 1 else ""
        yield Record(str(path), problem=f"not a readable {kind} file{after}: {error}")


def _parquet(
    source: pa.NativeFile, options: ReadOptions, within: range | None
) -> tuple[pa.Schema, int, int | None, Iterator[pa.RecordBatch]]:
    """The schema, the number of rows before those of `within`, the number of rows in it, and the rows."""
    file = pq.ParquetFile(source)
    schema = file.schema_arrow
    groups = within or range(file.num_row_groups)
    sizes = [file.metadata.row_group(group).num_rows for group in range(groups.stop)]
    columns = [name for name in schema.names if options.only is None or name in options.only]
    batches = file.iter_batches(batch_size=BATCH_ROWS, row_groups=list(groups), columns=columns)
    return schema, sum(sizes[: groups.start]), sum(sizes[groups.start :]), batches


def _arrow(
    source: pa.NativeFile, options: ReadOptions, within: range | None
) -> tuple[pa.Schema, int, int | None, Iterator[pa.RecordBatch]]:
    """Arrow's file format, or its stream format, in which `datasets` keeps a table."""
    is_file = source.read(6) == b"ARROW1"
    source.seek(0)
    reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
    whole = (reader.get_batch(number) for number in range(reader.num_record_batches)) if is_file else iter(reader)
    columns = [name for name in reader.schema.names if options.only is None or name in options.only]
    batches = (
        batch.select(columns).slice(start, BATCH_ROWS) for batch in whole for start in range(0, len(batch), BATCH_ROWS)
    )
    return reader.schema, 0, None, batches


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """The names of the classes, where `datasets` wrote them into the file's metadata."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = metadata["info"]["features"]
        return {
            name: list(map(str, feature["names"]))
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def batch_records(
    place: str,
    batch: pa.RecordBatch | pa.Table,
    *,
    first_row: int,
    class_names: ClassNames,
    unread: tuple[str, ...] = (),
) -> Iterator[Record]:
    """The rows of a piece of a table; `place` and the row number say where each one is."""
    rows: list[Any]
    batch.validate()  # offsets of a damaged file may point outside its buffers, and Arrow does not check
    try:
        batch.validate(full=True)
        rows = batch.to_pylist()
    except UNREADABLE:  # find which one it is
        rows = [_row_alone(batch.slice(index, 1)) for index in range(len(batch))]
    for number, row in enumerate(rows, start=first_row):
        if isinstance(row, str):
            yield Record(f"{place}, row {number:,}", problem=row)
            continue
        problem = None
        for name, names in class_names.items():
            value = row.get(name)
            if isinstance(value, int) and value >= len(names):
                problem = f"its {name!r} is {value:,}, and there are {len(names):,} classes"
            elif isinstance(value, int):
                row[name] = names[value] if value >= 0 else None  # -1: a test set whose labels are kept secret
        yield Record(f"{place}, row {number:,}", columns=None if problem else row, problem=problem, unread=unread)


def _row_alone(row: pa.RecordBatch | pa.Table) -> dict[str, Any] | str:
    """A row's columns, or what is wrong with them."""
    columns = {}
    for name in row.schema.names:
        column = row.column(name)
        try:
            column.validate(full=True)
            columns[name] = column[0].as_py()
        except UNREADABLE as error:
            is_text = "UTF8" in str(error)
            return f"its {name!r} {'holds bytes that are not UTF-8' if is_text else f'cannot be read: {error}'}"
    return columns
