"""Steps that are far from the last ones: a loss or a gradient that an update should not follow."""

import statistics
from collections import deque


MAX_SKIPPED_IN_A_ROW = 10  # updates that were no updates; after so many it is no accident


class SpikeDetector:
    """Tells whether a step's loss or gradient norm lies more than `sigmas` standard deviations above the last ones.

    The rule of OLMo-core's SkipStepOptimizer: of the last `window` steps, mean and standard deviation; half a window
    has to be there before anything is called a spike, and what was one is not remembered, or the next would pass.
    `history` is what a checkpoint keeps of it.
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
        """Judge a step by the ones before it, and remember it unless it is a spike."""
        if len(self.past) >= self.window // 2:
            for value, past in zip((loss, grad_norm), zip(*self.past), strict=True):
                if value > statistics.fmean(past) + self.sigmas * statistics.stdev(past):
                    return True
        self.past.append((loss, grad_norm))
        return False


def stop_if_hopeless(
    num_skipped_in_a_row: int, *, step: int, learning_rate: float, detector: SpikeDetector | None
) -> None:
    """Raise a ValueError when the last updates, up to `step`, were all skipped: the next ones would be as well."""
    if num_skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
        return
    or_spike = "" if detector is None else "or the step was a spike, "
    raise ValueError(
        f"The gradient was not finite {or_spike}{num_skipped_in_a_row} times in a row, up to step {step:,}; those "
        f"updates were skipped. Start again with a lower learning_rate than {learning_rate}."
    )
