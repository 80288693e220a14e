"""Replies of a model to the prompts of conversations, and how many of them are the responses that stand there."""

from collections import Counter
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .conversations import Conversation
from .instruction import encode_prompt, padding_token_id


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
) -> list[str]:
    """The model's likeliest reply to what comes before each conversation's last response, see `stop_at_turns`."""
    was_training = model.training
    model.eval()
    prompts = [encode_prompt(question.messages[: last_response(question)], tokenizer) for question in questions]
    replies: list[str] = [""] * len(prompts)
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
        for index, text in zip(some, tokenizer.batch_decode(written[:, length:], skip_special_tokens=True)):
            replies[index] = text.strip()
    model.train(was_training)
    return replies


def last_response(question: Conversation) -> int:
    """The index of the last message of the assistant."""
    return max(index for index, message in enumerate(question.messages) if message["role"] == "assistant")


def exact_match(questions: Sequence[Conversation], replies: Sequence[str]) -> dict[str, float]:
    """The share of replies that are the response, character by character, in all and of each kind."""
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for question, reply in zip(questions, replies):
        for kind in ["", *([f"_{question.kind}"] if question.kind else [])]:
            asked[kind] += 1
            right[kind] += reply == question.messages[last_response(question)]["content"].strip()
    shares = {f"test_exact_match{kind}": right[kind] / asked[kind] for kind in sorted(asked)}
    return {"test_answers": len(replies), **shares}
