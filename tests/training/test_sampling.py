import pytest

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


def test_a_sample_goes_on_from_the_prompt_and_the_model_trains_on(model, tokenizer):
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
