"""Detection of loss and gradient spikes, whose updates are skipped."""

import statistics
from collections import deque

import torch


MAX_SKIPPED_IN_A_ROW = 10  # skipped updates; more in a row are not an accident


class SpikeDetector:
    """Detects a step whose loss or gradient norm is more than `sigmas` standard deviations above the last ones.

    The rule of OLMo-core's SkipStepOptimizer: mean and standard deviation of the last `window` steps, from half a
    window on. A spike is not added to the history, or the next one would pass. `history` is saved in checkpoints.
    """

    def __init__(self, sigmas: float, *, window: int = 128, history: list[list[float]] | None = None):
        if not sigmas > 0 or window < 4:
            raise ValueError(f"A spike is above 0 standard deviations of 4 steps or more, not {sigmas} of {window}.")
        self.sigmas = sigmas
        self.window = window
        self.past = deque(((loss, grad_norm) for loss, grad_norm in history or []), maxlen=window)

    @property
    def history(self) -> list[list[float]]:
        return [list(pair) for pair in self.past]

    def is_spike(self, loss: float, grad_norm: float) -> bool:
        """Compare a step with the ones before it, and add it to the history unless it is a spike."""
        if len(self.past) >= self.window // 2:
            for value, past in zip((loss, grad_norm), zip(*self.past), strict=True):
                if value > statistics.fmean(past) + self.sigmas * statistics.stdev(past):
                    return True
        self.past.append((loss, grad_norm))
        return False


class SkippedUpdates:
    """Counts skipped updates on the device, so that Python does not wait for each step's."""

    def __init__(self, device: torch.device):
        self.since_read = torch.zeros((), dtype=torch.int64, device=device)
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)

    def count(self, is_update: torch.Tensor) -> None:
        self.since_read += ~is_update
        self.in_a_row = (self.in_a_row + 1) * ~is_update

    def read(self) -> tuple[int, int]:
        """The number since the last `read`, and of the last ones in a row; waits for the device."""
        counts = int(self.since_read), int(self.in_a_row)
        self.since_read.zero_()
        return counts


def stop_if_hopeless(
    num_skipped_in_a_row: int, *, step: int, learning_rate: float, detector: SpikeDetector | None
) -> None:
    """Raise a ValueError if the last updates, up to `step`, were all skipped: the next ones would be as well."""
    if num_skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
        return
    or_spike = "" if detector is None else "or the step was a spike, "
    raise ValueError(
        f"The gradient was not finite {or_spike}{num_skipped_in_a_row} times in a row, up to step {step:,}; those "
        f"updates were skipped. Start again with a lower learning_rate than {learning_rate}."
    )
