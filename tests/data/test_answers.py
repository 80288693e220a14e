"""Replies written side by side: padding stands on the left, where a reply does not go."""

import pytest
import torch

import hfllm
from hfllm.data.answers import answer, exact_match, stop_at_turns
from hfllm.data.conversations import Conversation
from tests.conftest import make_tiny_config
from tests.recipes.conftest import make_sentences


QUESTIONS = [
    "a dog",
    "one fish sees the cat, and the cat sees one fish",
    "the bird",
    "three birds or one fish or a dog",
]


@pytest.mark.parametrize("preset", ["modern", "book"])
def test_prompts_of_different_lengths_get_the_replies_that_each_gets_alone(preset):
    tokenizer = hfllm.train_bpe(make_sentences(60), 300)
    config = make_tiny_config(preset, vocab_size=300, max_position_embeddings=128)
    model = hfllm.GPTForCausalLM(config)
    stop_at_turns(model, tokenizer, stop_token_id=tokenizer.eos_token_id)
    questions = [
        Conversation([{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}], text)
        for text in QUESTIONS
    ]
    options = {"max_new_tokens": 8}
    alone = [answer(model, tokenizer, [question], batch_size=1, **options)[0] for question in questions]
    assert answer(model, tokenizer, questions, batch_size=4, **options) == alone
    assert len(set(alone)) > 1  # they depend on the question
    assert exact_match(questions, ["yes", *alone[1:]])["test_exact_match"] >= 0.25


def test_padding_on_the_right_would_change_what_is_written():
    """What the test above guards against: the reply would begin after the padding, and see itself far away."""
    model = hfllm.GPTForCausalLM(make_tiny_config("book")).eval()
    text, pads = torch.tensor([[5, 9, 7]]), torch.full((1, 4), 2)
    written = []
    for ids, mask in (
        (text, [[1, 1, 1]]),
        (torch.cat([pads, text], 1), [[0, 0, 0, 0, 1, 1, 1]]),
        (torch.cat([text, pads], 1), [[1, 1, 1, 0, 0, 0, 0]]),
    ):
        out = model.generate(
            ids, attention_mask=torch.tensor(mask), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        written.append(out[0, ids.shape[1] :].tolist())
    assert written[0] == written[1] != written[2]
