"""Documents packed into rows of block_size + 1 token ids, on disk, read at random.

The model sees a row's first block_size tokens, and its targets are the same row shifted by one. `position_ids` restart
at 0 with each document and with each row, and a token is a target exactly if its position in the row is not 0: the
first token of a document never is (nothing predicts across a boundary), padding never is (its positions are all 0),
and the first token of a row never is, because the row before ends with it and has it as a target already.
"""

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets.utils import tqdm
from numpy.lib.stride_tricks import sliding_window_view

from .cache import batch_verifier, cached_dataset
from .corpus import count_documents


FORMAT_VERSION = 1  # part of the cache's address: increase it when the same documents would give other rows
ENCODE_BYTES = 4 << 20  # text handed to the encoder at a time
ENCODE_PARTS = 4096
LARGEST_POSITION = 1 << 30  # the position of all later tokens of a document: every row restarts at 0 anyway
CHUNK_TOKENS = 1 << 21  # about this many token ids form a record batch of the file

Encoder = Callable[[list[str]], list[np.ndarray]]
Encoded = Iterator[tuple[np.ndarray, np.ndarray]]  # token ids of some parts, and where among them documents begin
Segments = Iterator[tuple[np.ndarray, np.ndarray, bool]]  # token ids, positions in the document, "the stream ends here"
RowBatches = Iterator[
    tuple[np.ndarray, np.ndarray, np.ndarray]
]  # token ids and positions (rows, T + 1), overlap (rows,)

# The account of rows, in the order in which tokens are counted. Always: targets + boundary_tokens + cropped_tokens ==
# text_tokens + special_tokens, and cropped_tokens == 0 row_tokens == text_tokens + special_tokens + padding_tokens +
# rows - 1, when packed: neighbours share a token
ACCOUNT = ["documents", "text_bytes", "text_tokens", "special_tokens", "boundary_tokens", "cropped_tokens"]
ACCOUNT += ["rows", "row_tokens", "padding_tokens", "row_targets", "targets", "target_bytes"]


class Rows:
    """Prepared rows, read from the memory map without copying anything but the rows asked for.

    `dataset` has the columns `input_ids`, `position_ids` (lists of block_size + 1), `num_targets` and `overlap`, the
    number of the row's leading targets that an earlier row has too. `num_bytes` is the number of UTF-8 bytes of the
    targets, each counted once, and `account` says what became of the documents' tokens. Rows are verified when they are
    first read, a record batch at a time.
    """

    def __init__(self, dataset: datasets.Dataset, account: dict[str, Any], verify: Callable[[int], None] | None = None):
        """`verify` verifies a record batch by its number; by default as the cache noted it."""
        self.dataset = dataset
        self.account = account
        self.num_bytes: int = account["target_bytes"]
        columns = [self._views(name) for name in ("input_ids", "position_ids")]
        self._input_ids, self._position_ids = columns
        self._chunk_starts = np.cumsum([0] + [len(view) for view in self._input_ids])
        self._verify = batch_verifier(dataset) if verify is None else verify
        self.block_size = self._input_ids[0].shape[1] - 1

    def _views(self, name: str) -> list[np.ndarray]:
        """The column as one array (rows, block_size + 1) per chunk; none of them copies."""
        chunks = [chunk for chunk in self.dataset.data.column(name).chunks if len(chunk)]
        return [chunk.flatten().to_numpy(zero_copy_only=True).reshape(len(chunk), -1) for chunk in chunks]

    def __len__(self) -> int:
        return len(self.dataset)

    def summary(self) -> str:
        """What became of the documents, in words; every token is accounted for."""
        account = self.account
        return (
            f"{count_documents(account['documents'])}, {account['text_bytes']:,} bytes -> "
            f"{account['text_tokens']:,} tokens "
            f"({account['text_bytes'] / max(1, account['text_tokens']):.2f} bytes each) and "
            f"{account['special_tokens']:,} separators -> {account['rows']:,} rows of {self.block_size} + 1, "
            f"{account['padding_tokens']:,} padding, {account['cropped_tokens']:,} cropped"
        )

    @functools.cached_property
    def num_targets(self) -> np.ndarray:
        """Targets of each row."""
        return self.dataset.data.column("num_targets").to_numpy()

    @functools.cached_property
    def overlap(self) -> np.ndarray:
        """Leading targets of each row that an earlier row has too."""
        return self.dataset.data.column("overlap").to_numpy()

    def batch(self, indices: np.ndarray, *, count_once: bool = False) -> dict[str, torch.Tensor]:
        """The rows as `input_ids`, `position_ids` and `shift_labels`, each (B, T) int64 with T = block_size.

        `shift_labels` are already shifted, and named as transformers' loss expects such labels; they are -100 where
        there is no target. `count_once` hides the targets that an earlier row has too, as evaluation needs.
        """
        indices = np.asarray(indices)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(f"Rows {indices.min()} to {indices.max()} asked for, of {len(self):,} rows.")
        chunks = self._chunk_starts.searchsorted(indices, side="right") - 1
        for chunk in set(chunks.tolist()):
            self._verify(chunk)
        token_ids, positions = np.empty((2, len(indices), self.block_size + 1), dtype=np.int64)
        for row, (chunk, index) in enumerate(zip(chunks, indices - self._chunk_starts[chunks])):
            token_ids[row] = self._input_ids[chunk][index]
            positions[row] = self._position_ids[chunk][index]
        return as_batch(token_ids, positions, overlap=self.overlap[indices] if count_once else None)


class JoinedRows:
    """Rows of several texts, one after another; `parts` has the rows of each text, by its name."""

    def __init__(self, parts: dict[str, Rows]):
        self.parts = parts
        self.num_bytes = sum(rows.num_bytes for rows in parts.values())
        self._starts = np.cumsum([0] + [len(rows) for rows in parts.values()])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def batch(self, indices: np.ndarray, *, count_once: bool = False) -> dict[str, torch.Tensor]:
        """The rows, as `Rows.batch` gives them."""
        indices = np.asarray(indices)
        owners = self._starts.searchsorted(indices, side="right") - 1
        rows = list(self.parts.values())
        batches = [
            rows[owner].batch(np.array([index - self._starts[owner]]), count_once=count_once)
            for owner, index in zip(owners, indices)
        ]
        return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}

    def summary(self) -> str:
        return "\n".join(f"{name}: {rows.summary()}" for name, rows in self.parts.items())


def as_batch(
    token_ids: np.ndarray, positions: np.ndarray, *, overlap: np.ndarray | None = None
) -> dict[str, torch.Tensor]:
    """Rows and their positions, (B, T + 1) int64 each, as the three tensors (B, T) that `Rows.batch` describes."""
    is_target = positions[:, 1:] > 0
    if overlap is not None:
        is_target &= np.arange(is_target.shape[1]) >= overlap[:, None]
    arrays = {
        "input_ids": token_ids[:, :-1],
        "position_ids": positions[:, :-1],
        "shift_labels": np.where(is_target, token_ids[:, 1:], -100),
    }
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def prepare_rows(
    documents: datasets.Dataset,
    encode: Encoder,
    *,
    block_size: int,
    bos_token_id: int | None,
    eos_token_id: int,
    pad_token_id: int,
    vocab_size: int,
    key: str,
    stride: int | None = None,
    token_bytes: Callable[[int], int] | None = None,
    allow_short: bool = False,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> Rows:
    """Encode the documents and cut them into rows, once; afterwards the rows are found again by `key` and the options.

    Without `stride`, documents are packed: each becomes [bos] + tokens + [eos] (eos serves as bos where there is none),
    they follow each other in one stream, and consecutive rows overlap by one token, so that every token is in a row and
    every token but the documents' first ones is a target exactly once.

    With `stride`, as in the book's chapter 2, no token is added, and a window slides over each document by itself,
    `stride` tokens further each time, the last one padded. Windows overlap by block_size - stride targets. A document's
    first token is then not a target, so its bytes do not count: `token_bytes` gives the bytes of a token id.

    `encode` turns texts into token ids without special tokens. `key` must identify the documents and the tokenizer.
    Fewer tokens than one row needs are an error unless `allow_short`.
    """
    options = complete_options(
        block_size=block_size,
        stride=stride,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        vocab_size=vocab_size,
        can_count_bytes=token_bytes is not None,
    )
    if len(documents) == 0:
        raise ValueError("There are no documents to make rows of.")

    def write(path: Path) -> dict[str, int]:
        account: Counter[str] = Counter()
        encoded = encode_documents(documents, encode, account, vocab_size=vocab_size, progress=progress)
        batches = record_batches(encoded, account, **options, token_bytes=token_bytes)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, row_schema(block_size, vocab_size)) as writer:
            for batch in batches:
                writer.write_batch(batch)
        return complete_account(account)

    made_from = {"key": key, **options, "format_version": FORMAT_VERSION}
    dataset, account = cached_dataset("rows", made_from, write, cache_dir=cache_dir, verify_now=False)
    check_account(account, block_size=block_size, allow_short=allow_short)
    return Rows(dataset, account)


def check_account(account: dict[str, Any], *, block_size: int, allow_short: bool) -> None:
    """Refuse documents that make no row, or unless `allow_short` not one full row."""
    num_tokens = account["text_tokens"] + account["special_tokens"]
    if num_tokens <= block_size and not allow_short:
        raise ValueError(
            f"The documents have {num_tokens:,} tokens, and a row of block_size={block_size:,} needs "
            f"{block_size + 1:,}. Choose a smaller block_size or give more text."
        )
    if not account["rows"]:
        raise ValueError("No document has two tokens, so there is nothing to predict.")


def complete_options(
    *,
    block_size: int,
    stride: int | None,
    bos_token_id: int | None,
    eos_token_id: int,
    pad_token_id: int,
    vocab_size: int,
    can_count_bytes: bool = True,
) -> dict[str, Any]:
    """The options of rows, checked; where there is no bos, eos serves as one."""
    bos_token_id = eos_token_id if bos_token_id is None else bos_token_id
    special_ids = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
    if block_size < 2:
        raise ValueError(f"block_size={block_size}: a row needs at least 2 tokens.")
    if stride is not None and not 1 <= stride <= block_size:
        raise ValueError(f"stride={stride}: it is at least 1, and at most block_size={block_size} or tokens are lost.")
    if stride is not None and not can_count_bytes:
        raise ValueError(
            "stride needs token_bytes, the UTF-8 bytes of a token id, to count the text of the targets. "
            "For a byte-level BPE: lambda token_id: len(tokenizer.convert_ids_to_tokens(token_id))."
        )
    for name, token_id in special_ids.items():
        if token_id is None or not 0 <= token_id < vocab_size:
            raise ValueError(
                f"{name}={token_id}: it must be a token id, from 0 to vocab_size - 1 = {vocab_size - 1:,}."
            )
    return {"block_size": block_size, "stride": stride, "vocab_size": vocab_size, **special_ids}


def encode_documents(
    documents: datasets.Dataset,
    encode: Encoder,
    account: Counter[str],
    *,
    vocab_size: int,
    last_document: int | None = None,
    batch_bytes: int | None = None,
    progress: bool = False,
) -> Encoded:
    """The token ids of the documents' parts, encoded many at a time; the account counts the text.

    `last_document` is the number of the document before these; they may begin with further parts of it. About
    `batch_bytes` of text are encoded at a time.
    """
    with tqdm(desc="Text to rows", unit="B", unit_scale=True, disable=not progress) as bar:
        for texts, numbers, num_bytes in _batches_of_parts(documents, batch_bytes or ENCODE_BYTES):
            encoded = encode_texts(texts, encode, vocab_size=vocab_size)
            token_ids = np.concatenate(encoded)
            begins_document = [number != last for last, number in zip([last_document, *numbers], numbers)]
            first_tokens = np.cumsum([0, *map(len, encoded)])[:-1][begins_document]
            last_document = numbers[-1]
            account["documents"] += len(first_tokens)
            account["text_bytes"] += num_bytes
            account["text_tokens"] += len(token_ids)
            bar.update(num_bytes)
            yield token_ids.astype(np.int32, copy=False), first_tokens


def encode_texts(texts: list[str], encode: Encoder, *, vocab_size: int) -> list[np.ndarray]:
    """The texts' token ids from `encode`, checked."""
    encoded = encode(texts)
    if len(encoded) != len(texts):
        raise ValueError(f"encode gave {len(encoded):,} arrays for {len(texts):,} texts.")
    token_ids = np.concatenate(encoded)
    if len(token_ids) and not (token_ids.min() >= 0 and token_ids.max() < vocab_size):
        raise ValueError(
            f"encode gave token ids from {token_ids.min():,} to {token_ids.max():,}, and vocab_size is "
            f"{vocab_size:,}. Give the vocabulary size of the tokenizer that encodes."
        )
    return encoded


def _batches_of_parts(documents: datasets.Dataset, batch_bytes: int) -> Iterator[tuple[list[str], list[int], int]]:
    """Texts, their documents' numbers and their bytes: enough at a time to keep the encoder's threads busy."""
    texts: list[str] = []
    numbers: list[int] = []
    num_bytes = 0
    for batch in documents.with_format("arrow").iter(batch_size=16):
        texts += batch["text"].to_pylist()
        numbers += batch["document"].to_pylist()
        num_bytes += pc.sum(pc.binary_length(batch["text"])).as_py()
        if num_bytes >= batch_bytes or len(texts) >= ENCODE_PARTS:
            yield texts, numbers, num_bytes
            texts, numbers, num_bytes = [], [], 0
    if texts:
        yield texts, numbers, num_bytes


def _packed_stream(encoded: Encoded, account: Counter[str], *, bos_token_id: int, eos_token_id: int) -> Segments:
    """All documents as one stream, each between its bos and its eos."""
    position = None  # of the open document's next token
    for token_ids, first_tokens in encoded:
        num_documents = len(first_tokens)
        separators = np.tile([eos_token_id, bos_token_id], num_documents)
        segment: np.ndarray = np.insert(token_ids, np.repeat(first_tokens, 2), separators)
        starts = first_tokens + 2 * np.arange(num_documents) + 1  # where each bos is now
        if position is None:  # before the first document, there is none to end
            segment, starts, position = segment[1:], starts - 1, 0
        runs = np.diff([0, *starts, len(segment)])
        origins = np.array([-position, *starts], dtype=np.int32)
        positions = np.arange(len(segment), dtype=np.int32) - np.repeat(origins, runs)
        if len(segment):
            position = min(int(positions[-1]) + 1, LARGEST_POSITION)
        account["boundary_tokens"] += num_documents
        account["special_tokens"] += 2 * num_documents
        yield segment, positions, False
    yield np.array([eos_token_id], dtype=np.int32), np.array([position], dtype=np.int32), True


def _separate_documents(encoded: Encoded, account: Counter[str], token_bytes: Callable[[int], int]) -> Segments:
    """Each document as a stream of its own, without added tokens."""
    position = 0  # of the open document's next token
    nothing = np.array([], dtype=np.int32)
    for token_ids, first_tokens in encoded:
        for index, some in enumerate(np.split(token_ids, first_tokens)):
            if index:  # what comes before the first of first_tokens still belongs to the open document
                yield nothing, nothing, True
                position = 0
            if position == 0 and len(some):
                account["boundary_tokens"] += 1
                account["boundary_bytes"] += token_bytes(int(some[0]))
            yield some, np.arange(position, position + len(some), dtype=np.int32), False
            position = min(position + len(some), LARGEST_POSITION)
    yield nothing, nothing, True


def cut_rows(segments: Segments, account: Counter[str], *, block_size: int, step: int, pad_token_id: int) -> RowBatches:
    """Rows of block_size + 1 tokens that begin every `step` tokens of a stream, their positions, and their overlap.

    The rest at a stream's end becomes a padded row if it has any new target.
    """
    width = block_size + 1
    most_rows = max(1, CHUNK_TOKENS // width)  # at a time: with a small step, rows outweigh the stream they view
    in_row: np.ndarray = np.arange(width, dtype=np.int32)
    stream = places = np.array([], dtype=np.int32)
    overlap = 0  # leading targets of the stream's next row that the row before it has too
    for token_ids, positions, ends in segments:
        stream, places = np.concatenate([stream, token_ids]), np.concatenate([places, positions])
        num_rows = max(0, (len(stream) - width) // step + 1)
        if num_rows:
            rows, row_places = (sliding_window_view(array, width)[::step] for array in (stream, places))
            overlaps = np.full(num_rows, block_size - step)
            overlaps[0] = overlap
            for first in range(0, num_rows, most_rows):
                some = slice(first, first + most_rows)
                yield rows[some], np.minimum(row_places[some], in_row), overlaps[some]
            stream, places, overlap = stream[num_rows * step :], places[num_rows * step :], block_size - step
        if ends:
            if len(stream) > overlap + 1:
                missing = width - len(stream)
                account["padding_tokens"] += missing
                row = np.pad(stream, (0, missing), constant_values=pad_token_id)
                row_places = np.pad(np.minimum(places, in_row[: len(places)]), (0, missing))
                yield row[None], row_places[None], np.array([overlap])
            stream, places, overlap = stream[:0], places[:0], 0


def row_schema(block_size: int, vocab_size: int) -> pa.Schema:
    """The columns of rows; ids and positions take two bytes where they fit."""
    id_type, position_type = (
        pa.list_(pa.uint16() if largest < 1 << 16 else pa.int32(), block_size + 1)
        for largest in (vocab_size - 1, block_size)
    )
    types = {"input_ids": id_type, "position_ids": position_type, "num_targets": pa.int32(), "overlap": pa.int32()}
    return pa.schema(list(types.items()))


def record_batches(
    encoded: Encoded,
    account: Counter[str],
    *,
    block_size: int,
    stride: int | None,
    bos_token_id: int,
    eos_token_id: int,
    pad_token_id: int,
    vocab_size: int,
    token_bytes: Callable[[int], int] | None,
) -> Iterator[pa.RecordBatch]:
    """Encoded documents as rows, see `prepare_rows`, in record batches of CHUNK_TOKENS; the account counts them.

    Rows and batches do not depend on how the documents were cut to be encoded.
    """
    if stride is None:
        segments = _packed_stream(encoded, account, bos_token_id=bos_token_id, eos_token_id=eos_token_id)
    else:
        assert token_bytes is not None
        segments = _separate_documents(encoded, account, token_bytes)
    step = block_size if stride is None else stride
    rows = cut_rows(segments, account, block_size=block_size, step=step, pad_token_id=pad_token_id)
    schema = row_schema(block_size, vocab_size)
    width = block_size + 1
    for token_ids, positions, overlap in _of_equal_size(rows, max(1, CHUNK_TOKENS // width)):
        num_targets = np.count_nonzero(positions[:, 1:], axis=1)
        lists = [
            pa.FixedSizeListArray.from_arrays(pa.array(array.ravel(), field.type.value_type), type=field.type)
            for array, field in zip((token_ids, positions), schema)
        ]
        numbers = [pa.array(array, pa.int32()) for array in (num_targets, overlap)]
        account["rows"] += len(token_ids)
        account["row_tokens"] += token_ids.size
        account["row_targets"] += int(num_targets.sum())
        account["targets"] += int((num_targets - overlap).sum())
        yield pa.record_batch([*lists, *numbers], schema=schema)


def complete_account(account: Counter[str]) -> dict[str, int]:
    """The account of rows that were all written."""
    account["target_bytes"] = account["text_bytes"] - account["boundary_bytes"]
    account["cropped_tokens"] = (
        account["text_tokens"] + account["special_tokens"] - account["boundary_tokens"] - account["targets"]
    )
    assert account["cropped_tokens"] == 0, account
    return {name: account[name] for name in ACCOUNT}


def _of_equal_size(rows: RowBatches, num_rows: int) -> RowBatches:
    """The same rows, `num_rows` at a time; the last ones may be fewer."""
    waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def joined() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        token_ids, positions, overlap = zip(*waiting)
        return np.concatenate(token_ids), np.concatenate(positions), np.concatenate(overlap)

    num_waiting = 0
    for some in rows:
        waiting.append(some)
        num_waiting += len(some[2])
        while num_waiting >= num_rows:
            token_ids, positions, overlap = joined()
            yield token_ids[:num_rows], positions[:num_rows], overlap[:num_rows]
            waiting = [(token_ids[num_rows:], positions[num_rows:], overlap[num_rows:])]
            num_waiting -= num_rows
    if num_waiting:
        yield joined()
