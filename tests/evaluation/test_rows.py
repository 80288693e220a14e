import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hfllm.evaluation.rows import Evaluation, evaluate_rows, score_rows


class TextRows:
    """Rows of token ids; the last one's last two positions have no target."""

    def __init__(self, input_ids: torch.Tensor, num_bytes: int):
        self.input_ids, self.num_bytes = input_ids, num_bytes
        self.shift_labels = torch.cat([input_ids[:, 1:], torch.full((len(input_ids), 1), -100)], dim=1)
        self.shift_labels[-1, -2:] = -100

    def __len__(self) -> int:
        return len(self.input_ids)

    def batch(self, indices: np.ndarray, count_once: bool = True) -> dict[str, torch.Tensor]:
        positions = torch.arange(self.input_ids.shape[1]).expand(len(indices), -1)
        return {
            "input_ids": self.input_ids[indices],
            "position_ids": positions,
            "shift_labels": self.shift_labels[indices],
        }


class FixedLogits(nn.Module):
    """Predicts the same distribution everywhere, and counts its calls."""

    def __init__(self, logits: list[float]):
        super().__init__()
        self.logits = torch.tensor(logits)
        self.batch_sizes: list[int] = []

    def forward(self, input_ids, position_ids, use_cache):
        assert not self.training and not torch.is_grad_enabled() and use_cache is False
        self.batch_sizes.append(len(input_ids))
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.5,
        )
    )


@pytest.fixture
def rows():
    return TextRows(torch.randint(11, (7, 6)), num_bytes=80)


def test_a_fair_coin_costs_one_bit(accelerator):
    # Two rows of four: three targets, and two, as the last one's are cut short. Five bits for ten bytes.
    coins = TextRows(torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]]), num_bytes=10)
    result = evaluate_rows(FixedLogits([0.0, 0.0]), coins, batch_size=2, accelerator=accelerator)
    assert (result.num_tokens, result.num_bytes) == (5, 10)
    assert result.loss == pytest.approx(math.log(2))
    assert result.perplexity == pytest.approx(2)
    assert result.bits_per_byte == pytest.approx(0.5)
    assert result.seconds > 0


def test_each_target_weighs_the_same_although_rows_have_different_counts(accelerator):
    # The model says P(1) = 3/4. Of the five targets 1, 1, 0 and 1, 0 three are 1.
    coins = TextRows(torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1]]), num_bytes=10)
    result = evaluate_rows(FixedLogits([0.0, math.log(3)]), coins, batch_size=1, accelerator=accelerator)
    assert result.loss == pytest.approx(-(3 * math.log(3 / 4) + 2 * math.log(1 / 4)) / 5)


def test_the_loss_is_that_of_transformers(llama, accelerator):
    rows = TextRows(torch.randint(11, (3, 6)), num_bytes=1)
    rows.shift_labels[-1, -2] = rows.input_ids[-1, -1]  # now every token but the first of a row is a target
    expected = llama(input_ids=rows.input_ids, labels=rows.input_ids).loss.item()
    assert evaluate_rows(llama, rows, batch_size=3, accelerator=accelerator).loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
def test_any_batch_size_gives_the_same_loss(llama, rows, accelerator, batch_size):
    with torch.no_grad():
        logits = llama(rows.input_ids).logits.double()
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), rows.shift_labels.flatten()).item()
    result = evaluate_rows(llama, rows, batch_size=batch_size, accelerator=accelerator)
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert result.num_tokens == 7 * 5 - 1


@pytest.mark.parametrize("num_processes", [2, 3, 8])  # of eight, one has no row
def test_any_number_of_processes_gives_the_same_loss(llama, rows, accelerator, num_processes):
    alone = evaluate_rows(llama, rows, batch_size=2, accelerator=accelerator)
    parts = []

    def process(index):
        def reduce(part, reduction):
            assert reduction == "sum"
            parts.append(part)
            return sum(parts)

        return SimpleNamespace(
            process_index=index, num_processes=num_processes, device=torch.device("cpu"), reduce=reduce
        )

    for index in range(num_processes - 1):
        evaluate_rows(llama, rows, batch_size=2, accelerator=process(index))
    together = evaluate_rows(llama, rows, batch_size=2, accelerator=process(num_processes - 1))
    assert together.loss == pytest.approx(alone.loss, rel=1e-6)
    assert together.num_tokens == alone.num_tokens


def test_a_few_rows_can_be_scored_alone(accelerator):
    # P(1) = 3/4; the third row's targets are 1, 1 and 1, and nothing else is asked for.
    coins = TextRows(torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]), num_bytes=10)
    loss, num_tokens = score_rows(
        FixedLogits([0.0, math.log(3)]), coins, np.array([2]), batch_size=8, accelerator=accelerator
    )
    assert loss == pytest.approx(-math.log(3 / 4)) and num_tokens == 3


def test_every_process_makes_as_many_calls_of_one_size():
    rows = TextRows(torch.zeros(5, 4, dtype=torch.long), num_bytes=1)
    sizes = []
    for index in range(2):  # the first has three rows, the second has two
        model = FixedLogits([0.0, 0.0])
        fake = SimpleNamespace(
            process_index=index, num_processes=2, device=torch.device("cpu"), reduce=lambda part, reduction: part
        )
        evaluate_rows(model, rows, batch_size=2, accelerator=fake)
        sizes.append(model.batch_sizes)
    assert sizes == [[2, 2], [2, 2]]


def test_the_rows_stay_as_they_were(accelerator):
    rows = TextRows(torch.randint(2, (3, 4)), num_bytes=1)
    rows.batch = lambda indices, count_once=True: {
        "input_ids": rows.input_ids[:2],
        "position_ids": rows.input_ids[:2],
        "shift_labels": rows.shift_labels[:2],  # a view, as a memory-mapped table gives it
    }
    before = rows.shift_labels.clone()
    evaluate_rows(FixedLogits([0.0, 0.0]), rows, batch_size=2, accelerator=accelerator)
    assert torch.equal(rows.shift_labels, before)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_continues_in_the_mode_it_was_in(accelerator, training):
    rows = TextRows(torch.randint(2, (3, 4)), num_bytes=1)
    model = FixedLogits([0.0, 0.0]).train(training)
    evaluate_rows(model, rows, batch_size=2, accelerator=accelerator)
    assert model.training is training
    model.forward = lambda **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluate_rows(model, rows, batch_size=2, accelerator=accelerator)
    assert model.training is training


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_raises(accelerator, bad):
    rows = TextRows(torch.randint(2, (3, 4)), num_bytes=1)
    with pytest.raises(FloatingPointError, match="logits are not finite on some of the 3 rows"):
        evaluate_rows(FixedLogits([0.0, bad]), rows, batch_size=2, accelerator=accelerator)


def test_nothing_to_score_is_an_error(accelerator):
    rows = TextRows(torch.randint(2, (3, 4)), num_bytes=1)
    rows.shift_labels[:] = -100
    with pytest.raises(ValueError, match="none of the 3 rows has a target"):
        evaluate_rows(FixedLogits([0.0, 0.0]), rows, batch_size=2, accelerator=accelerator)
    no_rows = TextRows(torch.zeros(1, 4, dtype=torch.long), num_bytes=1)
    no_rows.input_ids = no_rows.input_ids[:0]
    with pytest.raises(ValueError, match="0 rows of 1 bytes of text"):
        evaluate_rows(FixedLogits([0.0, 0.0]), no_rows, batch_size=2, accelerator=accelerator)


def test_a_huge_loss_has_an_infinite_perplexity():
    assert Evaluation(loss=1e4, num_tokens=1, num_bytes=1, seconds=1.0).perplexity == math.inf
