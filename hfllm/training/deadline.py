"""A run's deadline: the number of steps follows the clock if the machine is slower than measured.

The sizes of a run for a number of minutes come from a few measured steps. Later, another program may slow the machine
down. So the run looks at the clock from time to time and plans the number of steps again. The learning rate then falls
faster from its present value, along the same curve, without a jump, and reaches the end of the planned schedule at the
last step.

The plans are part of the run's state, and so of its checkpoints. Given them, the learning rate depends on the step
alone, and a resumed run takes the same steps.
"""

import time
from collections.abc import Sequence
from typing import Protocol

from accelerate.utils import broadcast_object_list


NUM_LOOKS = 40  # looks at the clock in the planned run
FIRST_STEPS = 2  # of a process, which are slower than the others and are not measured
LATE = 0.01  # share of the given time by which the run may end late before the steps are planned again ...
EARLY = 0.10  # ... or early, if their number was reduced before

Plans = list[list[int]]  # [step at which it was planned, steps of the whole run]


def position_in_schedule(step: int, planned_steps: int, plans: Sequence[Sequence[int]]) -> float:
    """The position of a step in the schedule of `planned_steps`, after it was planned again at some earlier steps.

    From each plan on, the remaining steps divide the rest of the schedule equally.
    """
    position, begin, end = 0.0, 0, planned_steps
    for planned_at, max_steps in plans:
        if planned_at > step:
            break
        position += (planned_at - begin) * (planned_steps - position) / (end - begin)
        begin, end = planned_at, max_steps
    if end == planned_steps and not plans:
        return step
    return position + (step - begin) * (planned_steps - position) / (end - begin)


def last_step_in_time(
    step: int, seconds_left: float, *, seconds_per_step: float, seconds_per_evaluation: float, eval_steps: int
) -> int:
    """The most steps that fit into the time, evaluations included; `step` are done, and at least one more is taken."""
    num_evaluations = 1  # the last step is followed by one
    while True:
        seconds = seconds_left - num_evaluations * seconds_per_evaluation
        last = step + max(1, int(seconds / seconds_per_step))
        needed = last // eval_steps - step // eval_steps + (last % eval_steps > 0)
        if needed <= num_evaluations or last == step + 1:
            return last
        num_evaluations += 1


class State(Protocol):
    """The part of a run's state that its deadline needs."""

    step: int
    plans: Plans
    elapsed_seconds: float


class Deadline:
    """The number of steps of a run and their positions in the schedule, by the clock if `minutes` are given.

    Plans and elapsed time are kept in the run's `state`. Every process calls every method.
    """

    def __init__(self, state: State, *, planned_steps: int, minutes: float | None, eval_steps: int):
        self.state, self.planned_steps, self.eval_steps = state, planned_steps, eval_steps
        self.seconds = None if minutes is None else 60 * minutes
        self.looks_every = max(1, planned_steps // NUM_LOOKS)
        self.num_steps = 0  # of this process
        self.step_seconds: list[float] = []  # since the last look
        self.evaluation_seconds = 0.0  # of the last evaluation, with the checkpoint that follows it
        self.clock = time.perf_counter()

    @property
    def max_steps(self) -> int:
        return self.state.plans[-1][1] if self.state.plans else self.planned_steps

    def position(self, step: int) -> float:
        """The position of the step in the schedule of `planned_steps`."""
        return position_in_schedule(step, self.planned_steps, self.state.plans)

    def start(self) -> None:
        """Start the clock; the time before an interruption counts too."""
        self.clock = time.perf_counter()

    def count_step(self) -> None:
        """Count a step that has ended."""
        self.num_steps += 1
        seconds = self._lap()
        if self.num_steps > FIRST_STEPS:
            self.step_seconds.append(seconds)

    def count_evaluation(self) -> None:
        """Count an evaluation that has ended, with its checkpoint."""
        self.evaluation_seconds = self._lap()

    def look(self) -> str | None:
        """Plan the steps again if the run would not end in time; returns the decision in words, or None."""
        step = self.state.step
        if self.seconds is None or step % self.looks_every or not self.step_seconds or step >= self.max_steps:
            return None
        pace = sum(self.step_seconds) / len(self.step_seconds)
        self.step_seconds.clear()
        left = self.seconds - self.state.elapsed_seconds
        times = {"seconds_per_step": pace, "seconds_per_evaluation": self.evaluation_seconds}
        in_time = min(self.planned_steps, last_step_in_time(step, left, **times, eval_steps=self.eval_steps))
        [in_time, pace] = broadcast_object_list([in_time, pace])  # the main process's clock is used by all
        change = (in_time - self.max_steps) * pace
        if -LATE * self.seconds <= change <= EARLY * self.seconds:
            return None
        before = self.max_steps
        self.state.plans.append([step, in_time])
        return (
            f"step {step:,}: a step takes {pace:.3f} s now, so the run ends at step {in_time:,} instead of {before:,}, "
            "and the learning rate falls accordingly."
        )

    def _lap(self) -> float:
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.state.elapsed_seconds += seconds
        return seconds
