"""The loss on held-out rows: a sum over tokens divided by their count, for any batch size and number of processes."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn


class Rows(Protocol):
    """Fixed rows with random access, such as `hfllm.data` prepares."""

    num_bytes: int  # UTF-8 bytes of the text that all targets together encode

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray, *, count_once: bool = False) -> dict[str, torch.Tensor]:
        """`input_ids`, `position_ids` and `shift_labels`, (B, T) each; a label is the next token, or -100."""
        ...


@dataclass
class Evaluation:
    loss: float  # nats per token
    num_tokens: int
    num_bytes: int
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf  # exp(710) overflows

    @property
    def bits_per_byte(self) -> float:
        """The loss per byte of text instead of per token, comparable between models with different tokenizers."""
        return self.loss * self.num_tokens / self.num_bytes / math.log(2)


def evaluate_rows(model: nn.Module, rows: Rows, *, batch_size: int, accelerator: Accelerator) -> Evaluation:
    """Score every target of `rows` once, cut among the processes; each process gets the numbers of all.

    A mean of batch means depends on the batches if their numbers of targets differ, and a process that repeats rows to
    fill its share counts them twice. Here only sums are exchanged: the result is the same, up to rounding in the
    logits, for any batch size and any number of processes.
    """
    if len(rows) == 0 or rows.num_bytes <= 0:
        raise ValueError(
            f"There is nothing to evaluate: {len(rows):,} rows of {rows.num_bytes:,} bytes of text. "
            "Give more held-out text, or a shorter block_size."
        )
    start = time.perf_counter()
    loss, num_tokens = score_rows(model, rows, np.arange(len(rows)), batch_size=batch_size, accelerator=accelerator)
    return Evaluation(loss, num_tokens, rows.num_bytes, seconds=time.perf_counter() - start)


def join_evaluations(parts: Iterable[Evaluation]) -> Evaluation:
    """The evaluation of several texts as one: each token has the same weight."""
    parts = list(parts)
    num_tokens = sum(part.num_tokens for part in parts)
    return Evaluation(
        loss=sum(part.loss * part.num_tokens for part in parts) / num_tokens,
        num_tokens=num_tokens,
        num_bytes=sum(part.num_bytes for part in parts),
        seconds=sum(part.seconds for part in parts),
    )


def time_evaluation(model: nn.Module, rows: Rows, *, batch_size: int, accelerator: Accelerator) -> float:
    """Seconds that this process would take to evaluate all rows, estimated from two batches."""
    some = np.arange(min(len(rows), 2 * batch_size * accelerator.num_processes))
    for _ in range(2):  # the first one is a warm-up
        start = time.perf_counter()
        score_rows(model, rows, some, batch_size=batch_size, accelerator=accelerator)
        seconds = time.perf_counter() - start
    return seconds / len(some) * len(rows)


@torch.no_grad()
def score_rows(
    model: nn.Module, rows: Rows, indices: np.ndarray, *, batch_size: int, accelerator: Accelerator
) -> tuple[float, int]:
    """Nats per token over the targets of these rows, and the number of targets."""
    own = indices[accelerator.process_index :: accelerator.num_processes]
    rows_each = math.ceil(len(indices) / accelerator.num_processes)  # of the process with the most rows
    batch_size = min(batch_size, rows_each)
    device = accelerator.device
    # Float32 stops counting at 16,777,216. MPS has no float64, so there the sums live on the CPU.
    totals = torch.zeros(2, dtype=torch.float64, device="cpu" if device.type == "mps" else device)

    was_training = model.training
    model.eval()
    try:
        for first in range(0, rows_each, batch_size):
            batch_rows = own[first : first + batch_size]
            # Every batch is filled up to one size with rows that do not count: FSDP needs the same number of forward
            # passes in every process, and torch.compile compiles one shape.
            padding = np.zeros(batch_size - len(batch_rows), dtype=batch_rows.dtype)
            batch = rows.batch(np.concatenate([batch_rows, padding]), count_once=True)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            labels = batch["shift_labels"].to(torch.long, copy=True)  # changed below, and perhaps a view of the rows
            labels[len(batch_rows) :] = -100
            logits = model(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits  # (B, T, V)
            losses = nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="none"
            )
            if device.type != "mps":
                losses = losses.double()
            totals += torch.stack([losses.sum(), (labels != -100).sum()]).to(totals)
    finally:
        model.train(was_training)

    loss_sum, num_tokens = accelerator.reduce(totals, reduction="sum").tolist()
    if num_tokens == 0:
        raise ValueError(
            f"There is nothing to evaluate: none of the {len(indices):,} rows has a target (each shift_label is -100)."
        )
    if not math.isfinite(loss_sum):
        raise FloatingPointError(
            f"The evaluation loss is {loss_sum}: the model's logits are not finite on some of the {len(indices):,} "
            "rows. Start again with a lower learning_rate."
        )
    return loss_sum / num_tokens, int(num_tokens)
