"""Documents of a Hub dataset, local files or folders, or the standard library of the running Python."""

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .cache import cached_dataset
from .records import (
    ReadOptions,
    Record,
    as_document,
    check_on_bad_record,
    is_good,
    new_account,
    tell_account,
)
from .sampler import rows_at
from .sources import by_short_names, find_source


logger = logging.getLogger(__name__)

FORMAT_VERSION = 2  # part of the cache's address: increase it when the same sources would give other files
PART_CHARACTERS = 1 << 16
BATCH_BYTES = 8 << 20  # text in memory before it is written out
BATCH_PARTS = 1 << 16
NUM_SOURCES = 1000  # files whose share of the documents is in the account
NUM_NAMED_SOURCES = 8  # ... and shown for the held-out text
FEW_DOCUMENTS = 10
LONG_BYTES = 1 << 13  # a shorter document is never cut for validation
SCHEMA = pa.schema([("text", pa.large_string()), ("document", pa.int64())])

# Where a long document may be cut, best first. Encoding its parts one by one must give the tokens of the whole, so the
# cut has to fall between two pre-tokens, and no look-ahead may notice that the text ends there. A run of whitespace is
# where the GPT-2, Llama 3 and Qwen patterns look ahead (`\s+(?!\S)`); a single newline or space between two other
# characters is not a run. They end a pre-token after the newline (some include a slash) and begin one before the space.
# The third way may cost a token; a text without any of these places is cut anywhere.
CUTS = [re.compile(".*" + place, re.DOTALL) for place in (r"\S\n(?=[^\s/])", r"\S(?= \S)", r"\s(?=\S)")]


@dataclass(frozen=True)
class Corpus:
    """Documents on disk and what is known of them.

    `documents` has the columns `text` and `document`. Consecutive rows with the same number are the parts of one
    document: its text is their concatenation. `fingerprint` is a sha256 over the documents' texts, their boundaries
    and their order. `account` says what was read and what was left out.
    """

    documents: datasets.Dataset
    fingerprint: str
    account: dict[str, Any]


def load_corpus(
    dataset: str,
    *,
    dataset_config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    on_bad_record: str = "error",
    delimiter: str | None = None,
    document_separator: str | None = None,
    exclude: Iterable[str | os.PathLike] = (),
    cache_dir: str | os.PathLike | None = None,
) -> Corpus:
    """The documents of a dataset, read once in bounded memory and then found again by the content of their sources.

    `dataset` is `stdlib` (the source of the running Python's standard library), a file, folder or pattern, several of
    them separated by commas, or the id of a dataset on the Hub. A text file (.txt, .md, .py, ...) is one document, with
    its line ends unchanged, or several, separated by lines that equal `document_separator`. A line of .jsonl, an object
    of .json and a row of .csv, .tsv, .parquet or .arrow are one document each. In a folder, all such files below it are
    read, in sorted order, except the folders in `exclude` (see `files_below`). NUL characters are text; a byte-order
    mark at a file's start is not.

    A record without text (corrupt JSON, no such column, bytes that are not UTF-8, ...) is an error with its file and
    line, or, with `on_bad_record="skip"`, left out and counted. Empty documents are dropped and counted.
    """
    check_on_bad_record(on_bad_record)
    options = document_options(text_column, delimiter=delimiter, document_separator=document_separator)
    source = find_source(dataset, dataset_config=dataset_config, split=split, options=options, exclude=exclude)
    records = (as_document(record, text_column, source=name) for name, read in source.parts for record in read())
    made_from: dict[str, Any] = {
        "contents": source.identify(),
        "text_column": text_column,
        "on_bad_record": on_bad_record,
    }
    made_from |= {"delimiter": delimiter, "document_separator": document_separator}
    documents, account = cached_dataset(
        "corpus",
        {**made_from, "format_version": FORMAT_VERSION},
        lambda path: write_documents(path, records, dataset=dataset, on_bad_record=on_bad_record),
        cache_dir=cache_dir,
    )
    account = {"name": dataset, **source.account, **account}
    tell_account(dataset, account)
    return Corpus(documents, account.pop("fingerprint"), account)


def document_options(text_column: str, *, delimiter: str | None, document_separator: str | None) -> ReadOptions:
    """How files are read for the documents in a column."""
    required = {text_column: "text_column"}
    return ReadOptions(required, only={text_column}, delimiter=delimiter, document_separator=document_separator)


def count_documents(number: int) -> str:
    """ "1 document", "2,000 documents"."""
    return f"{number:,} document{'s' * (number != 1)}"


def cut_into_parts(pieces: Iterable[str]) -> Iterator[str]:
    """A document's text in parts of at most PART_CHARACTERS, cut where a tokenizer does not notice (see CUTS).

    The result does not depend on how the text is divided into pieces.
    """
    buffer = ""
    for piece in pieces:
        buffer += piece
        start = 0
        while len(buffer) - start > PART_CHARACTERS:
            end = _cut_position(buffer, start)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    if buffer:
        yield buffer


def _cut_position(text: str, start: int) -> int:
    """The last good place in the second half of the part that begins at `start`."""
    lowest, highest = start + PART_CHARACTERS // 2, start + PART_CHARACTERS
    for pattern in CUTS:
        if match := pattern.match(text, lowest, highest + 1):  # one more character, for the pattern to look ahead at
            return match.end()
    return highest


def write_documents(path: Path, records: Iterable[Record], *, dataset: str, on_bad_record: str) -> dict[str, Any]:
    """Write the records' documents as an Arrow stream, and return the account."""
    account: dict[str, Any] = {"documents": 0, "parts": 0, "bytes": 0, **new_account()}
    sources: list[dict[str, Any]] = []
    fingerprint = hashlib.sha256()
    parts: list[bytes] = []
    numbers: list[int] = []
    num_waiting = 0  # bytes in `parts`
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for record in records:
            if not is_good(record, account, on_bad_record=on_bad_record):
                continue
            digest = hashlib.sha256()
            num_bytes = 0
            for part in cut_into_parts(record.text):
                parts.append(part.encode())
                numbers.append(account["documents"])
                digest.update(parts[-1])
                num_bytes += len(parts[-1])
                num_waiting += len(parts[-1])
                account["parts"] += 1
                if num_waiting >= BATCH_BYTES or len(parts) >= BATCH_PARTS:
                    writer.write_batch(_record_batch(parts, numbers))
                    parts, numbers, num_waiting = [], [], 0
            if num_bytes:
                fingerprint.update(digest.digest())
                account["documents"] += 1
                account["bytes"] += num_bytes
                if not sources or sources[-1]["name"] != record.source:
                    sources.append({"name": record.source, "documents": 0, "bytes": 0})
                sources[-1]["documents"] += 1
                sources[-1]["bytes"] += num_bytes
            else:
                account["empty_documents"] += 1
        writer.write_batch(_record_batch(parts, numbers))
    if not account["documents"]:
        raise ValueError(_nothing_left(dataset, account))
    if account["unused_columns"]:
        account["unused_columns"].sort()
    return {**account, "sources": sources[:NUM_SOURCES], "fingerprint": fingerprint.hexdigest()}


def _record_batch(parts: list[bytes], numbers: list[int]) -> pa.RecordBatch:
    return pa.record_batch([pa.array(parts, pa.large_string()), pa.array(numbers, pa.int64())], schema=SCHEMA)


def _nothing_left(dataset: str, account: dict[str, Any]) -> str:
    """The error message when no document is left."""
    num_bad, num_empty = account["bad_records"], account["empty_documents"]
    if not num_bad:
        return f"{dataset!r} has no text: {count_documents(num_empty)}, and nothing in any of them."
    first = account["bad_record_examples"][0]
    if num_bad == account["records_without_column"] and not num_empty:
        return f"No record of {dataset!r} has the column asked for. The first: {first}."
    return f"Nothing is left of {dataset!r}: {num_bad:,} bad records, {num_empty:,} empty. The first bad one: {first}."


def split_documents(corpus: Corpus, *, validation_fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The documents to train on, in a fixed pseudo-random order, and those to validate on.

    Documents are chosen by a hash of their content, so the choice does not depend on their order, and equal documents
    are on the same side. Validation takes documents in the order of that hash while they fit into `validation_fraction`
    of the bytes; if none fits, it takes the smallest.

    If long documents hold most of the text, a single one could be all of validation. Each of them is then cut: training
    takes its beginning, and validation its last `validation_fraction`. The cut is at the end of a paragraph or line. A
    single document is cut at the exact character, as in the book.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction}: it is at least 0 and less than 1.")
    documents = corpus.documents
    starts, num_bytes, digests = _documents_index(documents)
    ends: np.ndarray = np.append(starts[1:], len(documents))
    held_out: np.ndarray = np.zeros(len(starts), dtype=bool)
    is_cut = held_out.copy()
    if validation_fraction > 0 and len(starts) == 1:
        return _cut_in_two(documents, validation_fraction)
    if validation_fraction > 0:
        is_cut = _documents_to_cut(num_bytes, digests, validation_fraction)
        whole = ~is_cut
        held_out[whole] = _hold_out(
            num_bytes[whole], digests[whole], validation_fraction, or_smallest=bool(whole.all())
        )
        share = num_bytes[held_out].sum() / num_bytes.sum()
        if share > 2 * validation_fraction:
            logger.warning("Validation takes %.0f %% of the bytes: the documents are few and long.", 100 * share)

    # Neighbouring files are similar. The seed is fixed because the split belongs to the data, not to a run.
    training = np.flatnonzero(~held_out)
    training = training[rows_at(np.arange(len(training)), num_rows=len(training), seed=0)]
    validation = np.flatnonzero(held_out | is_cut)
    if is_cut.any():
        documents, cuts = _cut_documents(documents, starts, ends, is_cut, validation_fraction)
        uncut = {number: [(starts[number], ends[number])] for number in np.flatnonzero(~is_cut)}
        sides = [
            np.array([part for number in numbers for part in uncut.get(number) or cuts[number][side]])
            for side, numbers in enumerate((training, validation))
        ]
    else:
        sides = [np.column_stack([starts[side], ends[side]]) for side in (training, validation)]
    return documents.select(_rows_of(sides[0])), documents.select(_rows_of(sides[1]))


def held_out_by_file(corpus: Corpus, validation: datasets.Dataset) -> dict[str, datasets.Dataset]:
    """The validation documents of each file, by a short name, if they are from a few files; else an empty dict."""
    sources = corpus.account.get("sources", [])
    if not 1 < len(sources) <= NUM_NAMED_SOURCES:
        return {}
    ends = np.cumsum([source["documents"] for source in sources])
    owners = np.searchsorted(ends, validation.with_format("numpy")[:]["document"], side="right")
    names = by_short_names(source["name"] for source in sources)
    rows = {name: np.flatnonzero(owners == index) for index, name in enumerate(names)}
    return {name: validation.select(own) for name, own in rows.items() if len(own)}


def describe_held_out(corpus: Corpus, validation: datasets.Dataset) -> str:
    """What `split_documents` holds out, as shares of the files."""
    columns: list[np.ndarray] = [np.empty((2, 0), dtype=np.int64)]
    for batch in validation.with_format("arrow").iter(batch_size=1000):
        columns.append(np.stack([batch["document"].to_numpy(), pc.binary_length(batch["text"]).to_numpy()]))
    numbers, num_bytes = np.concatenate(columns, axis=1)
    sources = corpus.account.get("sources", [])
    total = f"{count_documents(len(np.unique(numbers)))}, {num_bytes.sum():,} bytes"
    if not 1 < len(sources) <= NUM_NAMED_SOURCES:
        return total
    ends = np.cumsum([source["documents"] for source in sources])
    held = np.bincount(np.searchsorted(ends, numbers, side="right"), weights=num_bytes, minlength=len(sources))
    shares = [f"{share / source['bytes']:.1%} of {source['name']}" for share, source in zip(held, sources)]
    return f"{total}: {', '.join(shares)}"


def num_shared_documents(corpus: Corpus, other: Corpus) -> int:
    """The number of documents of `other` that are also in `corpus`."""
    known, others = (_documents_index(each.documents)[2] for each in (corpus, other))
    return int(np.isin(others, known).sum())


def _documents_index(documents: datasets.Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per document: the row of its first part, its bytes, and 64 bits of the sha256 of its text."""
    starts: list[int] = []
    num_bytes: list[int] = []
    digests: list[int] = []
    number, digest, row = None, hashlib.sha256(), 0
    for batch in documents.with_format("arrow").iter(batch_size=256):
        for text, document in zip(batch["text"], batch["document"].to_pylist()):
            if document != number:
                if starts:
                    digests.append(int.from_bytes(digest.digest()[:8]))
                number, digest = document, hashlib.sha256()
                starts.append(row)
                num_bytes.append(0)
            buffer = text.as_buffer()
            digest.update(buffer)
            num_bytes[-1] += buffer.size
            row += 1
    digests.append(int.from_bytes(digest.digest()[:8]))
    return np.array(starts), np.array(num_bytes), np.array(digests, dtype=np.uint64)


def _documents_to_cut(num_bytes: np.ndarray, digests: np.ndarray, fraction: float) -> np.ndarray:
    """A mask of the long documents, if they hold most of the text: those that do not fit into validation, or if there
    are few documents, all long ones."""
    is_few = len(np.unique(digests)) < FEW_DOCUMENTS
    is_long = num_bytes > (LONG_BYTES if is_few else max(LONG_BYTES, fraction * num_bytes.sum()))
    return is_long if 2 * num_bytes[is_long].sum() > num_bytes.sum() else np.zeros_like(is_long)


def _hold_out(num_bytes: np.ndarray, digests: np.ndarray, fraction: float, *, or_smallest: bool) -> np.ndarray:
    """A mask of the documents to validate on; if none fits, the smallest or none."""
    distinct, group = np.unique(digests, return_inverse=True)  # sorted by digest: the order in which they are taken
    if len(distinct) == 1 and or_smallest:
        raise ValueError(
            f"All {len(digests):,} documents are the same text, so nothing is left to validate on. "
            "Keep one of them, or choose validation_fraction=0."
        )
    group_bytes = np.bincount(group, weights=num_bytes).astype(np.int64)
    remaining = fraction * num_bytes.sum()
    taken: np.ndarray = np.zeros(len(distinct), dtype=bool)
    for index, size in enumerate(group_bytes.tolist()):
        if size <= remaining:
            taken[index] = True
            remaining -= size
    if not taken.any() and or_smallest:
        taken[group_bytes.argmin()] = True
    return taken[group]


def _rows_of(parts: np.ndarray) -> np.ndarray:
    """The rows from a start to an end, for each part (start, end) in turn."""
    starts, ends = parts.T
    lengths = ends - starts
    first_places = np.cumsum(lengths) - lengths
    return np.repeat(starts - first_places, lengths) + np.arange(lengths.sum())


Parts = list[tuple[int, int]]  # rows from a start to an end


def _cut_documents(
    documents: datasets.Dataset, starts: np.ndarray, ends: np.ndarray, is_cut: np.ndarray, fraction: float
) -> tuple[datasets.Dataset, dict[int, tuple[Parts, Parts]]]:
    """The documents with the two halves of each row that is cut at their end; of each cut document the rows before
    the cut and those after it."""
    halves: list[dict[str, Any]] = []
    cuts: dict[int, tuple[Parts, Parts]] = {}
    for number in np.flatnonzero(is_cut):
        start, end = int(starts[number]), int(ends[number])
        texts = documents.select(range(start, end)).with_format("arrow")[:]["text"]
        row, within = _place_to_cut(texts, fraction)
        text = texts[row].as_py()
        sides: tuple[Parts, Parts] = ([(start, start + row)], [])
        for side, half in zip(sides, (text[:within], text[within:])):
            if half:
                place = len(documents) + len(halves)
                side.append((place, place + 1))
                halves.append({"text": half, "document": documents[start]["document"]})
        sides[1].append((start + row + 1, end))
        cuts[int(number)] = sides
    extra = datasets.Dataset.from_list(halves, features=documents.features)
    return datasets.concatenate_datasets([documents, extra]), cuts


def _place_to_cut(texts: pa.ChunkedArray, fraction: float) -> tuple[int, int]:
    """Row and character of the first paragraph's end in the last `fraction` of the characters, or of a line's, or of a
    word's; it is looked for in the first quarter of that."""
    lengths = pc.utf8_length(texts).to_numpy()
    ends = np.cumsum(lengths)
    total = int(ends[-1])
    cut = min(max(int(total * (1 - fraction)), 1), total - 1)
    row = int(np.searchsorted(ends, cut, side="right"))  # the part that has the cut before its end
    within = cut - int(ends[row] - lengths[row])
    latest = within + (total - cut) // 4
    text = texts[row].as_py()
    for boundary in ("\n\n", "\n", " "):
        place = text.find(boundary, max(0, within - len(boundary)), latest)  # it may end right at the cut
        if place >= 0:
            return row, place + len(boundary)
    return row, int(lengths[row]) if latest > lengths[row] else within  # parts end where lines do


def _cut_in_two(documents: datasets.Dataset, fraction: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The single document's first characters and its last ones."""
    batches = documents.with_format("arrow").iter(batch_size=256)
    lengths = np.concatenate([pc.utf8_length(batch["text"]).to_numpy() for batch in batches])
    total = int(lengths.sum())
    if total < 2:
        raise ValueError("The corpus is a single character: it cannot be split. Choose validation_fraction=0.")
    cut = min(max(int(total * (1 - fraction)), 1), total - 1)
    row = int(np.searchsorted(np.cumsum(lengths), cut, side="right"))  # the part that has the cut before its end
    within = cut - int(lengths[:row].sum())
    part = documents[row]
    sides = [[documents.select(range(row))], []]
    for side, text in zip(sides, (part["text"][:within], part["text"][within:])):
        if text:
            side.append(datasets.Dataset.from_list([{**part, "text": text}], features=documents.features))
    if row + 1 < len(documents):  # `datasets` cannot select an empty range at the end
        sides[1].append(documents.select(range(row + 1, len(documents))))
    training, validation = map(datasets.concatenate_datasets, sides)
    return training, validation
