"""An endless stream of rows from shards, for text that is larger than the disk.

The stream is read in lanes. In each epoch the shards are shuffled and dealt to the lanes, and each lane reads its own
(see `lanes`). Row p of the stream is the next one of lane p % num_lanes, and belongs to process p % num_processes.

So the stream is a pure function of the text, the seed and the number of lanes, whatever number of processes reads it. A
process opens only the lanes that its rows come from, and one shard of each at a time.
"""

import functools
import heapq
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import datasets
import numpy as np
import torch

from .lanes import ACCOUNT, ChunkOptions, Lane, digest, documents_of, new_account, permutation
from .packing import Encoder, as_batch, complete_options
from .shards import FORMAT_VERSION as SHARDS_VERSION
from .shards import Shard, Shards


logger = logging.getLogger(__name__)

FORMAT_VERSION = 1  # part of the identity: increase it when the same text would give another stream
NUM_LANES = 16  # texts from this many places mix in a step, and at most this many processes share them
CHUNK_BYTES = 1 << 20
MOST_NAMED_FILES = 256
SHARDS = 3  # what is shuffled: part of the seed


class RowStream:
    """An endless stream of rows of block_size + 1 ids, in a new order each epoch; `take` gives a process its share.

    `shards` comes from `find_shards`. `held_out` are sets of documents to leave out wherever they appear, such as those
    of `hold_out`. The options from `block_size` to `key` are as in `prepare_rows`.

    A stream resumes exactly from its `state_dict`, on any number of processes up to the number of shards. By default a
    chunk has CHUNK_BYTES of text, or the text of some 256 rows if that is more, so that padding its last row takes at
    most 0.2 % of the tokens. Memory holds a chunk and a half for each lane of the process, at most 8 bytes per token.
    With `prefetch`, a thread reads and encodes ahead; without it, some steps wait for that.
    """

    def __init__(
        self,
        shards: Shards,
        encode: Encoder,
        *,
        block_size: int,
        bos_token_id: int | None,
        eos_token_id: int,
        pad_token_id: int,
        vocab_size: int,
        key: str,
        seed: int,
        process_index: int = 0,
        num_processes: int = 1,
        held_out: Sequence[datasets.Dataset] = (),
        on_bad_record: str = "error",
        chunk_bytes: int | None = None,
        num_lanes: int | None = None,
        prefetch: bool = True,
    ):
        row_options = complete_options(
            block_size=block_size,
            stride=None,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            vocab_size=vocab_size,
        )
        del row_options["stride"]
        if on_bad_record not in ("error", "skip"):
            raise ValueError(f"on_bad_record={on_bad_record!r}: it is either 'error' or 'skip'.")
        if chunk_bytes is None:
            chunk_bytes = max(CHUNK_BYTES, 1024 * block_size)  # English has some 4 bytes per token
        elif chunk_bytes < 1:
            raise ValueError(f"chunk_bytes={chunk_bytes}: give at least 1.")
        self.shards, self.block_size = shards, block_size
        self.process_index, self.num_processes = process_index, num_processes
        num_lanes = self._check_processes(num_lanes)

        digests = frozenset[bytes]().union(*map(_first_part_digests, held_out))
        self.options = ChunkOptions(
            encode,
            **row_options,
            seed=seed,
            chunk_bytes=chunk_bytes,
            on_bad_record=on_bad_record,
            held_out=digests,
        )
        options = {"key": key, "seed": seed, **row_options}
        options |= {"chunk_bytes": chunk_bytes, "held_out": sha256(b"".join(sorted(digests))).hexdigest()[:16]}
        self.identity = _identity_of(shards) | {f"stream.{name}": value for name, value in options.items()}
        self.position = 0  # of the next row of all processes together
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="row-stream") if prefetch else None
        self._set_lanes(num_lanes)

    def _check_processes(self, num_lanes: int | None) -> int:
        """The number of lanes, if it and the number of processes are possible."""
        num_shards, num_processes = len(self.shards.shards), self.num_processes
        if not 0 <= self.process_index < num_processes:
            raise ValueError(f"process_index={self.process_index}, but num_processes={num_processes}.")
        if num_shards < num_processes:
            raise ValueError(
                f"{self.shards.name!r} has {num_shards:,} shards, and {num_processes:,} processes are to read it: each "
                f"needs a shard of its own. Start at most {num_shards:,}, or write the text into more files; a local "
                ".jsonl of some size and the row groups of a .parquet are cut by themselves. With `datasets`: "
                f"for n in range({num_processes}): table.shard({num_processes}, n).to_parquet(f'part-{{n:03}}.parquet')"
            )
        if num_lanes is None:
            num_lanes = num_processes
            while 2 * num_lanes <= min(NUM_LANES, num_shards):
                num_lanes *= 2
        if not 1 <= num_lanes <= num_shards:
            raise ValueError(f"num_lanes={num_lanes}: from 1 to the number of shards, {num_shards:,}.")
        return num_lanes

    def take(self, num_rows: int) -> dict[str, torch.Tensor]:
        """The process's share of the stream's next `num_rows` rows, (num_rows / num_processes, T); see `Rows.batch`.

        All processes take the same numbers of rows. A step's rows are taken at once or in several micro-batches: they
        are the same rows, however they are cut.
        """
        if num_rows < 1 or num_rows % self.num_processes:
            raise ValueError(
                f"{num_rows} rows cannot be cut evenly among {self.num_processes} processes: choose a multiple of "
                f"{self.num_processes}."
            )
        marks = {number: lane.mark for number, lane in self._lanes.items()}
        first = self.position + (self.process_index - self.position) % self.num_processes
        own = range(first, self.position + num_rows, self.num_processes)
        rows: np.ndarray = np.empty((2, len(own), self.block_size + 1), dtype=np.int64)
        try:
            for row, position in enumerate(own):
                rows[:, row] = self._lanes[position % self.num_lanes].row(position // self.num_lanes)
        except BaseException:  # also if it is interrupted: all of these rows are taken, or none
            self._set_lanes(self.num_lanes)
            for number, mark in marks.items():
                self._lanes[number].mark = mark
            raise
        self.position += num_rows
        return as_batch(*rows)

    @property
    def epoch(self) -> int:
        """The epoch of the slowest lane of this process; a lane that got less text may be in the next one already."""
        return min(lane.place.epoch for lane in self._lanes.values())

    @property
    def account(self) -> dict[str, int]:
        """What became of the text of all chunks that rows were taken from, by this process's lanes; see ACCOUNT."""
        total: Counter[str] = Counter()
        for lane in self._lanes.values():
            total.update(lane.account)
            if lane.chunk is not None:
                total.update(lane.chunk.account)
        return {name: total[name] for name in ACCOUNT}

    def summary(self) -> str:
        """What is read, and how, in words."""
        size = f" of {self.shards.num_bytes:,} bytes" if self.shards.num_bytes else ""
        return (
            f"{len(self.shards.shards):,} shards{size}, in {self.num_lanes} lanes that are shuffled by "
            f"{self.options.chunk_bytes:,} bytes -> rows of {self.block_size} + 1"
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, in types that JSON knows; `merge_states` makes one of those of several processes."""
        lanes = {str(number): lane.state() for number, lane in self._lanes.items()}
        state = {"position": self.position, "num_lanes": self.num_lanes, "lanes": lanes}
        return {**state, "identity": self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume exactly where a stream of the same text and options was, on any number of processes."""
        saved = state["identity"]
        differences = [
            f"    {name}: {saved.get(name)!r} then, {self.identity.get(name)!r} now"
            for name in saved | self.identity
            if saved.get(name) != self.identity.get(name)
        ]
        if differences:
            raise ValueError(
                "This is the state of another stream:\n" + "\n".join(differences) + "\n"
                "Resume with the text and the options that it was made with, or start again."
            )
        missing = [str(lane) for lane in self._own_lanes(state["num_lanes"]) if str(lane) not in state["lanes"]]
        if missing:
            raise ValueError(
                f"The state has no lane {', '.join(missing)} of {state['num_lanes']}: it comes from a single process. "
                "Join those of all processes by merge_states."
            )
        self.position = state["position"]
        self._set_lanes(state["num_lanes"])
        for number, lane in self._lanes.items():
            lane.load_state(state["lanes"][str(number)])

    def close(self) -> None:
        """Stop reading ahead."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)

    def _own_lanes(self, num_lanes: int) -> list[int]:
        """The lanes that this process's rows come from."""
        positions = range(self.process_index, math.lcm(num_lanes, self.num_processes), self.num_processes)
        return sorted({position % num_lanes for position in positions})

    def _set_lanes(self, num_lanes: int) -> None:
        """All lanes at their beginning."""
        if num_lanes % self.num_processes and self.process_index == 0:
            times = self.num_processes // math.gcd(num_lanes, self.num_processes)
            logger.warning(
                "%d processes cannot share %d lanes evenly, so each lane is read and encoded by %d of them: right, but "
                "slower than with a number of processes that divides %d.",
                *(self.num_processes, num_lanes, times, num_lanes),
            )
        self.num_lanes = num_lanes
        # A new function each time, because the thread may still be making a chunk for the previous lanes.
        deal = functools.lru_cache(maxsize=4)(functools.partial(self._deal, num_lanes))  # lanes differ in their epochs

        def shards_of(number: int) -> Callable[[int], list[Shard]]:
            return lambda epoch: deal(epoch)[number]

        self._lanes = {
            number: Lane(
                number,
                self.options,
                shards_of(number),
                first_share=(number + 1) / num_lanes,
                check_text=self._check_text,
                worker=self._worker,
            )
            for number in self._own_lanes(num_lanes)
        }

    def _deal(self, num_lanes: int, epoch: int) -> list[list[Shard]]:
        """The shards of each lane in an epoch: taken in a new order, each goes to the lane that has least so far."""
        lanes: list[list[Shard]] = [[] for _ in range(num_lanes)]
        sizes = [(0, number) for number in range(num_lanes)]
        for index in permutation(len(self.shards.shards), self.options.seed, SHARDS, epoch):
            shard = self.shards.shards[index]
            num_bytes, number = heapq.heappop(sizes)
            lanes[number].append(shard)
            heapq.heappush(sizes, (num_bytes + shard.num_bytes, number))
        return lanes

    def _check_text(self) -> None:
        """Raise an error if no shard has anything to train on: a lane would search forever."""
        account = new_account()
        if any(True for shard in self.shards.shards for _ in documents_of(shard, self.options, account)):
            return
        examples = account["bad_record_examples"]
        first = f" The first bad record: {examples[0]}." if examples else ""
        raise ValueError(
            f"{self.shards.name!r} has no text to train on: {account['empty_documents']:,} documents are empty, "
            f"{account['held_out_documents']:,} are held back for validation, and {account['bad_records']:,} records "
            f"are bad.{first} Name another text_column, hold less back, or give more text."
        )


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The state of the whole stream from those of all processes, each of which knows its own lanes."""
    if len({(state["position"], state["num_lanes"]) for state in states}) != 1:
        raise ValueError(f"The processes are at different rows: {[state['position'] for state in states]}.")
    lanes: dict[str, dict[str, Any]] = {}
    for state in states:
        for number, lane in state["lanes"].items():
            # Two processes that share a lane may be in different chunks of it; from the later one, less is read again.
            if number not in lanes or lane["first_row"] > lanes[number]["first_row"]:
                lanes[number] = lane
    return {**states[0], "lanes": {number: lanes[number] for number in sorted(lanes, key=int)}}


def _identity_of(shards: Shards) -> dict[str, Any]:
    """The identity of the text; files are named if there are only a few."""
    contents = sha256(repr((shards.contents, shards.text_column)).encode()).hexdigest()
    identity = {
        "stream.format_version": f"{FORMAT_VERSION}.{SHARDS_VERSION}",
        "stream.files": len(shards.contents),
        "stream.shards": len(shards.shards),
        "stream.bytes": shards.num_bytes,
        "stream.sha256": contents,
        **{f"stream.{name}": value for name, value in shards.reading.items()},
    }
    if len(shards.contents) <= MOST_NAMED_FILES:
        identity |= {f"stream.file.{name}": what for name, what in shards.contents}
    return identity


def _first_part_digests(documents: datasets.Dataset) -> frozenset[bytes]:
    """A digest of each document of a corpus."""
    digests = set()
    last = None
    for row in documents:
        if row["document"] != last:
            digests.add(digest(row["text"]))
        last = row["document"]
    return frozenset(digests)
