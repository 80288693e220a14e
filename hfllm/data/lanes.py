"""One lane of a stream: its shards in the order of each epoch, read in chunks, as rows that are taken one by one.

A chunk is made of about `chunk_bytes` of text: its documents are encoded, shuffled, and packed as in `prepare_rows`,
with the last row padded; then its rows are shuffled. If a long document continues in the next chunk, that chunk begins
with the last token of this one, so that its first new token can be predicted.

A chunk is a pure function of the place where it begins. So the next one can be made in the background while the rows of
this one are taken, and the place and the number of rows taken since are enough to resume exactly.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import chain, islice
from typing import Any

import numpy as np

from .corpus import cut_into_parts
from .packing import Encoder, cut_rows, encode_texts
from .records import Record, is_good
from .records import new_account as new_reading_account
from .shards import Shard


logger = logging.getLogger(__name__)

# Counts of the text that was read. Always: targets == text_tokens + documents, because each document has an eos.
ACCOUNT = ["documents", "empty_documents", "held_out_documents", "bad_records", "records_without_column"]
ACCOUNT += ["text_bytes", "text_tokens", "rows", "targets", "padding_tokens"]

TOLD = {"bad_record_examples": "Left out: %s", "remarks": "%s.", "unused_columns": "Not used: the column %s."}

DOCUMENTS, ROWS = 1, 2  # what is shuffled: part of the seed


@dataclass(frozen=True)
class ChunkOptions:
    """What all lanes have in common."""

    encode: Encoder
    block_size: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int
    vocab_size: int
    seed: int
    chunk_bytes: int
    on_bad_record: str
    held_out: frozenset[bytes]  # digests of the documents to leave out


@dataclass(frozen=True)
class Place:
    """Where a chunk begins: before a part (see `cut_into_parts`) of a record of a shard, each counted from 0."""

    epoch: int = 0
    shard: int = 0  # among the lane's shards of this epoch
    record: int = 0
    part: int = 0
    token_id: int | None = None  # the token before, if the place is inside a document
    chunk: int = 0  # chunks of the lane before this one, in all epochs


@dataclass(frozen=True)
class Part:
    text: str
    begins_document: bool
    ends_document: bool
    end: tuple[int, int, int]  # shard, record and part of what follows


@dataclass(frozen=True)
class Chunk:
    token_ids: np.ndarray  # (rows, T + 1), like the positions
    positions: np.ndarray
    account: Counter[str]
    end: Place


class Lane:
    """The rows of one lane, asked for by their number, in rising order; `shards_of` says what it reads in an epoch.

    `place` is where the current chunk begins, `first_row` the number of its first row, and `account` counts the chunks
    before it. `first_share` makes the first chunk smaller, so that the lanes do not all begin a chunk at the same time.
    `check_text` is called when an epoch of the lane had no text. A `worker`, which has one thread, makes the next chunk
    while rows of this one are taken.
    """

    def __init__(
        self,
        number: int,
        options: ChunkOptions,
        shards_of: Callable[[int], list[Shard]],
        *,
        first_share: float,
        check_text: Callable[[], None],
        worker: Executor | None,
    ):
        self.number, self.options, self.shards_of = number, options, shards_of
        self.first_share, self.check_text, self.worker = first_share, check_text, worker
        self.place, self.first_row, self.account = Place(), 0, Counter[str]()
        self.chunk: Chunk | None = None
        self._next_chunk: Future[Chunk] | None = None
        # Touched by `_make_chunk` only, which the worker's one thread calls, if there is a worker.
        self._parts: Iterator[Part] | None = None
        self._parts_begin = self.place
        self._left_out = new_account()

    @property
    def mark(self) -> tuple[Place, int, Counter[str]]:
        """Where the lane is. Only a new lane can return there: the thread may be making a chunk for this one."""
        return self.place, self.first_row, self.account

    @mark.setter
    def mark(self, mark: tuple[Place, int, Counter[str]]) -> None:
        assert self.chunk is None
        self.place, self.first_row, self.account = mark

    def state(self) -> dict[str, Any]:
        return {"place": asdict(self.place), "first_row": self.first_row, "account": dict(self.account)}

    def load_state(self, state: dict[str, Any]) -> None:
        self.mark = Place(**state["place"]), state["first_row"], Counter(state["account"])

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and positions of a row, (T + 1) each."""
        assert number >= self.first_row, f"row {number} of lane {self.number} is gone: {self.first_row} is the first"
        while self.chunk is None or number >= self.first_row + len(self.chunk.token_ids):
            self._advance()
        index, chunk = number - self.first_row, self.chunk
        # Not earlier, so that memory holds a chunk and a half per lane, and all lanes begin before one makes a second
        # chunk.
        if self.worker is not None and self._next_chunk is None and 2 * index >= len(chunk.token_ids):
            self._next_chunk = self.worker.submit(self._make_chunk, chunk.end)
        return chunk.token_ids[index], chunk.positions[index]

    def _advance(self) -> None:
        next_chunk, self._next_chunk = self._next_chunk, None
        if self.chunk is not None:
            self.place = self.chunk.end
            self.first_row += len(self.chunk.token_ids)
            self.account = Counter(self.account)  # a new one: `mark` keeps the old
            self.account.update(self.chunk.account)
            self.chunk = None
        if self.worker is None:
            self.chunk = self._make_chunk(self.place)
        else:
            self.chunk = (next_chunk or self.worker.submit(self._make_chunk, self.place)).result()

    def _make_chunk(self, place: Place) -> Chunk:
        parts, self._parts = self._parts, None  # not kept if anything fails below, where it would seem to be at its end
        if parts is None or self._parts_begin != place:
            parts = self._read(place)
        texts: list[str] = []
        first_texts: list[int] = []  # of each document
        num_bytes, is_last_of_epoch = 0, True
        share = self.first_share if place.chunk == 0 else 1
        for part in parts:
            if part.begins_document or not texts:
                first_texts.append(len(texts))
            texts.append(part.text)
            num_bytes += len(part.text.encode())
            if num_bytes >= share * self.options.chunk_bytes:
                is_last_of_epoch = False
                break
        if not texts and place == Place(epoch=place.epoch, chunk=place.chunk):
            self.check_text()
        chunk = self._pack(texts, first_texts, place, None if is_last_of_epoch else part)
        chunk.account["text_bytes"] = num_bytes
        for name in ("empty_documents", "held_out_documents", "bad_records", "records_without_column"):
            chunk.account[name], self._left_out[name] = self._left_out[name], 0
        self._parts, self._parts_begin = (None if is_last_of_epoch else parts), chunk.end
        return chunk

    def _read(self, place: Place) -> Iterator[Part]:
        """The lane's parts from that place to the end of the epoch."""
        shards = self.shards_of(place.epoch)
        for shard in range(place.shard, len(shards)):
            first_record, first_part = (place.record, place.part) if shard == place.shard else (0, 0)
            for record, parts in documents_of(shards[shard], self.options, self._left_out, first_record=first_record):
                number = first_part if record == first_record else 0
                parts = islice(parts, number, None)
                text = next(parts, None)
                while text is not None:
                    next_text = next(parts, None)
                    end = (shard, record + 1, 0) if next_text is None else (shard, record, number + 1)
                    yield Part(text, number == 0, next_text is None, end)
                    text, number = next_text, number + 1

    def _pack(self, texts: list[str], first_texts: list[int], place: Place, last: Part | None) -> Chunk:
        """The chunk of these texts, which begins at `place`; `last` is its last part, or None if the epoch ends."""
        options = self.options
        end = Place(epoch=place.epoch + 1, chunk=place.chunk + 1)
        account: Counter[str] = Counter()
        if not texts:
            nothing: np.ndarray = np.empty((0, options.block_size + 1), dtype=np.int32)
            return Chunk(nothing, nothing, account, end)
        encoded = encode_texts(texts, options.encode, vocab_size=options.vocab_size)
        bos, eos = (np.array([token_id], dtype=np.int32) for token_id in (options.bos_token_id, options.eos_token_id))
        documents = [
            np.concatenate([bos, *encoded[start:stop], eos])
            for start, stop in zip(first_texts, [*first_texts[1:], len(texts)])
        ]
        if place.token_id is not None:
            documents[0][0] = place.token_id
        if last is not None:
            if not last.ends_document:
                documents[-1] = documents[-1][:-1]
            token_id = None if last.ends_document else int(documents[-1][-1])
            end = Place(place.epoch, *last.end, token_id, place.chunk + 1)

        account["text_tokens"] = sum(map(len, encoded))
        account["documents"] = len(documents) - (end.token_id is not None)  # counted where they end
        order = permutation(len(documents), options.seed, DOCUMENTS, self.number, place.chunk)
        documents = [documents[index] for index in order]
        positions = np.concatenate([np.arange(len(document), dtype=np.int32) for document in documents])
        token_ids, positions = self._cut(np.concatenate(documents), positions, account)
        order = permutation(len(token_ids), options.seed, ROWS, self.number, place.chunk)
        return Chunk(token_ids[order], positions[order], account, end)

    def _cut(
        self, token_ids: np.ndarray, positions: np.ndarray, account: Counter[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Token ids and positions as rows (rows, T + 1), in the smallest types that hold them."""
        width = self.options.block_size + 1
        options = {"block_size": width - 1, "step": width - 1, "pad_token_id": self.options.pad_token_id}
        batches = cut_rows(iter([(token_ids, positions, True)]), account, **options)
        id_type, position_type = (
            np.uint16 if largest < 1 << 16 else np.int32 for largest in (self.options.vocab_size - 1, width - 1)
        )
        rows: list[np.ndarray] = [np.empty((0, width), id_type)]
        row_positions: list[np.ndarray] = [np.empty((0, width), position_type)]
        for some, some_positions, _ in batches:
            rows.append(some.astype(id_type))
            row_positions.append(some_positions.astype(position_type))
            account["rows"] += len(some)
            account["targets"] += int(np.count_nonzero(some_positions[:, 1:]))
        return np.concatenate(rows), np.concatenate(row_positions)


def documents_of(
    shard: Shard, options: ChunkOptions, account: dict[str, Any], *, first_record: int = 0
) -> Iterator[tuple[int, Iterator[str]]]:
    """Number and parts of each record to train on, from a given record on; the account counts the others."""
    for number, record in enumerate(_records(shard)):
        if number < first_record:
            continue
        told = {name: len(account[name]) for name in TOLD}
        is_used = is_good(record, account, on_bad_record=options.on_bad_record)
        for name, how in TOLD.items():
            for what in account[name][told[name] :]:  # the first ones only
                logger.warning(how, what)
        if not is_used:
            continue
        parts = cut_into_parts(record.text)
        first = next(parts, None)
        if first is None:
            account["empty_documents"] += 1
        elif options.held_out and digest(first) in options.held_out:
            account["held_out_documents"] += 1
        else:
            yield number, chain([first], parts)


def _records(shard: Shard) -> Iterator[Record]:
    try:
        yield from shard.records()
    except OSError as error:
        raise OSError(
            f"{shard.name} cannot be read: {error}. The stream needs the files that it began with. Put it back, "
            "or check the connection, and start again: the run resumes."
        ) from error


def new_account() -> dict[str, Any]:
    """What `documents_of` counts in."""
    return {**new_reading_account(), "held_out_documents": 0}


def digest(first_part: str) -> bytes:
    """A document's digest; two documents that begin with the same part are taken for the same."""
    return sha256(first_part.encode()).digest()[:16]


def permutation(num: int, *key: int) -> np.ndarray:
    """A pseudo-random order of 0 to num - 1 that depends on nothing but the key; see `sampler` for why it is so."""
    return np.argsort(np.random.PCG64(list(key)).random_raw(num), kind="stable")
