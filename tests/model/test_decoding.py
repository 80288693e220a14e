"""GPTLinear multiplies a single row in another routine: the same numbers, from the present weights."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import hfllm
from hfllm.model import kernels_gpt
from hfllm.model.kernels_gpt import HAS_MKL, SMALLEST_WEIGHT, GPTLinear
from tests.conftest import make_tiny_config


@pytest.fixture(autouse=True)
def even_for_small_weights(monkeypatch):
    monkeypatch.setattr(kernels_gpt, "SMALLEST_WEIGHT", 0)


@pytest.fixture(params=[True, False], ids=["bias", "no bias"])
def linear(request) -> GPTLinear:
    return GPTLinear(24, 40, bias=request.param)


@pytest.fixture
def num_batched(monkeypatch) -> list:
    """Grows by one with each product that takes the other routine."""
    calls = []
    for name in ("bmm", "baddbmm"):
        function = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *args, function=function: calls.append(1) or function(*args))
    return calls


@torch.no_grad()
def test_a_row_is_multiplied_as_by_the_linear_layer_in_the_other_routine(linear, num_batched):
    for shape in [(1, 1, 24), (1, 24), (24,)]:
        x = torch.randn(shape)
        expected = x @ linear.weight.T + (0 if linear.bias is None else linear.bias)
        torch.testing.assert_close(linear(x), expected)
    assert len(num_batched) == (3 if HAS_MKL else 0)


@torch.no_grad()
def test_small_weights_are_left_to_the_linear_layer(num_batched, monkeypatch):
    monkeypatch.setattr(kernels_gpt, "SMALLEST_WEIGHT", SMALLEST_WEIGHT)
    GPTLinear(128, 128)(torch.randn(1, 128))
    assert not num_batched
    GPTLinear(128, 384)(torch.randn(1, 128))
    assert len(num_batched) == (1 if HAS_MKL else 0)


def test_other_inputs_and_weights_take_the_ordinary_product(linear, num_batched):
    row = torch.randn(1, 1, 24)
    assert linear(row).requires_grad, "with gradients"
    with torch.no_grad():
        torch.testing.assert_close(linear(torch.randn(2, 1, 24)).shape, torch.Size([2, 1, 40]))
        assert copy.deepcopy(linear).bfloat16()(row.bfloat16()).dtype == torch.bfloat16
        assert GPTLinear(24, 41)(row).shape == (1, 1, 41), "41 rows are not cut into 8 blocks"
        torch.compile(linear, backend="eager", fullgraph=True)(row)
    assert not num_batched


@torch.no_grad()
def test_hooks_see_the_row_and_change_its_product(linear):
    row, seen = torch.randn(1, 1, 24), []
    before = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    after = linear.register_forward_hook(lambda *_: torch.zeros(1))
    assert linear(row) == 0 and seen == [(1, 1, 24)]
    before.remove(), after.remove()
    linear.forward = lambda x: torch.ones(1)  # as accelerate hooks in
    assert linear(row) == 1


@torch.no_grad()
def test_decoding_sees_a_weight_that_changes_between_two_tokens(tiny_model):
    def next_logits(model: nn.Module) -> torch.Tensor:
        cache = model(torch.tensor([[5, 6, 7]])).past_key_values
        return model(torch.tensor([[8]]), past_key_values=cache).logits[0, -1]

    whole = torch.tensor([[5, 6, 7, 8]])
    next_logits(tiny_model)
    tiny_model.model.layers[0].self_attn.q_proj.weight.mul_(-2)
    torch.testing.assert_close(next_logits(tiny_model), tiny_model(whole).logits[0, -1])
    twin = copy.deepcopy(tiny_model)
    twin.load_state_dict({name: 0.5 * weight for name, weight in tiny_model.state_dict().items()})
    torch.testing.assert_close(next_logits(twin), twin(whole).logits[0, -1])
    twin = twin.double()
    torch.testing.assert_close(next_logits(twin), twin(whole).logits[0, -1])


@pytest.mark.parametrize("preset", ["modern", "book"])
def test_decoding_with_lora_on_a_layer_that_was_decoded_with_before_uses_it(preset):
    model = hfllm.GPTForCausalLM(make_tiny_config(preset)).eval()
    prompt = {"input_ids": torch.tensor([[5, 6, 7]]), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    scored = {"output_logits": True, "return_dict_in_generate": True}
    model.generate(**prompt)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)).eval()
    found = adapted.generate(**prompt, **scored)
    logits = adapted(found.sequences).logits[0, 2:-1]
    torch.testing.assert_close(torch.cat(found.logits), logits, atol=1e-4, rtol=1e-4)
    assert not any("block" in name for name in model.state_dict())
