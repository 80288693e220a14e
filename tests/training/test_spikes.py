import json
import random

import pytest
import torch

from hfllm.training.spikes import SkippedUpdates, SpikeDetector


def noisy_steps(num_steps: int) -> list[tuple[float, float]]:
    noise = random.Random(0)
    return [(2 + noise.gauss(0, 0.1), 1 + noise.gauss(0, 0.05)) for _ in range(num_steps)]


@pytest.mark.fault(12)
def test_ordinary_noise_is_not_a_spike_and_six_sigmas_are():
    detector = SpikeDetector(6.0, window=64)
    assert not any(detector.is_spike(*step) for step in noisy_steps(200))
    assert detector.is_spike(2.0 + 10 * 0.1, 1.0)  # the loss
    assert detector.is_spike(2.0, 1.0 + 10 * 0.05)  # the gradient
    assert not detector.is_spike(0.5, 0.1)  # far below is welcome


def test_a_spike_does_not_raise_the_bar_for_the_next():
    detector = SpikeDetector(6.0, window=64)
    for step in noisy_steps(64):
        detector.is_spike(*step)
    assert [detector.is_spike(4.0, 1.0) for _ in range(20)] == [True] * 20


def test_it_judges_only_with_half_a_window_behind_it():
    detector = SpikeDetector(6.0, window=64)
    for step in noisy_steps(31):
        detector.is_spike(*step)
    assert not detector.is_spike(100.0, 1.0)


def test_a_history_that_went_through_a_checkpoint_judges_alike():
    steps = noisy_steps(100)
    whole, cut = SpikeDetector(2.0, window=32), SpikeDetector(2.0, window=32)
    expected = [whole.is_spike(*step) for step in steps]
    assert True in expected
    found = [cut.is_spike(*step) for step in steps[:50]]
    resumed = SpikeDetector(2.0, window=32, history=json.loads(json.dumps(cut.history)))
    found += [resumed.is_spike(*step) for step in steps[50:]]
    assert found == expected


def test_a_bar_of_nothing_is_refused():
    with pytest.raises(ValueError, match="standard deviations"):
        SpikeDetector(0)


def test_skipped_updates_are_counted_since_the_last_look_and_in_a_row():
    skipped = SkippedUpdates(torch.device("cpu"))
    for is_update in (False, True, False, False):
        skipped.count(torch.tensor(is_update))
    assert skipped.read() == (3, 2)
    skipped.count(torch.tensor(False))
    assert skipped.read() == (1, 3)
    skipped.count(torch.tensor(True))
    assert skipped.read() == (0, 0)
