"""Comparison of two models' logits and greedy tokens, and of two tokenizers."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase


# Text that tokenizers with small differences encode differently: composed and combining accents, spaces and ends of
# lines, digits, emoji of several characters, scripts, control tokens, control characters.
HARD_TEXTS = (
    "Every effort moves you",
    "Caf\u00e9, Cafe\u0301, A\u030angstr\u00f6m, \ufb01n",
    "line\r\n\r\n\tdef f(x):\n        return  x   \n",
    " a space before, and one after ",
    "1234567 3.14 \u00bd \u2460",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7 \u263a\ufe0f",
    "日本語 العربية हिन्दी Привет",
    "<|startoftext|><|im_start|>user\nhi<|im_end|>\n<|endoftext|><s></s>[INST]",
    "I'LL don't WE'Ve \x00\u00a0\u200b",
)


@dataclass(frozen=True)
class LogitComparison:
    """How far a candidate's logits are from a reference's.

    Attributes:
        largest_difference: Over all logits; infinite if one of them is NaN, or infinite on one side only.
        largest_logit: The reference's largest absolute logit that is finite, to see the difference in proportion.
        agreement: Share of the positions, 0 to 1, at which both have the same likeliest token.
        num_positions: Positions compared.
    """

    largest_difference: float
    largest_logit: float
    agreement: float
    num_positions: int

    def __str__(self) -> str:
        return (
            f"largest |difference| {self.largest_difference:.2e} of logits up to {self.largest_logit:.1f}, "
            f"the same likeliest token at {self.agreement:.2%} of {self.num_positions:,} positions"
        )


def compare_logits(
    reference: nn.Module | Callable[..., Any],
    candidate: nn.Module | Callable[..., Any],
    input_ids: torch.Tensor | Sequence[torch.Tensor],
    *,
    attention_mask: torch.Tensor | Sequence[torch.Tensor] | None = None,
) -> LogitComparison:
    """Compare logits (B, T, V) for the same ids: a tensor (B, T), or a list of them, of several shapes.

    Each side is a model, or a function of `input_ids` that returns logits as a tensor, an array or a model's output. A
    model runs on its own device without dropout, and keeps the mode (training or not) that it was in. With an
    `attention_mask`, shaped as `input_ids`, both are called with it too, and padding is not compared.

    Raises:
        ValueError: if there is nothing to compare, or the two sides' shapes differ.
    """
    batches = [input_ids] if isinstance(input_ids, torch.Tensor) else list(input_ids)
    masks: list[torch.Tensor | None] = [None] * len(batches)
    if attention_mask is not None:
        masks = [attention_mask] if isinstance(attention_mask, torch.Tensor) else list(attention_mask)
        if [mask.shape for mask in masks if mask is not None] != [batch.shape for batch in batches]:
            raise ValueError("attention_mask must have the shapes of input_ids.")

    largest_difference = largest_logit = 0.0
    num_equal = num_positions = 0
    with _evaluating(reference), _evaluating(candidate):
        for batch, mask in zip(batches, masks):
            expected, found = _logits(reference, batch, mask), _logits(candidate, batch, mask)
            if expected.shape != found.shape:
                raise ValueError(
                    f"For input_ids {tuple(batch.shape)} the reference has logits {tuple(expected.shape)}, the "
                    f"candidate {tuple(found.shape)}: these are not two versions of one model."
                )
            kept = torch.ones(batch.shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
            expected, found = expected[kept], found[kept]  # (B, T, V) -> (positions, V)
            if expected.numel() == 0:
                continue
            # Equal infinities have no difference (inf - inf is NaN), and a NaN on either side is the largest one.
            difference = torch.where(expected == found, 0.0, (expected - found).abs())
            largest_difference = max(largest_difference, difference.nan_to_num(torch.inf, torch.inf).max().item())
            largest_logit = max(largest_logit, expected.abs().nan_to_num(0.0, 0.0).max().item())
            num_equal += int((expected.argmax(-1) == found.argmax(-1)).sum())
            num_positions += expected.shape[0]
    if num_positions == 0:
        raise ValueError("There is nothing to compare: input_ids holds no token.")
    return LogitComparison(largest_difference, largest_logit, num_equal / num_positions, num_positions)


def random_prompts(vocab_size: int, lengths: Sequence[int], *, num_rows: int = 2, seed: int = 0) -> list[torch.Tensor]:
    """Random ids (num_rows, length), one tensor for each length: they reach embeddings that text seldom uses."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (num_rows, length), generator=generator) for length in lengths]


@torch.no_grad()
def greedy_tokens(model: nn.Module, input_ids: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The likeliest next tokens (B, num_tokens) after each prompt, with the model's cache; an end token does not stop.

    The second tensor has, for each of them, by how much its logit exceeds the second likeliest's.
    """
    tokens, margins = [], []
    past_key_values = None
    with _evaluating(model):
        for _ in range(num_tokens):
            output = model(input_ids, past_key_values=past_key_values, use_cache=True)
            best = output.logits[:, -1].float().topk(2)
            tokens.append(best.indices[:, :1])
            margins.append(best.values[:, :1] - best.values[:, 1:])
            input_ids, past_key_values = tokens[-1], output.past_key_values
    return torch.cat(tokens, dim=1), torch.cat(margins, dim=1)


def tokenizer_differences(reference: PreTrainedTokenizerBase, candidate: PreTrainedTokenizerBase) -> list[str]:
    """A sentence for each of `HARD_TEXTS`, special tokens and chats that two tokenizers encode differently."""
    differences = []

    def compare(what: str, expected: Any, found: Any) -> None:
        if expected != found:
            differences.append(f"{what}: {expected!r} became {found!r}")

    for text in HARD_TEXTS:
        for options in ({}, {"add_special_tokens": False}):
            ids = reference(text, **options).input_ids
            compare(f"ids of {text!r}", ids, candidate(text, **options).input_ids)
            compare(f"text of the ids {ids}", reference.decode(ids), candidate.decode(ids))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        compare(name, getattr(reference, name), getattr(candidate, name))
    compare("number of ids", len(reference), len(candidate))
    compare("chat template", reference.chat_template, candidate.chat_template)
    return differences


def _logits(side: nn.Module | Callable[..., Any], input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Logits in float64 on the CPU, so that the subtraction adds no rounding."""
    if isinstance(side, nn.Module):
        device = next(side.parameters()).device
        input_ids, mask = input_ids.to(device), None if mask is None else mask.to(device)
    inputs = {} if mask is None else {"attention_mask": mask}
    with torch.no_grad():
        output = side(input_ids, **inputs)
    logits = getattr(output, "logits", output)
    if isinstance(logits, np.ndarray):
        logits = torch.from_numpy(logits)
    return logits.detach().to("cpu", torch.float64)


@contextmanager
def _evaluating(side: Any):
    was_training = isinstance(side, nn.Module) and side.training
    if was_training:
        side.eval()
    try:
        yield
    finally:
        if was_training:
            side.train()
