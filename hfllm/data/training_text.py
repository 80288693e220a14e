"""The rows that training steps read, prepared or streamed, and the rows to evaluate on."""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
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
from .packing import Encoder, JoinedRows, Rows, prepare_rows
from .sampler import rows_of_step
from .shards import find_shards, hold_out
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
    split: str = "train",
    validation_split: str | None = None,
    validation_fraction: float = 0.0,
    validation_dataset: str | None = None,
    dataset_config: str | None = None,
    text_column: str = "text",
    on_bad_record: str = "error",
    delimiter: str | None = None,
    document_separator: str | None = None,
    exclude: Iterable[str | os.PathLike] = (),
    cache_dir: str | None = None,
) -> TrainingText:
    """Split the documents before anything else, then encode and cut them into rows; the main process does it for all.

    The validation text is the `validation_dataset` (several, separated by commas, are reported by name), the
    `validation_split`, or else `validation_fraction` of the text; if that is the ends of a few long files, these are
    reported by name too. With `streaming`, only the validation text is kept on the disk, and training text is read and
    encoded as it is needed. `encode` and `tokenizer_sha256` are the tokenizer's encoder and fingerprint; the other
    options are as in `load_corpus`, `prepare_rows` and `RowStream`.

    Raises:
        ValueError: if there is nothing to evaluate on, or options exclude each other; says what to give.
    """
    if validation_split is None and validation_dataset is None and not validation_fraction:
        raise ValueError(
            "There is nothing to evaluate on: give a validation_fraction, a validation_dataset or a validation_split."
        )
    if validation_split is not None and validation_dataset is not None:
        raise ValueError("validation_split and validation_dataset both say what to evaluate on. Leave one of them out.")
    if streaming and stride is not None:
        raise ValueError("stride cuts prepared documents into windows; a stream is packed. Leave one of them out.")
    place: dict[str, Any] = {"dataset_config": dataset_config, "text_column": text_column, "exclude": list(exclude)}
    place |= {"delimiter": delimiter, "document_separator": document_separator}
    reading: dict[str, Any] = {"on_bad_record": on_bad_record, "cache_dir": cache_dir}
    row_options = {
        "block_size": block_size,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        "vocab_size": len(tokenizer),
    }

    def prepare(name: str, documents: datasets.Dataset, corpus: Corpus) -> Rows:
        return prepare_rows(
            documents,
            encode,
            **row_options,
            stride=stride,
            token_bytes=lambda token_id: len(tokenizer.convert_ids_to_tokens(token_id)),  # a character a byte
            key=f"{corpus.fingerprint} {tokenizer_sha256} {name} {validation_fraction}",
            allow_short=name.startswith("validation"),
            cache_dir=cache_dir,
            progress=accelerator.is_main_process,
        )

    def load_given() -> dict[str, Corpus]:
        """The texts to evaluate on that are not part of the others."""
        if validation_split is not None:
            if streaming:
                return {"": hold_out(find_shards(dataset, split=validation_split, **place), **reading)}
            return {"": load_corpus(dataset, split=validation_split, **place, **reading)}
        given = named_datasets(validation_dataset) if validation_dataset is not None else {}
        where = place | {"dataset_config": None}
        return {name: load_corpus(each, **where, **reading) for name, each in given.items()}

    with accelerator.main_process_first():
        given = load_given()
        parts = {name: prepare("validation", corpus.documents, corpus) for name, corpus in given.items()}
        held_out = [corpus.documents for corpus in given.values()]
        if streaming:
            shards = find_shards(dataset, split=split, **place)
            if not given:
                corpus = hold_out(shards, fraction=validation_fraction, **reading)
                held_out, parts = [corpus.documents], {"": prepare("validation", corpus.documents, corpus)}
        else:
            corpus = load_corpus(dataset, split=split, **place, **reading)
            if given:
                rows = prepare("whole", corpus.documents, corpus)
                warn_of_shared_documents(corpus, given)
            else:
                training, rest = split_documents(corpus, validation_fraction=validation_fraction)
                is_cut = corpus.account["documents"] > 1 and len(training) + len(rest) > len(corpus.documents)
                how = " cut" if is_cut else ""  # so that rows prepared before long documents were cut are not reused
                rows = prepare(f"train{how}", training, corpus)
                named = held_out_by_file(corpus, rest) if is_cut else {}
                held_out = [rest]
                parts = {
                    name: prepare(f"validation{how} {name}".rstrip(), part, corpus)
                    for name, part in (named or {"": rest}).items()
                }
    validation = JoinedRows(parts) if len(parts) > 1 else next(iter(parts.values()))
    described = "".join(f"\n  {f'validation {name}'.strip()}: {rows.summary()}" for name, rows in parts.items())

    if not streaming:
        account = corpus.account
        if not given:
            described += f"\n  held out: {describe_held_out(corpus, held_out[0])}"
        return TrainingText(
            train=rows,
            validation=validation,
            fingerprint=corpus.fingerprint,
            tokenizer=tokenizer,
            tokenizer_sha256=tokenizer_sha256,
            identity={"corpus_sha256": corpus.fingerprint, "tokenizer_sha256": tokenizer_sha256, "rows": len(rows)},
            summary=f"{account['name']}: {count_documents(account['documents'])}, {account['bytes']:,} bytes, sha256 "
            f"{corpus.fingerprint[:16]}\n  train: {rows.summary()}{described}",
        )
    stream = RowStream(
        shards,
        encode,
        **row_options,
        key=tokenizer_sha256,
        seed=seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        held_out=held_out,
        on_bad_record=on_bad_record,
    )
    return TrainingText(
        train=stream,
        validation=validation,
        fingerprint=stream.identity["stream.sha256"],
        tokenizer=tokenizer,
        tokenizer_sha256=tokenizer_sha256,
        identity=stream.identity | {"tokenizer_sha256": tokenizer_sha256},
        summary=f"{shards.name}: {stream.summary()}{described}",
    )


def warn_of_shared_documents(corpus: Corpus, given: dict[str, Corpus]) -> None:
    for other in given.values():
        if num_shared := num_shared_documents(corpus, other):
            logger.warning(
                "%s of the %s to evaluate on in %r are trained on too, so their loss flatters.",
                f"{num_shared:,}",
                count_documents(other.account["documents"]),
                other.account["name"],
            )
