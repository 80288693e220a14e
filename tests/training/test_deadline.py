"""A run of limited time ends in time, at the end of its learning-rate schedule, also if the machine becomes slower."""

import dataclasses
import itertools

import pytest

from hfllm.training import deadline
from hfllm.training.deadline import Deadline, last_step_in_time, position_in_schedule


def test_without_a_new_plan_a_step_is_its_own_position():
    assert [position_in_schedule(step, 10, []) for step in range(10)] == list(range(10))


def test_after_a_new_plan_the_rest_of_the_schedule_is_passed_in_the_steps_that_are_left():
    """Of 100 steps, planned as 70 after 40: the other 60 are passed in 30, two at a time."""
    plans = [[40, 70]]
    assert [position_in_schedule(step, 100, plans) for step in (0, 39, 40, 41, 69, 70)] == [0, 39, 40, 42, 98, 100]
    # After 55 steps, at 70 of 100, there are 30 left again: one at a time.
    plans.append([55, 85])
    assert [position_in_schedule(step, 100, plans) for step in (39, 54, 55, 56, 85)] == [39, 68, 70, 71, 100]


def test_steps_in_time_leave_time_for_evaluations():
    """10 s left, 1 s a step: 10 steps; with the last evaluation of 2 s 8; with another one after step 5, 6."""
    options = {"seconds_per_step": 1.0, "eval_steps": 100}
    assert last_step_in_time(0, 10.5, **options, seconds_per_evaluation=0.0) == 10
    assert last_step_in_time(0, 10.5, **options, seconds_per_evaluation=2.0) == 8
    assert last_step_in_time(0, 10.5, seconds_per_step=1.0, eval_steps=5, seconds_per_evaluation=2.0) == 6
    assert last_step_in_time(20, -3.0, **options, seconds_per_evaluation=2.0) == 21  # always one


@dataclasses.dataclass
class State:
    step: int = 0
    plans: list[list[int]] = dataclasses.field(default_factory=list)
    elapsed_seconds: float = 0.0


class Clock:
    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(deadline, "time", clock)
    return clock


def train(
    state: State, clock: Clock, seconds_of_step, *, minutes: float = 10.0, until: int | None = None
) -> list[float]:
    """A run planned for 560 steps of 1 s and an evaluation of 5 s after every 150; with the positions of its steps."""
    plan = Deadline(state, planned_steps=560, minutes=minutes, eval_steps=150)
    plan.start()
    positions = []
    while state.step < (until or plan.max_steps):
        positions.append(plan.position(state.step))
        clock.now += seconds_of_step(state.step)
        state.step += 1
        plan.count_step()
        if state.step % 150 == 0 or state.step == plan.max_steps:
            clock.now += 5
            plan.count_evaluation()
        plan.look()
    return positions


def test_a_machine_as_fast_as_measured_takes_the_planned_steps(clock):
    state = State()
    positions = train(state, clock, lambda step: 1.0)
    assert state.step == 560 and state.plans == []
    assert positions == list(range(560))


@pytest.mark.parametrize("slower", [1.5, 4.0])
@pytest.mark.parametrize("since", [0, 200, 450])
def test_a_machine_that_becomes_slower_ends_in_time_with_the_rate_down(clock, slower, since):
    state = State()
    positions = train(state, clock, lambda step: slower if step >= since else 1.0)
    assert state.step < 560
    assert 0.9 * 600 < clock.now < 1.03 * 600
    assert positions == sorted(positions)
    assert positions[-1] + (positions[-1] - positions[-2]) == pytest.approx(560)
    assert max(b - a for a, b in itertools.pairwise(positions)) < 3 * slower  # no jump


def test_a_machine_that_was_slow_for_a_while_gets_steps_back_but_never_more_than_planned(clock):
    state = State()
    train(state, clock, lambda step: 3.0 if 50 <= step < 100 else 1.0)
    assert 400 < state.step <= 560
    assert 0.85 * 600 < clock.now < 1.03 * 600


def test_a_resumed_run_keeps_its_plans_and_what_is_left_of_its_time(clock):
    whole, pieces = State(), State()
    positions = train(whole, clock, lambda step: 2.0)
    start = clock.now
    first = train(pieces, clock, lambda step: 2.0, until=101)
    clock.now += 1e6  # between the two, nobody waits
    second = train(pieces, clock, lambda step: 2.0)
    assert first == positions[:101]
    assert second[0] == positions[101]
    assert clock.now - start - 1e6 < 1.03 * 600


def test_without_minutes_nobody_looks_at_the_clock(clock):
    state = State()
    train(state, clock, lambda step: 9.0, minutes=None)
    assert state.step == 560 and state.plans == []
