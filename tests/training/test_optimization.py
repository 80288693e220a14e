import math

import pytest
import torch
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from hfllm.training.optimization import build_adamw, build_muon, learning_rate_at, parameter_groups, skip_unless


def names_of(model, group) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


class TinyModel(nn.Module):
    """One parameter of each kind; the head is tied to the token embedding."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(7, 4)
        self.embed_positions = nn.Embedding(5, 4)
        self.q_proj = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.lm_head = nn.Linear(4, 7, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


def test_matrices_decay_and_norms_biases_and_positions_do_not():
    model = TinyModel()
    decayed, kept = parameter_groups(model, weight_decay=0.1)
    assert decayed["weight_decay"] == 0.1
    assert names_of(model, decayed) == {"embed_tokens.weight", "q_proj.weight"}
    assert kept["weight_decay"] == 0.0
    assert names_of(model, kept) == {"embed_positions.weight", "q_proj.bias", "norm.weight", "norm.bias"}


def test_every_trainable_parameter_is_in_exactly_one_group(tiny_model):
    tiny_model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    grouped = [
        id(parameter) for group in parameter_groups(tiny_model, weight_decay=0.1) for parameter in group["params"]
    ]
    trainable = [id(parameter) for parameter in tiny_model.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable)


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="Linear has no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), weight_decay=0.1)


def test_adamw_decays_a_matrix_by_hand_and_leaves_a_norm_alone():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.LayerNorm(2, bias=False))
    optimizer = build_adamw(model, learning_rate=0.5, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)
    matrix = model[0].weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model[0].weight, matrix * (1 - 0.5 * 0.1))
    assert torch.equal(model[1].weight, torch.ones(2))
    assert optimizer.param_groups[0]["fused"] and optimizer.param_groups[0]["betas"] == (0.9, 0.95)


def course(max_steps, **options):
    return [learning_rate_at(step, learning_rate=1.0, max_steps=max_steps, **options) for step in range(max_steps)]


def test_linear_by_hand():
    # Four steps up in quarters, then eight that would reach zero one step after the last.
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert course(12, warmup_steps=4, schedule="linear") == pytest.approx(expected)


def test_cosine_with_a_minimum_by_hand():
    half = math.sqrt(0.5)
    expected = [1.0, 0.1 + 0.9 * (1 + half) / 2, 0.1 + 0.9 / 2, 0.1 + 0.9 * (1 - half) / 2]
    assert course(4, schedule="cosine", min_lr_ratio=0.1) == pytest.approx(expected)


def test_constant_by_hand():
    assert course(4, warmup_steps=2, schedule="constant") == [0.5, 1.0, 1.0, 1.0]


def test_warmup_stable_decay_by_hand():
    # The last four of ten steps fall as 1 - sqrt(0/4), 1 - sqrt(1/4), 1 - sqrt(2/4), 1 - sqrt(3/4).
    expected = [0.5, 1, 1, 1, 1, 1, 1, 0.5, 1 - math.sqrt(0.5), 1 - math.sqrt(0.75)]
    assert course(10, warmup_steps=2, schedule="warmup_stable_decay", decay_steps=4) == pytest.approx(expected)


def test_warmup_stable_decay_falls_over_the_last_fifth_unless_told():
    rates = course(100, schedule="warmup_stable_decay")
    assert rates[:81] == [1.0] * 81
    assert rates[81] < 1


@pytest.mark.parametrize("schedule", ["cosine", "linear", "warmup_stable_decay"])
def test_the_first_step_trains_and_the_last_is_just_above_the_minimum(schedule):
    rates = course(1000, warmup_steps=100, schedule=schedule, min_lr_ratio=0.1)
    assert rates[0] == 0.01
    assert max(rates) == rates[99] == rates[100] == 1.0
    assert 0.1 < rates[-1] == min(rates[100:]) < 0.103
    after_the_end = learning_rate_at(
        5000, learning_rate=1.0, max_steps=1000, warmup_steps=100, schedule=schedule, min_lr_ratio=0.1
    )
    assert after_the_end == pytest.approx(0.1)


@pytest.mark.parametrize(
    "schedule, options, build",
    [
        ("cosine", {}, lambda o: get_cosine_schedule_with_warmup(o, 10, 50)),
        ("linear", {}, lambda o: get_linear_schedule_with_warmup(o, 10, 50)),
        ("constant", {}, lambda o: get_constant_schedule_with_warmup(o, 10)),
        (
            "warmup_stable_decay",
            {"decay_steps": 20, "min_lr_ratio": 0.1},
            lambda o: get_wsd_schedule(o, 10, 20, num_training_steps=50, decay_type="1-sqrt", min_lr_ratio=0.1),
        ),
    ],
)
def test_after_warm_up_the_course_is_that_of_transformers(schedule, options, build):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = build(optimizer)
    theirs = []
    for _ in range(50):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = [
        learning_rate_at(step, learning_rate=3e-4, max_steps=50, warmup_steps=10, schedule=schedule, **options)
        for step in range(50)
    ]
    assert ours[10:] == pytest.approx(theirs[10:])
    if not options:  # transformers' warm-up starts at zero, one step behind ours
        assert ours[:9] == pytest.approx(theirs[1:10])


def test_cosine_is_that_of_torch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=3e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20, eta_min=3e-5)
    for step in range(20):
        ours = learning_rate_at(step, learning_rate=3e-4, max_steps=20, schedule="cosine", min_lr_ratio=0.1)
        assert ours == pytest.approx(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"schedule": "cosin"}, "no schedule 'cosin'; it is one of cosine, linear"),
        ({"warmup_steps": 11}, r"warmup_steps=11 do not fit into max_steps=10"),
        (
            {"schedule": "warmup_stable_decay", "warmup_steps": 6, "decay_steps": 5},
            "warmup_steps=6 and decay_steps=5 do not fit",
        ),
        ({"decay_steps": 5}, "decay_steps belongs to the schedule 'warmup_stable_decay'; this one is 'cosine'"),
        ({"min_lr_ratio": 1e-5 * 3e5}, "min_lr_ratio is a fraction"),
    ],
)
def test_options_that_make_no_course_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        learning_rate_at(0, learning_rate=1.0, max_steps=10, **options)


@pytest.mark.parametrize("is_muon", [False, True], ids=["adamw", "muon"])
def test_a_step_that_is_to_be_skipped_changes_neither_weights_nor_state(is_muon):
    model = TinyModel()
    rates = {"learning_rate": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.95), "epsilon": 1e-8}
    optimizer = build_adamw(model, **rates)
    if is_muon:
        optimizer = build_muon(model, **rates, adam_learning_rate=0.1, momentum=0.8)

    def values() -> list[torch.Tensor]:
        state = [value for each in optimizer.state.values() for value in each.values()]
        return [tensor.detach().clone() for tensor in (*model.parameters(), *state)]

    for is_update in (True, False, True):
        before = values()
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 if is_update else math.nan)
        skip_unless(torch.tensor(is_update), optimizer)
        optimizer.step()
        assert all(map(torch.equal, before, values())) != is_update
