"""Replies of a model to the prompts of conversations, and how many of them are the responses that stand there."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.conversations import Conversation
from ..data.instruction import encode_prompt, padding_token_id


class Reply(NamedTuple):
    text: str
    is_finished: bool  # whether the model ended it, rather than running out of tokens


def stop_at_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, stop_token_id: int) -> None:
    """Let `generate` stop, from now on, at the token that ends a turn as well as at the end of a document."""
    model.generation_config.eos_token_id = sorted({tokenizer.eos_token_id, stop_token_id})
    model.generation_config.pad_token_id = padding_token_id(tokenizer)


@torch.no_grad()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Conversation],
    *,
    batch_size: int,
    max_new_tokens: int,
) -> list[Reply]:
    """The model's likeliest reply to what comes before each conversation's last response, see `stop_at_turns`."""
    was_training = model.training
    model.eval()
    prompts = [encode_prompt(question.messages[: last_response(question)], tokenizer) for question in questions]
    replies = [Reply("", False)] * len(prompts)
    ends = torch.tensor(model.generation_config.eos_token_id, device=model.device)
    # Prompts of one length together, so that nothing is padded for long; on the left, where the reply does not go.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for first in range(0, len(order), batch_size):
        some = order[first : first + batch_size]
        length = max(len(prompts[index]) for index in some)
        pad = model.generation_config.pad_token_id
        input_ids = torch.tensor([[pad] * (length - len(prompts[i])) + prompts[i] for i in some], device=model.device)
        mask = torch.tensor([[0] * (length - len(prompts[i])) + [1] * len(prompts[i]) for i in some])
        written = model.generate(
            input_ids=input_ids,
            attention_mask=mask.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            use_cache=True,
        )
        written = written[:, length:]
        is_finished = torch.isin(written, ends).any(dim=1).tolist()
        for index, text, ended in zip(some, tokenizer.batch_decode(written, skip_special_tokens=True), is_finished):
            replies[index] = Reply(text.strip(), ended)
    model.train(was_training)
    return replies


def last_response(question: Conversation) -> int:
    """The index of the last message of the assistant."""
    return max(index for index, message in enumerate(question.messages) if message["role"] == "assistant")


def exact_match(questions: Sequence[Conversation], replies: Sequence[Reply]) -> dict[str, float]:
    """The share of replies that are the response, character by character, in all and of each kind.

    How many of all `test_answers` had no end when their tokens ran out, or were empty, is told as
    `test_answers_unfinished` and `test_answers_empty`, so that nobody takes want of tokens for want of knowledge.
    """
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for question, reply in zip(questions, replies, strict=True):
        response = question.messages[last_response(question)]["content"].strip()
        for kind in ["", *([f"_{question.kind}"] if question.kind else [])]:
            asked[kind] += 1
            right[kind] += reply.text == response
    return {
        "test_answers": len(replies),
        "test_answers_unfinished": sum(not reply.is_finished for reply in replies),
        "test_answers_empty": sum(reply.is_finished and not reply.text for reply in replies),
        **{f"test_exact_match{kind}": right[kind] / asked[kind] for kind in sorted(asked)},
    }
