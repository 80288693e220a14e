"""Numbers that are not finite, and a loss beyond all reason, stop a run before anything is written."""

import math
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


def check_converged(loss: float, *, num_choices: int) -> None:
    """Raise if a trained model's loss shows that training has diverged.

    `loss` is in nats, the mean over decisions among `num_choices`. A uniform guess has ln(num_choices); a model that
    learned the wrong thing has more, but not ten times as much.

    Raises:
        FloatingPointError: the loss is not finite, or far worse than a guess.
    """
    guess = math.log(num_choices)
    if math.isfinite(loss) and loss <= 10 * guess:
        return
    raise FloatingPointError(
        f"Training has diverged: the loss is {loss:.4g} nats, and a uniform guess has {guess:.4g}. The model was not "
        "saved. Start again with a lower learning_rate."
    )
