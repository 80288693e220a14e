import pytest
import torch

import hfllm
from hfllm.tokenization import train_bpe
from hfllm.training.sampling import draw_sample
from tests.conftest import make_tiny_config


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["the cat sees a dog. " * 5] * 10, 270)


@pytest.fixture
def model(tokenizer):
    config = make_tiny_config("book", vocab_size=len(tokenizer), eos_token_id=None, pad_token_id=0)
    return hfllm.GPTForCausalLM(config).train()


def test_a_sample_continues_from_the_prompt_and_the_model_trains_on(model, tokenizer):
    prompt_length = len(tokenizer("the cat").input_ids)
    for num_tokens, expected in ((5, prompt_length + 5), (1000, 32)):  # the model has 32 positions
        counted = []
        handle = model.lm_head.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        text = draw_sample(model, tokenizer, "the cat", num_tokens=num_tokens)
        handle.remove()
        assert text.startswith("the cat")
        assert prompt_length + len(counted) == expected
    assert model.training


def test_without_a_prompt_it_begins_a_document(model, tokenizer):
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].tolist()))
    draw_sample(model, tokenizer, "", num_tokens=2)
    assert seen[0] == [[tokenizer.bos_token_id]]


@pytest.mark.parametrize("preset", ["book", "modern"])  # learned and rotary positions
@pytest.mark.parametrize("num_prompt_tokens", [31, 32, 33, 100])
def test_of_a_prompt_that_fills_the_context_the_last_tokens_are_continued(tokenizer, preset, num_prompt_tokens):
    config = make_tiny_config(preset, vocab_size=len(tokenizer), eos_token_id=None, pad_token_id=0)
    model = hfllm.GPTForCausalLM(config)
    assert model.config.max_position_embeddings == 32
    # The start token, and a token for each letter
    prompt = "".join(chr(ord("A") + index % 26) for index in range(num_prompt_tokens - 1))
    assert len(tokenizer(prompt).input_ids) == num_prompt_tokens
    seen = []
    model.model.embed_tokens.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0].tolist()))
    for num_tokens, num_kept in ((8, 24), (1000, 16)):
        seen.clear()
        text = draw_sample(model, tokenizer, prompt, num_tokens=num_tokens)
        if num_prompt_tokens < 32:
            num_kept = num_prompt_tokens
        assert len(seen[0]) == num_kept
        assert tokenizer.decode(seen[0], skip_special_tokens=True) == prompt[-num_kept:]
        assert text.startswith(prompt[-num_kept:])
        assert len(seen) == min(num_tokens, 32 - num_kept)  # a forward pass for each new token


def test_a_context_of_one_token_has_its_sample(tokenizer):
    config = make_tiny_config("book", vocab_size=len(tokenizer), max_position_embeddings=1, eos_token_id=None)
    for prompt in ("", "the cat"):
        assert isinstance(draw_sample(hfllm.GPTForCausalLM(config), tokenizer, prompt, num_tokens=5), str)


@pytest.mark.parametrize(("num_tokens", "expected"), [(1, "a"), (2, "a"), (3, "a\u20ac"), (4, "a\u20ac")])
def test_a_character_that_the_end_of_a_sample_cuts_is_left_out(model, tokenizer, monkeypatch, num_tokens, expected):
    euro = tokenizer("\u20ac", add_special_tokens=False).input_ids  # three bytes, none of which training joined
    assert len(euro) == 3

    def generate(input_ids, *, max_new_tokens, **options):
        return torch.cat((input_ids, torch.tensor([(euro * 2)[:max_new_tokens]])), dim=1)

    monkeypatch.setattr(model, "generate", generate)
    assert draw_sample(model, tokenizer, "a", num_tokens=num_tokens) == expected
