"""Documents in windows: each token counts once, compared with a hand-written sum."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

import hfllm
from hfllm.evaluation.windows import cut_windows, evaluate_windows
from tests.conftest import make_tiny_config


DOCUMENTS = [np.arange(3, 3 + length) for length in (1, 7, 8, 9, 23, 0, 16)]


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_each_token_is_a_target_exactly_once_whatever_the_stride(stride):
    windows = list(cut_windows(DOCUMENTS, prefix_token_id=0, block_size=8, stride=stride))
    targets = np.concatenate([window.targets for window in windows])
    assert targets.tolist() == np.concatenate(DOCUMENTS).tolist()
    assert all(len(window.input_ids) <= 8 for window in windows)


def test_a_window_has_the_context_that_fits():
    windows = list(cut_windows([np.arange(10, 16)], prefix_token_id=0, block_size=4, stride=2))
    assert [(w.input_ids.tolist(), w.targets.tolist()) for w in windows] == [
        ([0, 10, 11, 12], [10, 11, 12, 13]),
        ([11, 12, 13, 14], [14, 15]),
    ]


@pytest.mark.parametrize("stride", [0, 9])
def test_a_stride_that_would_leave_tokens_out_is_refused(stride):
    with pytest.raises(ValueError, match="stride"):
        list(cut_windows(DOCUMENTS, prefix_token_id=0, block_size=8, stride=stride))


def evaluate(model, *, batch_size=4, block_size=8, stride=8):
    windows = list(cut_windows(DOCUMENTS, prefix_token_id=0, block_size=block_size, stride=stride))
    return evaluate_windows(model, windows, num_bytes=100, batch_size=batch_size, accelerator=Accelerator(cpu=True))


@pytest.mark.parametrize("preset", ["modern", "book"])
def test_bits_per_byte_are_those_of_a_float64_sum_by_hand(preset):
    model = hfllm.GPTForCausalLM(make_tiny_config(preset)).eval()
    nats = 0.0
    for ids in DOCUMENTS:  # one batch of one row per window, disjoint windows but for the last, which is full
        sequence, done = [0, *ids.tolist()], 0
        while done < len(ids):
            end = min(len(ids), done + 8)
            inputs = torch.tensor([sequence[max(0, end - 8) : end]])
            with torch.no_grad():
                log_probabilities = model(inputs).logits[0].double().log_softmax(-1)
            for target in range(done, end):
                nats -= log_probabilities[target - end, sequence[target + 1]].item()
            done = end
    found = evaluate(model, batch_size=1)
    assert found.num_tokens == sum(map(len, DOCUMENTS))
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 100, rel=1e-9)


def test_the_batch_size_makes_no_difference(tiny_model):
    one, many = evaluate(tiny_model, batch_size=1), evaluate(tiny_model, batch_size=64)
    assert one.num_tokens == many.num_tokens
    assert one.bits_per_byte == pytest.approx(many.bits_per_byte, rel=1e-6)


def test_processes_share_the_windows_and_add_up(tiny_model):
    class Process:
        device, num_processes = torch.device("cpu"), 3

        def __init__(self, process_index, totals):
            self.process_index, self.totals = process_index, totals

        def reduce(self, totals, reduction):
            self.totals.append(totals)
            return sum(self.totals)

    windows = list(cut_windows(DOCUMENTS, prefix_token_id=0, block_size=8, stride=3))
    totals: list[torch.Tensor] = []
    for index in range(3):
        shared = evaluate_windows(tiny_model, windows, num_bytes=100, batch_size=2, accelerator=Process(index, totals))
    alone = evaluate(tiny_model, stride=3)
    assert shared.num_tokens == alone.num_tokens
    assert shared.bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-6)


def test_nothing_to_evaluate_says_so(tiny_model):
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate_windows(tiny_model, [], num_bytes=0, batch_size=1, accelerator=Accelerator(cpu=True))


def test_a_model_that_trained_trains_on(tiny_model):
    tiny_model.train()
    evaluate(tiny_model)
    assert tiny_model.training
