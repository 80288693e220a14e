"""The loss on learned tokens, against transformers' own loss over all logits."""

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hfllm
from hfllm.adapters import add_lora
from hfllm.fine_tuning.responses import learned_loss, logits_only_at, shift_left
from tests.conftest import make_tiny_config


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "modern": lambda: hfllm.GPTForCausalLM(make_tiny_config("modern")),
    "soft-capped": lambda: hfllm.GPTForCausalLM(make_tiny_config("modern", final_logit_softcapping=2.0)),
    "book": lambda: hfllm.GPTForCausalLM(make_tiny_config("book")),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4)).eval(),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, num_key_value_heads=4, head_dim=8)),
    "lora": lambda: add_lora(hfllm.GPTForCausalLM(make_tiny_config("modern")), r=4),
}


@pytest.fixture
def rows():
    input_ids = torch.randint(3, 64, (2, 12))
    labels = torch.where(torch.rand(2, 12) < 0.2, input_ids, -100)
    labels[:, 0], labels[0, 5], labels[1, 11] = 7, 9, 3  # a first token is no target, a last one is
    return input_ids, labels


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradient_are_those_of_all_logits_and_fewer_are_computed(name, rows):
    input_ids, labels = rows
    model = MODELS[name]()
    model(input_ids=input_ids, labels=labels).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    loss = model(input_ids=input_ids, labels=labels).loss.item()
    model.zero_grad()

    places = shift_left(labels) != -100
    with logits_only_at(model, places):
        outputs = model(input_ids=input_ids)
    assert outputs.logits.shape == (places.sum(), 64)
    assert places.sum() == (labels[:, 1:] != -100).sum() < labels.numel() / 2
    assert learned_loss(outputs, labels).item() == pytest.approx(loss, abs=1e-6)
    learned_loss(outputs, labels).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)
    assert model(input_ids=input_ids).logits.shape == (2, 12, 64), "outside the block all logits are there again"


def test_a_sum_is_divided_by_the_count_of_the_whole_step(rows):
    input_ids, labels = rows
    model = MODELS["modern"]()
    parts = []
    for row in range(2):
        some = labels[row : row + 1]
        with logits_only_at(model, shift_left(some) != -100):
            parts.append(
                learned_loss(model(input_ids=input_ids[row : row + 1]), some, int((labels[:, 1:] != -100).sum()))
            )
    assert sum(parts).item() == pytest.approx(model(input_ids=input_ids, labels=labels).loss.item(), abs=1e-6)


def test_a_batch_in_which_nothing_is_learned_has_a_loss_and_gradient_of_zero(rows):
    input_ids, _ = rows
    labels = torch.full_like(input_ids, -100)
    model = MODELS["modern"]()
    with logits_only_at(model, shift_left(labels) != -100):
        loss = learned_loss(model(input_ids=input_ids), labels, 7)
    loss.backward()
    assert loss.item() == 0
    assert all((parameter.grad == 0).all() for parameter in model.parameters() if parameter.grad is not None)
