"""A tiny untrained model, whose replies all differ and do not end before their limit of tokens."""

from collections.abc import Iterator
from pydoc_data.topics import topics

import pytest
import torch

import hfllm
from hfllm.serving.replies import ReplyWriter
from tests.conftest import make_tiny_config


CONTEXT = 128


@pytest.fixture(scope="session")
def tokenizer():
    return hfllm.train_bpe(topics.values(), 400)


@pytest.fixture(scope="session")
def model(tokenizer) -> hfllm.GPTForCausalLM:
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = make_tiny_config("modern", vocab_size=400, max_position_embeddings=CONTEXT, **ids)
    model = hfllm.GPTForCausalLM(config).eval()
    model.generation_config.suppress_tokens = [*ids.values(), tokenizer.convert_tokens_to_ids("<|im_end|>")]
    return model


@pytest.fixture
def writer(model, tokenizer) -> Iterator[ReplyWriter]:
    writer = ReplyWriter(model, tokenizer)
    yield writer
    writer.close()
    writer.join(30)
