"""The loss on whole documents, in overlapping windows that count each token once.

Pretraining evaluates packed rows (`rows.py`), which is fast. Here every token of every document is predicted, the first
one from the tokenizer's start token, as in lm-eval's rolling log-likelihood. These numbers can be compared between
models with different tokenizers and contexts.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .rows import Evaluation


CHUNK_LOGITS = 1 << 24  # logits converted to float64 at a time, 128 MiB


@dataclass(frozen=True)
class Window:
    """Part of a document: `input_ids`, and `targets`, the tokens that its last inputs predict."""

    input_ids: np.ndarray  # (T,)
    targets: np.ndarray  # (at most T,)


def cut_windows(
    documents: Iterable[np.ndarray], *, prefix_token_id: int, block_size: int, stride: int
) -> Iterator[Window]:
    """Windows of at most `block_size` inputs over each document's token ids; each token is a target exactly once.

    A document's first window has as many targets as inputs. Each further one has `stride` new targets, and before
    them as many tokens of context as fit: a smaller stride gives every token more context, at the cost of more passes.
    """
    if block_size < 1 or not 1 <= stride <= block_size:
        raise ValueError(
            f"stride={stride}, block_size={block_size}: the stride is at least 1 and at most the block_size. "
            "A larger one would leave tokens out."
        )
    for ids in documents:
        sequence = np.concatenate([[prefix_token_id], ids.astype(np.int64)])
        done = 0  # targets so far
        while done < len(ids):
            end = min(len(ids), done + (block_size if done == 0 else stride))
            start = max(0, end - block_size)
            yield Window(sequence[start:end], sequence[done + 1 : end + 1])
            done = end


def score_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: datasets.Dataset,
    *,
    encode: Callable[[list[str]], list[np.ndarray]],
    block_size: int,
    stride: int,
    batch_size: int,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """`test_loss`, `test_bits_per_byte` and so on of documents, each token predicted once.

    `documents` has the columns `text` and `document`: a long document is stored in several parts with one number.
    `encode` turns texts into token ids without special tokens.
    """
    texts = list(documents["text"])
    parts = encode(texts)
    starts = np.flatnonzero(np.diff(np.array(documents["document"]), prepend=-1))  # the first part of each document
    encoded = [np.concatenate(parts[start:end]) for start, end in zip(starts, [*starts[1:], len(parts)], strict=True)]
    largest = max(int(ids.max()) for ids in encoded if len(ids))
    if largest >= model.config.vocab_size:
        raise ValueError(
            f"The tokenizer gives the id {largest}, but the model has {model.config.vocab_size} embeddings."
        )
    windows = list(cut_windows(encoded, prefix_token_id=tokenizer.bos_token_id, block_size=block_size, stride=stride))
    num_bytes = sum(len(text.encode()) for text in texts)
    result = evaluate_windows(model, windows, num_bytes=num_bytes, batch_size=batch_size, accelerator=accelerator)
    return {
        "test_loss": result.loss,
        "test_perplexity": result.perplexity,
        "test_bits_per_byte": result.bits_per_byte,
        "test_tokens": result.num_tokens,
        "test_bytes": result.num_bytes,
        "test_documents": len(encoded),
        "test_stride": stride,
    }


@torch.no_grad()
def evaluate_windows(
    model: nn.Module, windows: list[Window], *, num_bytes: int, batch_size: int, accelerator: Accelerator
) -> Evaluation:
    """Score every target once, cut among the processes; each process gets the numbers of all.

    `num_bytes` is the number of UTF-8 bytes of all targets. Losses are computed and summed in float64 from the model's
    logits. Rows are padded on the right, where a causal model does not look.
    """
    if not windows or num_bytes <= 0:
        raise ValueError(
            f"There is nothing to evaluate: {len(windows):,} windows, {num_bytes:,} bytes. Is the text empty?"
        )
    start = time.perf_counter()
    # Longest first: a lack of memory shows at once, and the rows of a batch have similar lengths.
    order = sorted(range(len(windows)), key=lambda index: -len(windows[index].input_ids))
    order = order[accelerator.process_index :: accelerator.num_processes]
    loss_sum, num_tokens = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            batch = [windows[index] for index in order[first : first + batch_size]]
            losses = window_losses(model, batch, device=accelerator.device)
            loss_sum += sum(float(row.sum()) for row in losses)
            num_tokens += sum(len(row) for row in losses)
    finally:
        model.train(was_training)

    # MPS has no float64, so there the sums are on the CPU.
    device = torch.device("cpu") if accelerator.device.type == "mps" else accelerator.device
    totals = torch.tensor([loss_sum, num_tokens], dtype=torch.float64, device=device)
    loss_sum, total_tokens = accelerator.reduce(totals, reduction="sum").tolist()
    if not math.isfinite(loss_sum):
        raise FloatingPointError(f"The loss is {loss_sum}: the model's logits are not finite on this text.")
    return Evaluation(loss_sum / total_tokens, int(total_tokens), num_bytes, seconds=time.perf_counter() - start)


def window_losses(model: nn.Module, batch: list[Window], *, device: torch.device) -> list[torch.Tensor]:
    """For each window the nats (float64, on the CPU or the device) of its targets."""
    length = max(len(window.input_ids) for window in batch)
    input_ids = torch.zeros(len(batch), length, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, window in enumerate(batch):
        input_ids[row, : len(window.input_ids)] = torch.from_numpy(window.input_ids)
        attention_mask[row, : len(window.input_ids)] = 1
    logits = model(
        input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False
    ).logits  # (B, T, V)
    losses = []
    for row, window in enumerate(batch):
        end = len(window.input_ids)
        own = logits[row, end - len(window.targets) : end]
        targets = torch.from_numpy(window.targets).to(own.device)
        rows_each = max(1, CHUNK_LOGITS // own.shape[-1])
        parts = [
            nn.functional.cross_entropy(_as_float64(part), target.to(_as_float64(part[:0]).device), reduction="none")
            for part, target in zip(own.split(rows_each), targets.split(rows_each), strict=True)
        ]
        losses.append(torch.cat(parts))
    return losses


def _as_float64(logits: torch.Tensor) -> torch.Tensor:
    return (logits.cpu() if logits.device.type == "mps" else logits).double()
