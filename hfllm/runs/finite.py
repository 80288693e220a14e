"""Checks that stop a diverged run before anything is written: numbers that are not finite, and a far too high loss."""

import math
from collections.abc import Iterable

import torch


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], *, what: str) -> None:
    """Raise an error if a tensor holds a NaN or an infinity; `tensors` are names and tensors, `what` they belong to.

    Raises:
        FloatingPointError: names the first such tensor.
    """
    for name, tensor in tensors:
        # One number is enough: a sum is not finite if one of its parts is not. All parts are checked only if the sum is
        # not finite, because it may have overflowed.
        if not tensor.is_floating_point() or torch.isfinite(tensor.sum()):
            continue
        if not torch.isfinite(tensor).all():
            raise FloatingPointError(
                f"{what} was not written: {name} holds numbers that are not finite, so training has diverged. Start "
                "again with a lower learning_rate; earlier checkpoints, if there are any, are sound."
            )


def check_converged(loss: float, *, num_choices: int, before: float | None = None) -> None:
    """Raise an error if a trained model's loss shows that training has diverged.

    `loss` is in nats, the mean over decisions among `num_choices`, and `before` is the loss before training. A uniform
    guess has ln(num_choices). An overfitted model has more, but not ten times as much. If `before` is known, a loss
    above it is refused already if it is more than 1.5 times that of a guess.

    Raises:
        FloatingPointError: the loss is not finite, or far worse than a guess.
    """
    guess = math.log(num_choices)
    limit = 10 * guess if before is None else max(before, 1.5 * guess)
    if math.isfinite(loss) and loss <= limit:
        return
    was = "" if before is None else f" It was {before:.4g} before."
    raise FloatingPointError(
        f"Training has diverged: the loss is {loss:.4g} nats, and a uniform guess has {guess:.4g}.{was} The model was "
        "not saved. Start again with a lower learning_rate."
    )
