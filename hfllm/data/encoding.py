"""Documents encoded in shards: by several processes, on several machines, each shard once.

A shard is a range of a text's parts. Which ranges there are depends on the text alone, so it does not matter who
encodes which of them, and a shard that is there is not encoded again. Rows are cut from the shards in their order, as
from the whole text (see `packing`): that takes a fortieth of one core's time to encode it.

    encoded/train-00003/
        data.arrow      token ids of some text at a time, and where among them documents begin
        account.json    documents, bytes and tokens, and checksums (see `cache`)
"""

import itertools
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets.utils import tqdm

from .cache import find_made, made_once
from .packing import Encoded, Encoder, encode_documents


FORMAT_VERSION = 1  # increase it when the same text would give other shards
NUM_SHARDS = 256  # of a text, unless they would be smaller or larger than this:
LEAST_SHARD_BYTES, MOST_SHARD_BYTES = 1 << 20, 32 << 20
BATCH_BYTES = 1 << 20  # text that a process encodes at a time


@dataclass(frozen=True)
class TextShard:
    """A range of the parts of some documents, and the folder for their token ids."""

    name: str
    documents: datasets.Dataset
    parts: range
    folder: Path


@dataclass(frozen=True)
class Encoding:
    """What was encoded, and how fast."""

    num_shards: int
    num_found: int
    num_bytes: int
    seconds: float
    num_cores: int

    def __str__(self) -> str:
        found = f", {self.num_found:,} of them before" if self.num_found else ""
        text = f"Encoded {self.num_shards:,} shard{'s' * (self.num_shards != 1)}{found}"
        if not self.num_bytes:
            return f"{text}."
        speed = self.num_bytes / self.seconds / 1e6
        cores = "1 core" if self.num_cores == 1 else f"{self.num_cores:,} cores"
        each = "" if self.num_cores == 1 else f" ({speed / self.num_cores:,.2f} each)"
        return f"{text}: {self.num_bytes:,} bytes in {self.seconds:,.1f} s on {cores}, {speed:,.2f} MB/s{each}."


def join_encodings(encodings: list[Encoding], *, seconds: float) -> Encoding:
    """What several processes encoded at the same time."""
    names = ("num_shards", "num_found", "num_bytes", "num_cores")
    return Encoding(**{name: sum(getattr(each, name) for each in encodings) for name in names}, seconds=seconds)


def num_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cut_into_shards(documents: datasets.Dataset, num_bytes: int, *, name: str, folder: Path) -> list[TextShard]:
    """Shards of about equal size; `num_bytes` is the size of the text that the documents are from."""
    shard_bytes = min(MOST_SHARD_BYTES, max(LEAST_SHARD_BYTES, num_bytes // NUM_SHARDS))
    num_shards = min(len(documents), max(1, num_bytes // shard_bytes))
    # Parts of equal number, not of equal bytes: long documents are cut into parts and the others are in random order.
    ends = [len(documents) * number // num_shards for number in range(num_shards + 1)]
    return [
        TextShard(f"{name}-{number:05d}", documents, range(start, end), folder / f"{name}-{number:05d}")
        for number, (start, end) in enumerate(itertools.pairwise(ends))
    ]


def encode_shards(
    shards: list[TextShard],
    encode: Encoder,
    *,
    vocab_size: int,
    num_workers: int | None = None,
    progress: bool = False,
) -> Encoding:
    """Encode the shards that are not there yet, each whole or not at all, in a process for each of this one's cores.

    Raises:
        RuntimeError: a process was killed, e.g. for lack of memory.
    """
    missing = [shard for shard in shards if find_made(shard.folder) is None]
    cores = num_workers or num_cores()
    num_workers = max(1, min(cores, len(missing)))
    start, num_bytes = time.perf_counter(), 0
    with tqdm(desc="Text to tokens", unit="B", unit_scale=True, disable=not progress) as bar:
        for encoded in _encode_all(missing, encode, vocab_size, num_workers):
            num_bytes += encoded
            bar.update(encoded)
    seconds = time.perf_counter() - start
    # A single process encodes by threads of the tokenizers library, as many as there are cores.
    used = cores if num_workers == 1 else num_workers
    return Encoding(len(shards), len(shards) - len(missing), num_bytes, seconds, used)


def _encode_all(shards: list[TextShard], encode: Encoder, vocab_size: int, num_workers: int) -> Iterator[int]:
    """Encode the shards; yields the bytes of each when it is written."""
    if num_workers == 1:
        yield from (_encode_shard(shard, encode, vocab_size) for shard in shards)
        return
    # As DataLoader and `datasets` do it: a forked process has the libraries already, and shares their memory.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(
        num_workers, mp_context=context, initializer=_begin_work, initargs=(shards, encode, vocab_size, os.getpid())
    ) as pool:
        futures = [pool.submit(_encode_number, number) for number in range(len(shards))]
        try:
            for future in as_completed(futures):
                if (error := future.exception()) is None:
                    yield future.result()
                elif isinstance(error, BrokenProcessPool):
                    raise RuntimeError(
                        "A process that encoded text was killed, perhaps for lack of memory. The same command encodes "
                        f"what is missing; {num_workers:,} processes were at work, and fewer cores need less memory."
                    ) from error
                else:
                    raise error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_work: tuple[list[TextShard], Encoder, int]  # of a process of `_encode_all`


def _begin_work(shards: list[TextShard], encode: Encoder, vocab_size: int, parent: int) -> None:
    global _work
    _work = shards, encode, vocab_size
    # This process is one of as many as there are cores; and threads of the library do not outlive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _encode_number(number: int) -> int:
    shards, encode, vocab_size = _work
    return _encode_shard(shards[number], encode, vocab_size)


def _encode_shard(shard: TextShard, encode: Encoder, vocab_size: int) -> int:
    """Encode a shard, unless another process did so meanwhile; returns the bytes of its text."""
    first = shard.parts.start
    before = shard.documents[first - 1]["document"] if first else None

    def write(path: Path) -> dict[str, Any]:
        account: Counter[str] = Counter()
        options: dict[str, Any] = {"vocab_size": vocab_size, "last_document": before, "batch_bytes": BATCH_BYTES}
        encoded = encode_documents(shard.documents.select(shard.parts), encode, account, **options)
        ids = pa.uint16() if vocab_size <= 1 << 16 else pa.int32()
        schema = pa.schema([("token_ids", pa.large_list(ids)), ("first_tokens", pa.large_list(pa.int64()))])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for arrays in encoded:
                lists = [
                    pa.LargeListArray.from_arrays(pa.array([0, len(array)], pa.int64()), pa.array(array, kind))
                    for array, kind in zip(arrays, (ids, pa.int64()))
                ]
                writer.write_batch(pa.record_batch(lists, schema=schema))
        return dict(account)

    return made_once(shard.folder, write)[1]["text_bytes"]


def missing_shards(shards: list[TextShard]) -> list[int]:
    """The numbers of the shards that are not encoded, or damaged."""
    return [number for number, shard in enumerate(shards) if find_made(shard.folder) is None]


def read_shards(shards: list[TextShard], account: Counter[str]) -> Encoded:
    """The token ids of encoded shards, as `encode_documents` gives them; the account counts the text."""
    for shard in shards:
        found = find_made(shard.folder)
        if found is None:
            raise FileNotFoundError(
                f"The encoded shard {shard.folder} is missing, or has changed since it was written. The same command "
                "encodes it again."
            )
        dataset, counts = found
        account.update(counts)
        columns = [dataset.data.column(name).chunks for name in ("token_ids", "first_tokens")]
        for token_ids, first_tokens in zip(*columns):
            ids, firsts = (chunk.flatten().to_numpy() for chunk in (token_ids, first_tokens))
            yield ids.astype(np.int32), firsts
