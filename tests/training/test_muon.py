"""Muon against linear algebra, against numpy by hand, and against itself: stacked or alone, resumed or not."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

import hfllm
from hfllm.training.checkpoint import load_checkpoint, save_checkpoint
from hfllm.training.muon import NEWTON_SCHULZ, NUM_ITERATIONS, Muon, orthogonalize
from hfllm.training.optimization import build_adamw, build_muon, hidden_matrices, scale_learning_rates
from tests.conftest import make_tiny_config
from tests.recipes.conftest import load_recipe


OPTIONS = {"learning_rate": 0.02, "adam_learning_rate": 0.01, "weight_decay": 0.1, "momentum": 0.9}
OPTIONS |= {"betas": (0.9, 0.95), "epsilon": 1e-8}


def names_of(model, parameters) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in parameters}


def build(seed=0, **overrides):
    torch.manual_seed(seed)
    model = hfllm.GPTForCausalLM(make_tiny_config("modern", **overrides))
    return model, build_muon(model, **OPTIONS)


def train(model, optimizer, steps):
    for step in steps:
        input_ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def everything(model, optimizer) -> list[torch.Tensor]:
    values = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    return [*model.parameters(), *values]


# Orthogonalising


def numpy_orthogonalize(matrix: np.ndarray) -> np.ndarray:
    """Newton and Schulz's iteration by its formula, in float64."""
    a, b, c = NEWTON_SCHULZ
    x = matrix / np.linalg.norm(matrix)
    for _ in range(NUM_ITERATIONS):
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16)])
def test_the_iteration_comes_near_to_the_svds_u_times_v(shape):
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    singular_values = torch.linspace(0.05, 1, min(shape))
    [found] = orthogonalize([u * singular_values @ v])
    assert found.shape == shape
    # The same directions, each as long as the polynomial leaves it: 0.68 to 1.21 of what U V^T has.
    lengths = u.T @ found @ v.T
    assert lengths.diagonal().min() > 0.65 and lengths.diagonal().max() < 1.25
    torch.testing.assert_close(lengths, torch.diag(lengths.diagonal()), atol=2e-5, rtol=0)


def test_the_polynomial_keeps_its_bounds_over_all_singular_values_it_is_for():
    values = np.linspace(0.0052, 1, 100_000)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NUM_ITERATIONS):
        values = a * values + b * values**3 + c * values**5
    assert values.min() > 0.68 and values.max() < 1.21


def test_matrices_of_a_stack_come_out_as_each_would_alone_and_transposed_ones_with_them():
    matrices = [torch.randn(8, 20) for _ in range(3)]
    mixed = [matrices[0], matrices[1].mT.contiguous(), matrices[2]]
    together = orthogonalize(mixed)
    for matrix, found in zip(mixed, together, strict=True):
        torch.testing.assert_close(found, orthogonalize([matrix])[0])
        np.testing.assert_allclose(found, numpy_orthogonalize(matrix.double().numpy()), atol=1e-4)


@pytest.mark.parametrize("rank", [3, 32])
@pytest.mark.parametrize("columns", [32, 48, 49, 96])  # the wide ones are multiplied by their Gram matrix
def test_a_bad_condition_and_a_low_rank_cost_no_more_than_rounding(columns, rank):
    u, _, v = torch.linalg.svd(torch.randn(32, columns), full_matrices=False)
    singular_values = torch.where(torch.arange(32) < rank, torch.logspace(0, -5, 32), 0)
    matrix = u * singular_values @ v
    np.testing.assert_allclose(orthogonalize([matrix])[0], numpy_orthogonalize(matrix.double().numpy()), atol=2e-4)


def test_a_matrix_of_zeros_stays_one():
    for shape in ((3, 4), (3, 5)):
        assert torch.equal(orthogonalize([torch.zeros(shape)])[0], torch.zeros(shape))


def test_in_bfloat16_the_directions_are_those_of_float32():
    """bfloat16 keeps 8 bits of each number; the update's length and direction stay within a percent."""
    matrices = [torch.randn(48, 128) for _ in range(3)]
    for exact, rounded in zip(orthogonalize(matrices), orthogonalize(matrices, torch.bfloat16)):
        assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.float().flatten(), dim=0) > 0.999
        assert rounded.float().norm() == pytest.approx(exact.norm().item(), rel=0.01)


# A step


def test_two_steps_by_hand():
    weights = [torch.randn(6, 3), torch.randn(3, 6)]  # one shape and its transpose: one stack
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = Muon([{"params": parameters, "orthogonal": True}], lr=0.1, momentum=0.8, weight_decay=0.5)
    own = [weight.double().numpy() for weight in weights]
    momentum = [np.zeros_like(weight) for weight in own]
    for _ in range(2):
        gradients = [torch.randn_like(weight) for weight in weights]
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient.clone()
        optimizer.step()
        for index, gradient in enumerate(gradients):
            gradient = gradient.double().numpy()
            momentum[index] = 0.8 * momentum[index] + 0.2 * gradient
            update = numpy_orthogonalize(0.8 * momentum[index] + 0.2 * gradient)
            scale = np.sqrt(2) if index == 0 else 1  # the first has twice as many rows as columns
            own[index] = own[index] * (1 - 0.1 * 0.5) - 0.1 * scale * update
    for parameter, expected in zip(parameters, own):
        np.testing.assert_allclose(parameter.detach(), expected, atol=1e-4)


def test_a_step_is_that_of_torchs_own_muon_up_to_its_rounding():
    """torch's iterates in bfloat16, which has three digits."""
    parameter, other = (nn.Parameter(torch.ones(12, 7)) for _ in range(2))
    optimizer = Muon([{"params": [parameter], "orthogonal": True}], lr=0.1, momentum=0.9, weight_decay=0.2)
    theirs = torch.optim.Muon([other], lr=0.1, momentum=0.9, weight_decay=0.2, ns_steps=NUM_ITERATIONS)
    for _ in range(3):
        parameter.grad = torch.randn(12, 7)
        other.grad = parameter.grad.clone()
        optimizer.step()
        theirs.step()
    torch.testing.assert_close(parameter, other, atol=0.01, rtol=0)


def test_what_is_not_a_hidden_matrix_takes_adamws_step_bitwise():
    model, optimizer = build()
    twin, _ = build()
    adamw = build_adamw(twin, learning_rate=0.01, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)
    for step in range(3):
        input_ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(step))
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
            other.grad = parameter.grad.clone()
        optimizer.step()
        adamw.step()
        optimizer.zero_grad()
    hidden = names_of(model, hidden_matrices(model))
    for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other) == (name not in hidden), name


def test_parameters_without_a_gradient_are_left_alone():
    model, optimizer = build()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.step()
    assert not optimizer.state
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


# Which parameters


@pytest.mark.parametrize("tied", [True, False])
def test_the_blocks_linear_layers_are_orthogonal_and_embeddings_and_head_are_not(tied):
    model, optimizer = build(tie_word_embeddings=tied, num_key_value_heads=2)
    orthogonal, decayed, kept = optimizer.param_groups
    layers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    layers += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert names_of(model, orthogonal["params"]) == {f"model.layers.{i}.{n}.weight" for i in range(2) for n in layers}
    assert names_of(model, decayed["params"]) == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert all("norm" in name for name in names_of(model, kept["params"]))
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.01, 0.01]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0.0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_biases_and_learned_positions_of_the_book_are_adamws_and_do_not_decay():
    torch.manual_seed(0)
    model = hfllm.GPTForCausalLM(make_tiny_config("book"))
    kept = names_of(model, build_muon(model, **OPTIONS).param_groups[-1]["params"])
    assert "model.embed_positions.weight" in kept and "model.layers.0.self_attn.q_proj.bias" in kept
    assert not any(name.endswith("proj.weight") for name in kept)


def test_grouped_heads_train():
    """Their key and value matrices have a shape of their own."""
    model, optimizer = build(num_key_value_heads=1)
    before = model.model.layers[0].self_attn.k_proj.weight.detach().clone()
    train(model, optimizer, range(1))
    change = model.model.layers[0].self_attn.k_proj.weight - before * (1 - 0.02 * 0.1)
    assert change.shape == (8, 32)
    # About 0.02 times a matrix of 8 orthogonal rows.
    torch.testing.assert_close(torch.linalg.matrix_norm(change, ord=2), torch.tensor(0.02), atol=0, rtol=0.2)


def test_frozen_matrices_are_in_no_group():
    model = hfllm.GPTForCausalLM(make_tiny_config("modern"))
    model.model.layers[0].requires_grad_(False)
    assert not any("layers.0" in name for name in names_of(model, hidden_matrices(model)))


def test_a_model_without_hidden_matrices_is_refused():
    with pytest.raises(ValueError, match=r"Embedding has no trainable nn\.Linear .* optimizer=adamw"):
        build_muon(nn.Embedding(3, 2), **OPTIONS)


def test_both_recipes_have_all_processes_of_the_launch_share_the_work(monkeypatch):
    model, alone = build()
    assert alone.process_group is None
    group = object()
    monkeypatch.setattr(torch.distributed, "group", SimpleNamespace(WORLD=group))
    values = {"optimizer": "muon", "learning_rate": 0.1, "adam_learning_rate": 0.1, "weight_decay": 0.0, "bf16": False}
    values |= {"adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "muon_momentum": 0.9}
    args, accelerator = SimpleNamespace(**values), SimpleNamespace(mixed_precision="no")
    assert load_recipe("pretrain").build_optimizer(args, model, accelerator).process_group is group
    assert load_recipe("finetune_instruction").muon(args, model).process_group is group


def test_what_is_not_a_matrix_cannot_be_orthogonal():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        Muon([{"params": [nn.Parameter(torch.ones(3))], "orthogonal": True}])


# Schedules and checkpoints


def test_one_factor_scales_every_groups_own_rate():
    _, optimizer = build()
    scale_learning_rates(optimizer, 0.5)
    scale_learning_rates(optimizer, 0.25)  # of what it was built with, not of what it is
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.0025, 0.0025]


def test_three_steps_saved_and_three_more_are_six_steps_bitwise(tmp_path):
    accelerator = Accelerator(cpu=True)
    straight = build(num_key_value_heads=2)
    train(*straight, range(6))
    first = build(num_key_value_heads=2)
    train(*first, range(3))
    path = save_checkpoint(tmp_path, model=first[0], optimizer=first[1], state={"step": 3}, accelerator=accelerator)
    second = build(seed=1, num_key_value_heads=2)
    load_checkpoint(path, model=second[0], optimizer=second[1], accelerator=accelerator)
    assert second[1].state_dict()["param_groups"] == first[1].state_dict()["param_groups"]
    train(*second, range(3, 6))
    for left, right in zip(everything(*straight), everything(*second), strict=True):
        assert torch.equal(left, right)


def test_a_checkpoint_of_adamw_is_refused_in_words(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, optimizer = build()
    adamw = build_adamw(model, learning_rate=0.1, weight_decay=0.0, betas=(0.9, 0.95), epsilon=1e-8)
    path = save_checkpoint(tmp_path, model=model, optimizer=adamw, state={"step": 0}, accelerator=accelerator)
    with pytest.raises(ValueError, match="the state of AdamW, and the optimizer is Muon"):
        load_checkpoint(path, model=model, optimizer=optimizer, accelerator=accelerator)


@pytest.mark.parametrize("growth", [1.0, float("inf")], ids=["finite", "not finite"])
def test_a_grad_scaler_of_torch_scales_gradients_back_and_skips_what_is_not_finite(growth):
    """As float16 needs it: the step is that of gradients that were never scaled, or none."""
    weight = torch.randn(6, 4)
    parameters = [nn.Parameter(weight.clone()) for _ in range(2)]
    optimizers = [Muon([{"params": [each], "orthogonal": True}], lr=0.1) for each in parameters]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    gradient = torch.randn(6, 4)
    parameters[0].grad, parameters[1].grad = gradient.clone(), scaler.scale(gradient) * growth
    if growth == 1.0:
        optimizers[0].step()
    scaler.step(optimizers[1])
    scaler.update()
    torch.testing.assert_close(parameters[1], parameters[0])
    assert torch.equal(parameters[1], weight) == (growth != 1.0)
    assert scaler.get_scale() == (8.0 if growth == 1.0 else 4.0)
