"""The loss on the responses of conversations, with logits computed for their tokens alone."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def logits_only_at(model: nn.Module, places: torch.Tensor) -> Iterator[None]:
    """Make the model compute logits only at these places of its rows, within the block.

    `places` (B, T) is true where logits are needed; a forward pass of rows (B, T) then returns logits (N, V) in the
    order of rows and positions. In a conversation most tokens are prompt, whose logits are not used; with a vocabulary
    of 150,000 they would take most of the memory. It works with any model of transformers whose head is a module.
    """
    head = model.get_output_embeddings()

    def select(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][places.to(inputs[0].device)], *inputs[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def shift_left(labels: torch.Tensor) -> torch.Tensor:
    """For each place of the rows (B, T) the label of the next one; the last place has none, -100."""
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)


def learned_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Nats per learned token, from the logits (N, V) of `logits_only_at`; for Trainer's `compute_loss_func`.

    The sum is divided by `num_items_in_batch`, the learned tokens of all batches of an optimizer step and all
    processes, so that the gradient does not depend on how a step is split into batches.
    """
    targets = shift_left(labels)
    targets = targets[targets != -100]
    logits = outputs["logits"].float()
    total = nn.functional.cross_entropy(logits, targets.to(logits.device), reduction="sum")
    return total / (len(targets) if num_items_in_batch is None else num_items_in_batch)
