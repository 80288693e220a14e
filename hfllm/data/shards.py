"""Shards of a dataset: pieces of its text that can be read independently, each from its beginning.

Nothing is copied, and only names and sizes are read in advance, so the text may be larger than the disk (on the Hub) or
too large to read as a whole.
"""

import hashlib
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from .arrow_files import batch_records
from .cache import cached_dataset
from .corpus import FEW_DOCUMENTS, LONG_BYTES, Corpus, document_options, write_documents
from .readers import can_be_cut, read_documents
from .records import ReadOptions, Record, as_document, header_problem, lacking
from .sampler import rows_at
from .sources import (
    files_below,
    hub_class_names,
    hub_errors_explained,
    local_paths,
    python_file,
    revision_of,
    stdlib_files,
)


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # part of a stream's identity: increase it when the same files would give other shards
HELD_OUT_VERSION = 2  # part of the cache's address: increase it when the same files would have others held out
NUM_PIECES = 256  # into which a text is cut, if its files can be cut, ...
LEAST_PIECE_BYTES, MOST_PIECE_BYTES = 1 << 16, 32 << 20  # ... unless the pieces would be smaller or larger than this
FEW_SHARDS = 16  # a dataset on the Hub with fewer shards is cut further, if its format allows it
SAMPLE_BYTES = 1 << 16
HELD_OUT_SHARDS = 64
HELD_OUT_BYTES = 8 << 20


@dataclass(frozen=True)
class Shard:
    """A piece of the text. `records()` reads it from its beginning; `num_bytes` is its relative size."""

    name: str
    num_bytes: int
    records: Callable[[], Iterator[Record]]


@dataclass(frozen=True)
class Shards:
    """The shards of a dataset, in a fixed order.

    `contents` names the files with their size and a checksum: the host's own, or one of samples, because reading a
    whole corpus only to identify it takes too long. `num_bytes` is the size of the files, or None if it is not known.
    """

    name: str
    shards: list[Shard]
    contents: list[tuple[str, str]]
    num_bytes: int | None
    text_column: str
    reading: dict[str, str] = field(default_factory=dict)  # further options that decide which documents the files give


def find_shards(
    dataset: str,
    *,
    dataset_config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    delimiter: str | None = None,
    document_separator: str | None = None,
    exclude: Iterable[str | os.PathLike] = (),
) -> Shards:
    """The shards of a dataset, by the same rules as `load_corpus`.

    A local .jsonl file is cut between lines and a .parquet file between row groups, so that a large file gives many
    shards of about the same size; any other file, also a compressed one, is one shard. For a dataset on the Hub, the
    shards are those of `datasets`, usually files. Empty files are left out.
    """
    options = document_options(text_column, delimiter=delimiter, document_separator=document_separator)
    paths = local_paths(dataset, dataset_config=dataset_config, split=split)
    if paths is None:
        return _hub_shards(dataset, dataset_config, split=split, text_column=text_column)
    if paths:
        files, _ = files_below(paths, exclude=exclude)
        root = Path(os.path.commonpath(path.absolute() if path.is_dir() else path.absolute().parent for path in paths))
    else:
        root, files = stdlib_files()
    sizes = {path: size for path in files if (size := path.stat().st_size)}
    num_bytes = sum(sizes.values())
    piece_bytes = min(MOST_PIECE_BYTES, max(LEAST_PIECE_BYTES, num_bytes // NUM_PIECES))
    shards: list[Shard] = []
    contents: list[tuple[str, str]] = []
    for path, size in sizes.items():
        # Relative to the named folder, so that a corpus that moved to another disk is still the same.
        name = path.absolute().relative_to(root).as_posix()
        contents.append((name, f"{size:,} bytes, sha256 of samples {_sampled_sha256(path, size)[:16]}"))
        if paths:
            shards += _file_shards(path, name, size, piece_bytes, text_column, options)
        else:
            shards.append(Shard(name, size, partial(_python_records, root, path)))
    if not shards:
        raise ValueError(f"{dataset!r} has no text: {len(files):,} files, all of them empty.")
    named = {"delimiter": delimiter, "document_separator": document_separator}
    reading = {name: value for name, value in named.items() if value is not None}
    return Shards(dataset, shards, contents, num_bytes, text_column, reading)


def _python_records(root: Path, path: Path) -> Iterator[Record]:
    yield python_file(root, path)


def _sampled_sha256(path: Path, size: int) -> str:
    """A sha256 over the beginning, the middle and the end of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in sorted({0, max(0, size // 2 - SAMPLE_BYTES // 2), max(0, size - SAMPLE_BYTES)}):
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _file_shards(
    path: Path, name: str, size: int, piece_bytes: int, text_column: str, options: ReadOptions
) -> Iterator[Shard]:
    pieces: list[tuple[range, int]] = []
    is_parquet = path.suffix.lower() == ".parquet"
    if can_be_cut(path):
        pieces = _row_groups(path, piece_bytes) if is_parquet else _pieces_of_lines(size, piece_bytes)
    if len(pieces) < 2:
        yield Shard(name, size, partial(read_documents, path, text_column, options))
        return
    unit = "row groups" if is_parquet else "bytes"
    for within, num_bytes in pieces:
        piece_name = f"{name}, {unit} {within.start:,} to {within.stop - 1:,}"
        yield Shard(piece_name, num_bytes, partial(read_documents, path, text_column, options, within=within))


def _pieces_of_lines(size: int, piece_bytes: int) -> list[tuple[range, int]]:
    num_pieces = max(1, round(size / piece_bytes))
    ends = [size * number // num_pieces for number in range(num_pieces + 1)]
    return [(range(start, end), end - start) for start, end in itertools.pairwise(ends)]


def _row_groups(path: Path, piece_bytes: int) -> list[tuple[range, int]]:
    """Ranges of neighbouring row groups, each with at least `piece_bytes` in all their columns."""
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError):
        return []  # the reader of the file will report the problem
    pieces: list[tuple[range, int]] = []
    start = num_bytes = 0
    for group in range(metadata.num_row_groups):
        num_bytes += metadata.row_group(group).total_byte_size
        if num_bytes >= piece_bytes or group == metadata.num_row_groups - 1:
            pieces.append((range(start, group + 1), num_bytes))
            start, num_bytes = group + 1, 0
    return pieces


def _hub_shards(dataset: str, dataset_config: str | None, *, split: str, text_column: str) -> Shards:
    try:
        with hub_errors_explained(dataset, dataset_config, split):
            builder = datasets.load_dataset_builder(dataset, dataset_config)
            table = builder.as_streaming_dataset(split)
            if table.num_shards < FEW_SHARDS:
                table = table.reshard()
    except NotImplementedError as error:  # archives, mostly
        raise ValueError(f"{dataset!r} cannot be streamed: {error} Read it without streaming.") from error
    options = document_options(text_column, delimiter=None, document_separator=None)
    if table.column_names is not None and (problem := header_problem(dataset, table.column_names, options)):
        raise ValueError(f"{dataset!r}: {problem.problem}.")
    logger.warning("Streaming the dataset %r from the Hub, revision %s.", dataset, revision_of(builder))
    files = [_file_of_host(file) for file in (builder.config.data_files or {}).get(split, [])]
    contents = [(name, f"{num_bytes:,} bytes, {digest}") for name, num_bytes, digest in files]
    sizes = [num_bytes for _, num_bytes, _ in files]
    names = [name for name, _, _ in files]
    if len(files) != table.num_shards:  # cut further, or nobody knows which file is which
        names = [f"{dataset}, shard {number:,} of {table.num_shards:,}" for number in range(table.num_shards)]
        sizes = [sum(sizes) // table.num_shards] * table.num_shards
    shards = [
        Shard(name, max(1, size), partial(_hub_records, table, number, name, text_column))
        for number, (name, size) in enumerate(zip(names, sizes))
    ]
    # If `datasets` names no files, its hash of the dataset identifies them.
    contents = contents or [(f"{dataset}, {dataset_config}, {split}", str(builder.hash))]
    return Shards(dataset, shards, contents, sum(num_bytes for _, num_bytes, _ in files) or None, text_column)


def _file_of_host(path: str) -> tuple[str, int, str]:
    """Name, size and checksum of a file, as its host gives them: a commit that leaves it alone changes neither."""
    file_system, inner_path = url_to_fs(path)
    info: dict[str, Any] = file_system.info(inner_path)
    digest = next((f"{key} {info[key]}" for key in ("blob_id", "ETag", "etag", "mtime") if info.get(key)), "")
    return re.sub(r"@[0-9a-f]{40}(?=/)", "", path), info.get("size") or 0, digest


def _hub_records(table: datasets.IterableDataset, number: int, name: str, text_column: str) -> Iterator[Record]:
    shard = table.shard(table.num_shards, number)
    if shard.column_names is not None:
        shard = shard.select_columns([text_column])
    names = {name: each for name, each in hub_class_names(shard.features).items() if name == text_column}
    row = 1
    try:
        for batch in shard.with_format("arrow").iter(batch_size=64):
            if text_column not in batch.column_names:
                problem = lacking(text_column, batch.column_names)
                yield Record(f"{name}, row {row:,}", problem=problem, lacks_column=True)
                return
            for record in batch_records(name, batch, first_row=row, class_names=names):
                yield as_document(record, text_column, source=name)
            row += len(batch)
    except (datasets.exceptions.DatasetsError, pa.ArrowException, ValueError) as error:
        problem = f"cannot be read after row {row - 1:,}: {error}; the rest of the shard is lost"
        yield Record(name, problem=problem)


def hold_out(
    shards: Shards,
    *,
    fraction: float | None = None,
    on_bad_record: str = "error",
    cache_dir: str | os.PathLike | None = None,
) -> Corpus:
    """Documents to validate on, kept on disk: HELD_OUT_BYTES of them, or `fraction` of the files' bytes if it is less.

    They are taken from the beginnings of HELD_OUT_SHARDS shards or, if these are small, of more, so that little is read
    to find them; with a `fraction`, at most half of a shard that has several documents. A document larger than the
    wanted size is passed over and reported. `RowStream` leaves these documents out of training (`held_out`).

    Raises:
        ValueError: There are only a few files, and one of them is a long document that would be held back as a whole.
    """
    if fraction is not None and not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction}: it is more than 0 and less than 1.")
    wanted, is_share = HELD_OUT_BYTES, False
    if fraction is not None and shards.num_bytes is not None:
        is_share = True
        wanted = max(1, min(wanted, int(fraction * shards.num_bytes)))
    made_from = {"contents": shards.contents, "num_shards": len(shards.shards), "wanted": wanted}
    made_from |= {"text_column": shards.text_column, "on_bad_record": on_bad_record, "format_version": FORMAT_VERSION}
    made_from |= {"is_share": is_share, "held_out_version": HELD_OUT_VERSION, **shards.reading}

    def write(path: Path) -> dict[str, Any]:
        passed_over: list[str] = []
        records = _first_records(shards, wanted, passed_over, is_share=is_share)
        account = write_documents(path, records, dataset=shards.name, on_bad_record=on_bad_record)
        return {**account, "passed_over": len(passed_over), "passed_over_examples": passed_over[:1]}

    documents, account = cached_dataset("held-out", made_from, write, cache_dir=cache_dir)
    account = {"name": shards.name, **account}
    if account["passed_over"]:
        logger.warning(
            "%s: documents larger than the %s bytes held back for validation are trained on and not measured: %s of "
            "them, first %s.",
            *(shards.name, f"{wanted:,}", f"{account['passed_over']:,}", account["passed_over_examples"][0]),
        )
    return Corpus(documents, account.pop("fingerprint"), account)


def _first_records(shards: Shards, wanted: int, passed_over: list[str], *, is_share: bool) -> Iterator[Record]:
    """Records of `wanted` bytes, up to the end of the last of them, taken evenly from the beginnings of some shards.

    The places of larger ones go into `passed_over`. See `hold_out` for what may not be taken of a text, if the records
    are a share of it and the others are trained on.
    """
    num_shards = len(shards.shards)
    few_files = {name for name, _ in shards.contents} if len(shards.contents) < FEW_DOCUMENTS else set()
    order = rows_at(np.arange(num_shards), num_rows=num_shards, seed=0)  # the split belongs to the data, not to a run
    taken = 0
    for number, index in enumerate(order, start=1):
        enough = wanted * min(1, number / min(num_shards, HELD_OUT_SHARDS))
        shard = shards.shards[index]
        records = shard.records()
        before = taken
        while taken < (min(enough, before + shard.num_bytes / 2) if is_share else enough):
            record = next(records, None)
            if record is None:
                break
            if record.problem is not None:
                yield record
                continue
            text: list[str] = []
            num_bytes = 0
            for piece in record.text:
                text.append(piece)
                num_bytes += len(piece.encode())
                if num_bytes > wanted:
                    break
            if num_bytes > wanted:
                passed_over.append(record.place)
                continue
            is_source = num_bytes > LONG_BYTES and shard.name in few_files
            if is_share and is_source and taken == before and next(records, None) is None:
                raise ValueError(
                    f"Streaming holds back whole documents, here all of {shard.name!r}, of which nothing would be "
                    "learned. Read it without streaming, which cuts long documents, or give a validation_dataset."
                )
            taken += num_bytes
            yield Record(record.place, text=text, source=record.source)
        if taken >= wanted:
            return
    if not taken and passed_over:
        raise ValueError(
            f"{wanted:,} bytes of {shards.name!r} are to be held back for validation, and each of its "
            f"{len(passed_over):,} documents is larger. Read it without streaming, which cuts long documents, hold "
            "back a larger fraction, or give a validation_dataset."
        )
