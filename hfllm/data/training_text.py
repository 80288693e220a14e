"""The rows that training steps read, prepared or streamed, and the rows to evaluate on."""

import contextlib
import datetime
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedTokenizerBase

from .corpus import (
    Corpus,
    count_documents,
    describe_held_out,
    held_out_by_file,
    load_corpus,
    num_shared_documents,
    split_documents,
)
from .encoding import join_encodings, num_cores
from .packing import Encoder, JoinedRows, Rows, complete_options, prepare_rows
from .prepared import (
    Preparation,
    Side,
    describe_prepared,
    find_prepared,
    open_prepared,
    side_name,
    validation_text,
)
from .sampler import rows_of_step
from .shards import Shards, find_shards, hold_out
from .sources import named_datasets
from .streaming import RowStream, merge_states


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingText:
    """The rows to train and to evaluate on.

    Attributes:
        train: Prepared rows, or a stream that has no end.
        validation: Prepared rows; none of their documents is trained on, unless they were given separately.
        fingerprint: sha256 of the text.
        tokenizer: The tokenizer that encoded the text.
        tokenizer_sha256: Its fingerprint.
        identity: The identity of the training rows, by name.
        summary: What was found, in words.
    """

    train: Rows | RowStream
    validation: Rows | JoinedRows
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase
    tokenizer_sha256: str
    identity: dict[str, Any]
    summary: str

    @property
    def validation_parts(self) -> dict[str, Rows]:
        """The validation rows of each text by its name, if several are reported separately; else an empty dict."""
        return self.validation.parts if isinstance(self.validation, JoinedRows) else {}

    def read_step(
        self, step: int, *, batch_size: int, accumulation: int, seed: int, accelerator: Accelerator
    ) -> tuple[list[dict[str, torch.Tensor]], int]:
        """This process's share of a step's rows, a batch per forward pass, and the number of targets of all processes.

        A step has batch_size * accumulation * num_processes rows: the same ones, however that product is cut. From a
        stream, steps are read in turn.
        """
        num_rows = batch_size * accumulation * accelerator.num_processes
        device = accelerator.device
        if isinstance(self.train, RowStream):
            share = send(self.train.take(num_rows), device)
            parts = {name: tensor.split(batch_size) for name, tensor in share.items()}
            batches = [{name: part[index] for name, part in parts.items()} for index in range(accumulation)]
            return batches, int(accelerator.reduce((share["shift_labels"] != -100).sum()))
        order = {"rows_per_step": num_rows, "num_rows": len(self.train), "seed": seed}
        cut = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
        [step_rows] = rows_of_step(step, **order)
        batches = [self.train.batch(rows) for rows in rows_of_step(step, **order, **cut, accumulation=accumulation)]
        return [send(batch, device) for batch in batches], int(self.train.num_targets[step_rows].sum())

    def state(self) -> dict[str, Any] | None:
        """Where a stream is, for a checkpoint; prepared rows need no state. To be called by every process."""
        if isinstance(self.train, RowStream):
            return merge_states(gather_object([self.train.state_dict()]))
        return None

    def close(self) -> None:
        """Stop reading ahead."""
        if isinstance(self.train, RowStream):
            self.train.close()

    def load_state(self, state: dict[str, Any] | None) -> None:
        if isinstance(self.train, RowStream):
            assert state is not None
            self.train.load_state_dict(state)


def send(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """The batch on a device; a GPU copies it from pinned memory while Python goes on."""
    if device.type != "cuda":
        return {name: tensor.to(device) for name, tensor in batch.items()}
    return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}


def prepare_text(
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    encode: Encoder,
    tokenizer_sha256: str,
    block_size: int,
    accelerator: Accelerator,
    seed: int = 0,
    streaming: bool = False,
    stride: int | None = None,
    cache_dir: str | None = None,
    **reading: Any,
) -> TrainingText:
    """Split the documents before anything else, then encode and cut them into rows; the main process does it for all.

    `reading` are the fields of `Reading` but `dataset`. With `streaming`, only the validation text is kept on the disk,
    and training text is read and encoded as it is needed. If `dataset` is a folder that `prepare_folder` made, here or
    on the Hub, its rows are used. `encode` and `tokenizer_sha256` are the tokenizer's encoder and fingerprint; the
    other options are as in `load_corpus`, `prepare_rows` and `RowStream`.

    Raises:
        ValueError: if there is nothing to evaluate on, or options exclude each other; says what to give.
    """
    options = Reading(dataset=dataset, **reading)
    own: dict[str, Any] = {"tokenizer": tokenizer, "tokenizer_sha256": tokenizer_sha256}
    with main_process_first(accelerator):
        is_prepared = find_prepared(dataset)
        if is_prepared and streaming:
            raise ValueError(f"{dataset!r} holds prepared rows, and streaming reads text. Leave streaming out.")
        if is_prepared:
            is_whole = accelerator.is_main_process
            asked_for = {"block_size": block_size, "stride": stride, **options.held_out}
            prepared = open_prepared(dataset, tokenizer_sha256=tokenizer_sha256, **asked_for, is_whole=is_whole)
            options.check_for_rows(prepared.record["description"]["reading"])
            fingerprint = prepared.record["made_from"]["corpus_sha256"]
            return _of_prepared_rows(prepared.sides, fingerprint, describe_prepared(prepared), **own)
    options.check()
    if streaming and stride is not None:
        raise ValueError("stride cuts prepared documents into windows; a stream is packed. Leave one of them out.")
    row_options = _row_options(tokenizer, block_size)

    def prepare(name: str, side: Side) -> Rows:
        return prepare_rows(
            side.documents,
            encode,
            **row_options,
            stride=stride,
            token_bytes=_token_bytes(tokenizer),
            key=side.key,
            allow_short=name != "train",
            cache_dir=cache_dir,
            progress=accelerator.is_main_process,
        )

    with main_process_first(accelerator):
        if streaming:
            shards, held_out, sides = _hold_out_of_stream(options, tokenizer_sha256, cache_dir)
        else:
            split = _split_text(options, tokenizer_sha256, cache_dir)
            sides = split.sides
        rows = {name: prepare(name, side) for name, side in sides.items()}
    if not streaming:
        return _of_prepared_rows(rows, split.corpus.fingerprint, split.summary(rows), **own)
    stream = RowStream(
        shards,
        encode,
        **row_options,
        key=tokenizer_sha256,
        seed=seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        held_out=held_out,
        on_bad_record=options.on_bad_record,
    )
    return TrainingText(
        train=stream,
        validation=_join_validation(rows),
        fingerprint=stream.identity["stream.sha256"],
        identity=stream.identity | {"tokenizer_sha256": tokenizer_sha256},
        summary=f"{shards.name}: {stream.summary()}{_describe_rows(rows)}",
        **own,
    )


def prepare_folder(
    output_dir: str | os.PathLike,
    dataset: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    encode: Encoder,
    tokenizer_sha256: str,
    block_size: int,
    accelerator: Accelerator,
    stride: int | None = None,
    cache_dir: str | None = None,
    part: tuple[int, int] | None = None,
    part_command: str,
    **reading: Any,
) -> bool:
    """Prepare rows as a folder that `prepare_text` uses as a dataset; True if it is complete.

    Every process encodes shards of the text on its share of the cores, and the main one cuts the rows. After an
    interruption the same call continues: shards that are there are kept. With `part=(number, num_parts)`, as for one of
    several machines, a part of the shards is encoded and no rows are cut; a call without it cuts them, and encodes what
    is missing. Each way makes the same files. `part_command` is the command that encodes a part, up to the part, for
    messages. The other options are as in `prepare_text`.

    Raises:
        ValueError: the folder holds something else, or rows of other options; a shard is missing.
    """
    options = Reading(dataset=dataset, **reading)
    options.check()
    if find_prepared(dataset):
        raise ValueError(f"The dataset {dataset!r} holds rows that are prepared already. Name the text.")
    row_options = complete_options(**_row_options(tokenizer, block_size), stride=stride)
    with main_process_first(accelerator):
        split = _split_text(options, tokenizer_sha256, cache_dir)
        made_from = {"corpus_sha256": split.corpus.fingerprint, "tokenizer_sha256": tokenizer_sha256}
        made_from |= row_options | options.held_out
        cut = row_options | {"token_bytes": _token_bytes(tokenizer)}
        preparation = Preparation(output_dir, split.sides, made_from=made_from, options=cut, part_command=part_command)
        is_begun = preparation.begin() if accelerator.is_main_process else None
    if not broadcast_object_list([is_begun])[0]:
        return True
    number, num_parts = part or (0, 1)
    start = time.perf_counter()
    with _waiting(accelerator) as wait:
        encoding = preparation.encode(
            encode,
            part=number * accelerator.num_processes + accelerator.process_index,
            num_parts=num_parts * accelerator.num_processes,
            num_workers=max(1, num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))),
            progress=accelerator.is_main_process,
        )
        wait()
    encodings = gather_object([encoding])
    accelerator.print(join_encodings(encodings, seconds=time.perf_counter() - start))
    with main_process_first(accelerator):
        if part is not None:
            accelerator.print(preparation.describe_missing() or "All shards are encoded: the rows can be cut.")
        elif accelerator.is_main_process:
            account = split.corpus.account
            about = {"name": ", ".join(named_datasets(dataset)), "reading": options.of_text}
            about |= {"documents": account["documents"], "bytes": account["bytes"]}
            preparation.finish(description=about, tokenizer=tokenizer)
    return part is None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What decides which text a run learns, and on which it is evaluated; by the names of `load_corpus`.

    The validation text is the `validation_dataset` (several, separated by commas, are reported by name), the
    `validation_split`, or else `validation_fraction` of the text; if that is the ends of a few long files, these are
    reported by name too.
    """

    dataset: str
    split: str = "train"
    validation_split: str | None = None
    validation_fraction: float = 0.0
    validation_dataset: str | None = None
    dataset_config: str | None = None
    text_column: str = "text"
    on_bad_record: str = "error"
    delimiter: str | None = None
    document_separator: str | None = None
    exclude: Iterable[str | os.PathLike] = ()

    def check(self) -> None:
        if self.validation_split is None and self.validation_dataset is None and not self.validation_fraction:
            raise ValueError(
                "There is nothing to evaluate on: give a validation_fraction, a validation_dataset or a "
                "validation_split."
            )
        if self.validation_split is not None and self.validation_dataset is not None:
            raise ValueError(
                "validation_split and validation_dataset both say what to evaluate on. Leave one of them out."
            )

    @property
    def of_text(self) -> dict[str, Any]:
        """The options that say how text is read."""
        names = ("dataset_config", "split", "text_column", "on_bad_record", "delimiter", "document_separator")
        return {name: getattr(self, name) for name in names}

    def check_for_rows(self, read_with: dict[str, Any]) -> None:
        """Refuse options for text where there are rows, unless the rows' text was read with them."""
        defaults = Reading(dataset=self.dataset).of_text
        for name, value in self.of_text.items():
            if value not in (defaults[name], read_with[name]):
                raise ValueError(
                    f"{self.dataset!r} holds prepared rows, whose text was read with {name}={read_with[name]}, and "
                    f"{name}={value} is asked for. Leave that out, or prepare the text again."
                )

    @property
    def held_out(self) -> dict[str, Any]:
        """What says which text is evaluated on, without the places of files."""
        apart = self.validation_dataset is not None or self.validation_split is not None
        texts = None if self.validation_dataset is None else list(named_datasets(self.validation_dataset))
        return {
            "validation_fraction": 0.0 if apart else self.validation_fraction,
            "validation_split": self.validation_split,
            "validation_texts": texts,
        }

    def key_of(self, side: str, corpus: Corpus, tokenizer_sha256: str) -> str:
        """The key of a side's rows, see `prepare_rows`."""
        return f"{corpus.fingerprint} {tokenizer_sha256} {side} {self.validation_fraction}"

    @property
    def place(self) -> dict[str, Any]:
        """Where text is, and how its records are read."""
        names = ("dataset_config", "text_column", "delimiter", "document_separator")
        return {name: getattr(self, name) for name in names} | {"exclude": list(self.exclude)}


@dataclass(frozen=True)
class _Split:
    """The corpus, its sides by their names, and in words what is held out of it."""

    corpus: Corpus
    sides: dict[str, Side]
    held_out: str | None

    def summary(self, rows: dict[str, Rows]) -> str:
        account = self.corpus.account
        held_out = "" if self.held_out is None else f"\n  held out: {self.held_out}"
        return (
            f"{account['name']}: {count_documents(account['documents'])}, {account['bytes']:,} bytes, sha256 "
            f"{self.corpus.fingerprint[:16]}{_describe_rows(rows)}{held_out}"
        )


def _split_text(options: Reading, tokenizer_sha256: str, cache_dir: str | None) -> _Split:
    """Read and split the text."""
    reading: dict[str, Any] = {"on_bad_record": options.on_bad_record, "cache_dir": cache_dir}

    def side(name: str, documents: datasets.Dataset, corpus: Corpus) -> Side:
        num_bytes = corpus.account["bytes"] * len(documents) // corpus.account["parts"]
        return Side(options.key_of(name, corpus, tokenizer_sha256), documents, num_bytes)

    given = _load_given(options, cache_dir)
    corpus = load_corpus(options.dataset, split=options.split, **options.place, **reading)
    if given:
        warn_of_shared_documents(corpus, given)
        sides = {"train": side("whole", corpus.documents, corpus)}
        sides |= {side_name(name): side("validation", text.documents, text) for name, text in given.items()}
        return _Split(corpus, sides, None)
    training, rest = split_documents(corpus, validation_fraction=options.validation_fraction)
    is_cut = corpus.account["documents"] > 1 and len(training) + len(rest) > len(corpus.documents)
    how = " cut" if is_cut else ""  # so that rows prepared before long documents were cut are not reused
    sides = {"train": side(f"train{how}", training, corpus)}
    for name, part in ((held_out_by_file(corpus, rest) if is_cut else {}) or {"": rest}).items():
        sides[side_name(name)] = side(f"validation{how} {name}".rstrip(), part, corpus)
    return _Split(corpus, sides, describe_held_out(corpus, rest))


def _hold_out_of_stream(
    options: Reading, tokenizer_sha256: str, cache_dir: str | None
) -> tuple[Shards, list[datasets.Dataset], dict[str, Side]]:
    """The shards of a stream, the documents to be left out of it, and the validation sides."""
    given = _load_given(options, cache_dir, from_stream=True)
    shards = find_shards(options.dataset, split=options.split, **options.place)
    if not given:
        given = {
            "": hold_out(
                shards,
                fraction=options.validation_fraction,
                on_bad_record=options.on_bad_record,
                cache_dir=cache_dir,
            )
        }
    sides = {
        side_name(name): Side(
            options.key_of("validation", text, tokenizer_sha256), text.documents, text.account["bytes"]
        )
        for name, text in given.items()
    }
    return shards, [text.documents for text in given.values()], sides


def _load_given(options: Reading, cache_dir: str | None, *, from_stream: bool = False) -> dict[str, Corpus]:
    """The texts to evaluate on that are not part of the others."""
    reading: dict[str, Any] = {"on_bad_record": options.on_bad_record, "cache_dir": cache_dir}
    if options.validation_split is not None:
        if from_stream:
            return {
                "": hold_out(find_shards(options.dataset, split=options.validation_split, **options.place), **reading)
            }
        return {"": load_corpus(options.dataset, split=options.validation_split, **options.place, **reading)}
    given = {} if options.validation_dataset is None else named_datasets(options.validation_dataset)
    where = options.place | {"dataset_config": None}
    return {name: load_corpus(each, **where, **reading) for name, each in given.items()}


def _row_options(tokenizer: PreTrainedTokenizerBase, block_size: int) -> dict[str, Any]:
    return {
        "block_size": block_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "vocab_size": len(tokenizer),
    }


def _token_bytes(tokenizer: PreTrainedTokenizerBase) -> Callable[[int], int]:
    return lambda token_id: len(tokenizer.convert_ids_to_tokens(token_id))  # a character a byte


def _of_prepared_rows(
    rows: dict[str, Rows], fingerprint: str, summary: str, *, tokenizer_sha256: str, **own: Any
) -> TrainingText:
    identity = {"corpus_sha256": fingerprint, "tokenizer_sha256": tokenizer_sha256, "rows": len(rows["train"])}
    return TrainingText(
        train=rows["train"],
        validation=_join_validation(rows),
        fingerprint=fingerprint,
        tokenizer_sha256=tokenizer_sha256,
        identity=identity,
        summary=summary,
        **own,
    )


def _join_validation(rows: dict[str, Rows]) -> Rows | JoinedRows:
    """The rows of the validation sides; those of several by the names of their texts."""
    parts = {validation_text(side): part for side, part in rows.items() if side != "train"}
    return JoinedRows(parts) if len(parts) > 1 else next(iter(parts.values()))


def _describe_rows(rows: dict[str, Rows]) -> str:
    return "".join(f"\n  {side.replace('_', ' ', 1)}: {part.summary()}" for side, part in rows.items())


@contextlib.contextmanager
def main_process_first(accelerator: Accelerator) -> Iterator[None]:
    """As `accelerator.main_process_first`, without a limit to how long the others wait.

    A large text takes longer than the processes' timeout, by which they notice each other's failure in training.
    """
    with _waiting(accelerator) as wait:
        if not accelerator.is_main_process:
            wait()
        yield
        if accelerator.is_main_process:
            wait()


@contextlib.contextmanager
def _waiting(accelerator: Accelerator) -> Iterator[Callable[[], None]]:
    """A function by which all processes wait for each other, without a limit. They enter the block together."""
    if accelerator.num_processes == 1:
        yield lambda: None
        return
    # gloo, because processes that wait by NCCL keep their GPUs busy. A process that dies ends the wait of the others.
    group = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=365))
    yield lambda: torch.distributed.barrier(group)
    torch.distributed.destroy_process_group(group)


def warn_of_shared_documents(corpus: Corpus, given: dict[str, Corpus]) -> None:
    for other in given.values():
        if num_shared := num_shared_documents(corpus, other):
            logger.warning(
                "%s of the %s to evaluate on in %r are trained on too, so their loss flatters.",
                f"{num_shared:,}",
                count_documents(other.account["documents"]),
                other.account["name"],
            )
