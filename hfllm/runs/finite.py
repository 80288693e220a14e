"""Numbers that are not finite stop a run before anything is written."""

from collections.abc import Iterable

import torch


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], *, what: str) -> None:
    """Raise if a tensor holds a NaN or an infinity; `tensors` are names and tensors, `what` is what they make up.

    Raises:
        FloatingPointError: names the first such tensor.
    """
    for name, tensor in tensors:
        # One number decides: a sum is not finite as soon as one of its parts is not. Only if the sum itself has
        # overflowed do all of them have to be looked at.
        if not tensor.is_floating_point() or torch.isfinite(tensor.sum()):
            continue
        if not torch.isfinite(tensor).all():
            raise FloatingPointError(
                f"{what} was not written: {name} holds numbers that are not finite, so training has diverged. Start "
                "again with a lower learning_rate; earlier checkpoints, if there are any, are sound."
            )
