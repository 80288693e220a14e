"""Replies to prompts of different lengths in one batch, and how many of them are right."""

from pydoc_data.topics import topics

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import hfllm
from hfllm.data.conversations import Conversation, pair
from hfllm.evaluation.replies import Reply, answer, exact_match, stop_at_turns
from tests.conftest import make_tiny_config


@pytest.fixture(scope="module")
def tokenizer():
    return hfllm.train_bpe(topics.values(), 400)


MODELS = {
    "modern": lambda: hfllm.GPTForCausalLM(make_tiny_config("modern", vocab_size=400, max_position_embeddings=128)),
    "book": lambda: hfllm.GPTForCausalLM(make_tiny_config("book", vocab_size=400, max_position_embeddings=128)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3)
    ),
}


@pytest.mark.parametrize("pad_token", ["<|pad|>", None], ids=["own pad", "pad is eos"])
@pytest.mark.parametrize("name", MODELS)
def test_a_reply_in_a_padded_batch_is_the_reply_alone(name, pad_token, tokenizer):
    tokenizer.pad_token = pad_token
    model = MODELS[name]().eval()
    stop_at_turns(model, tokenizer, stop_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"))
    questions = [Conversation(pair("why " * number, "?"), "here") for number in (9, 1, 5, 2, 14)]
    alone = answer(model, tokenizer, questions, batch_size=1, max_new_tokens=12)
    assert answer(model, tokenizer, questions, batch_size=5, max_new_tokens=12) == alone
    assert len(set(alone)) > 1
    prompt = tokenizer.apply_chat_template(questions[1].messages[:1], add_generation_prompt=True, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    has_end = bool({1, 4} & set(written.tolist()))
    assert alone[1] == Reply(tokenizer.decode(written, skip_special_tokens=True).strip(), has_end)


def test_generating_stops_at_the_end_of_a_turn_and_of_a_document(tokenizer):
    model = MODELS["modern"]()
    stop_at_turns(model, tokenizer, stop_token_id=4)
    assert model.generation_config.eos_token_id == [1, 4]


def test_exact_match_counts_every_reply_once_and_each_kind_by_itself():
    kinds = ["sum", "sum", "list", None]
    questions = [Conversation(pair("Q", " 7 "), "here", kind) for kind in kinds]
    assert exact_match(questions, [Reply(text, True) for text in ("7", "8", "7", "7.")]) == {
        "test_answers": 4,
        "test_answers_unfinished": 0,
        "test_answers_empty": 0,
        "test_exact_match": 0.5,
        "test_exact_match_list": 1,
        "test_exact_match_sum": 0.5,
    }


def test_a_response_that_is_not_learned_is_no_reference_for_replies(tokenizer):
    """A bad answer of weight 0 stands there so that the model reads it, and not so that it repeats it."""
    messages = [*pair("Q", "good"), {"role": "user", "content": "Q2"}]
    messages.append({"role": "assistant", "content": "bad", "weight": 0})
    asked = [Conversation(messages, "here")]
    assert exact_match(asked, [Reply("good", True)])["test_exact_match"] == 1
    assert exact_match(asked, [Reply("bad", True)])["test_exact_match"] == 0
    model = MODELS["modern"]().eval()
    stop_at_turns(model, tokenizer, stop_token_id=4)
    first = [Conversation(messages[:2], "here")]
    replies = [answer(model, tokenizer, some, batch_size=1, max_new_tokens=8) for some in (asked, first)]
    assert replies[0] == replies[1]


def test_replies_without_an_end_and_empty_ones_are_counted():
    questions = [Conversation(pair("Q", "7"), "here")] * 4
    numbers = exact_match(questions, [Reply("7", False), Reply("", False), Reply("", True), Reply("7", True)])
    assert numbers["test_answers_unfinished"] == 2 and numbers["test_answers_empty"] == 1
    assert numbers["test_exact_match"] == 0.5


def test_a_reply_without_an_end_within_its_tokens_says_so(tokenizer):
    model = MODELS["modern"]().eval()
    stop_at_turns(model, tokenizer, stop_token_id=4)
    question = [Conversation(pair("why", "?"), "here")]
    [cut] = answer(model, tokenizer, question, batch_size=1, max_new_tokens=3)
    assert not cut.is_finished
    prompt = tokenizer.apply_chat_template(question[0].messages[:1], add_generation_prompt=True, return_tensors="pt")
    third = model.generate(**prompt, max_new_tokens=3, do_sample=False)[0, -1].item()
    model.generation_config.eos_token_id = [1, third]
    [ended] = answer(model, tokenizer, question, batch_size=1, max_new_tokens=3)
    assert ended.is_finished


def test_training_and_evaluation_leave_the_mode_as_it_was(tokenizer):
    model = MODELS["modern"]().train()
    stop_at_turns(model, tokenizer, stop_token_id=4)
    answer(model, tokenizer, [Conversation(pair("Q", "A"), "here")], batch_size=1, max_new_tokens=1)
    assert model.training and not torch.is_inference_mode_enabled()


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
