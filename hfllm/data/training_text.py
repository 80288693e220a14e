"""Text to what a training step reads, from prepared rows or from a stream, and the rows to evaluate on."""

from dataclasses import dataclass
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from .corpus import Corpus, count_documents, load_corpus, split_documents
from .packing import Encoder, Rows, prepare_rows
from .sampler import rows_of_step
from .shards import find_shards, hold_out
from .streaming import RowStream, merge_states


@dataclass(frozen=True)
class TrainingText:
    """The rows to train and to evaluate on.

    Attributes:
        train: Prepared rows, or a stream that has no end.
        validation: Prepared rows; none of their documents is trained on.
        fingerprint: sha256 of the text.
        tokenizer: What encoded them.
        tokenizer_sha256: Its fingerprint.
        identity: What tells these training rows from others, by name.
        summary: What was found, for people.
    """

    train: Rows | RowStream
    validation: Rows
    fingerprint: str
    tokenizer: PreTrainedTokenizerBase
    tokenizer_sha256: str
    identity: dict[str, Any]
    summary: str

    def read_step(
        self, step: int, *, batch_size: int, accumulation: int, seed: int, accelerator: Accelerator
    ) -> tuple[list[dict[str, torch.Tensor]], int]:
        """This process's share of a step's rows, a batch for each forward pass, and the targets of all processes.

        A step has batch_size * accumulation * num_processes rows: the same ones, however that product is cut. From a
        stream, steps are read in turn.
        """
        num_rows = batch_size * accumulation * accelerator.num_processes
        device = accelerator.device
        if isinstance(self.train, RowStream):
            share = {name: tensor.to(device) for name, tensor in self.train.take(num_rows).items()}
            parts = {name: tensor.split(batch_size) for name, tensor in share.items()}
            batches = [{name: part[index] for name, part in parts.items()} for index in range(accumulation)]
            return batches, int(accelerator.reduce((share["shift_labels"] != -100).sum()))
        order = {"rows_per_step": num_rows, "num_rows": len(self.train), "seed": seed}
        cut = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
        [step_rows] = rows_of_step(step, **order)
        batches = [self.train.batch(rows) for rows in rows_of_step(step, **order, **cut, accumulation=accumulation)]
        batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches]
        return batches, int(self.train.num_targets[step_rows].sum())

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
    split: str = "train",
    validation_split: str | None = None,
    validation_fraction: float = 0.0,
    dataset_config: str | None = None,
    text_column: str = "text",
    on_bad_record: str = "error",
    cache_dir: str | None = None,
) -> TrainingText:
    """Split the documents before anything else, then encode and cut them into rows; the main process does it for all.

    With `streaming`, only what is evaluated on (see `hold_out`) is kept on the disk, and training text is read and
    encoded as it is needed. `encode` and `tokenizer_sha256` are the tokenizer's encoder and fingerprint; the other
    options are those of `load_corpus`, `prepare_rows` and `RowStream`.

    Raises:
        ValueError: if there is nothing to evaluate on, or options exclude each other; says what to give.
    """
    if validation_split is None and not validation_fraction:
        raise ValueError("There is nothing to evaluate on: give a --validation_fraction or --validation_split.")
    if streaming and stride is not None:
        raise ValueError("--stride cuts prepared documents into windows; a stream is packed. Leave one of them out.")
    place: dict[str, Any] = {"dataset_config": dataset_config, "text_column": text_column}
    reading: dict[str, Any] = {"on_bad_record": on_bad_record, "cache_dir": cache_dir}
    row_options = {
        "block_size": block_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "vocab_size": len(tokenizer),
    }

    def load(split: str) -> Corpus:
        return load_corpus(dataset, split=split, **place, **reading)

    def prepare(name: str, documents: datasets.Dataset, corpus: Corpus) -> Rows:
        return prepare_rows(
            documents,
            encode,
            **row_options,
            stride=stride,
            token_bytes=lambda token_id: len(tokenizer.convert_ids_to_tokens(token_id)),  # a character a byte
            key=f"{corpus.fingerprint} {tokenizer_sha256} {name} {validation_fraction}",
            allow_short=name == "validation",
            cache_dir=cache_dir,
            progress=accelerator.is_main_process,
        )

    if not streaming:
        with accelerator.main_process_first():
            corpus = load(split)
            if validation_split is None:
                train, held_out = split_documents(corpus, validation_fraction=validation_fraction)
                rows = prepare("train", train, corpus)
                validation = prepare("validation", held_out, corpus)
            else:
                other = load(validation_split)
                rows = prepare("whole", corpus.documents, corpus)
                validation = prepare("validation", other.documents, other)
        account = corpus.account
        return TrainingText(
            train=rows,
            validation=validation,
            fingerprint=corpus.fingerprint,
            tokenizer=tokenizer,
            tokenizer_sha256=tokenizer_sha256,
            identity={"corpus_sha256": corpus.fingerprint, "tokenizer_sha256": tokenizer_sha256, "rows": len(rows)},
            summary=f"{account['name']}: {count_documents(account['documents'])}, {account['bytes']:,} bytes, sha256 "
            f"{corpus.fingerprint[:16]}\n  train: {rows.summary()}\n  validation: {validation.summary()}",
        )

    with accelerator.main_process_first():
        shards = find_shards(dataset, split=split, **place)
        if validation_split is None:
            corpus = hold_out(shards, fraction=validation_fraction, **reading)
        else:
            corpus = hold_out(find_shards(dataset, split=validation_split, **place), **reading)
        validation = prepare("validation", corpus.documents, corpus)
    stream = RowStream(
        shards,
        encode,
        **row_options,
        key=tokenizer_sha256,
        seed=seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        held_out=corpus.documents,
        on_bad_record=on_bad_record,
    )
    return TrainingText(
        train=stream,
        validation=validation,
        fingerprint=stream.identity["stream.sha256"],
        tokenizer=tokenizer,
        tokenizer_sha256=tokenizer_sha256,
        identity=stream.identity | {"tokenizer_sha256": tokenizer_sha256},
        summary=f"{shards.name}: {stream.summary()}\n  validation: {validation.summary()}",
    )
