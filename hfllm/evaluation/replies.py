"""Evaluation on conversations: the loss on responses, and exact match of a model's own replies."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.conversations import Conversation
from ..data.instruction import ConversationRows, encode_conversations, encode_prompt, padding_token_id
from .rows import score_rows


class Reply(NamedTuple):
    text: str
    is_finished: bool  # whether the model ended it, rather than running out of tokens


def stop_at_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, stop_token_id: int) -> None:
    """Set `generate` to stop at the token that ends a turn, and at the end of a document."""
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
    """The model's greedy reply in place of each conversation's last response; see `stop_at_turns`."""
    was_training = model.training
    model.eval()
    prompts = [encode_prompt(question.messages[: last_response(question)], tokenizer) for question in questions]
    replies = [Reply("", False)] * len(prompts)
    ends = torch.tensor(model.generation_config.eos_token_id, device=model.device)
    # Prompts of similar lengths share a batch, so that there is little padding; it is on the left, before the prompt.
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


def score_conversations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Conversation],
    *,
    block_size: int,
    batch_size: int,
    max_new_tokens: int | None = None,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """`test_loss` in nats per token of the responses, each counted once, and the counts of what was read.

    With `max_new_tokens` the model also answers each prompt, and `exact_match` compares the replies.
    """
    encoded = encode_conversations(list(conversations), tokenizer, max_length=block_size)
    rows = ConversationRows(encoded, block_size=block_size, pad_token_id=padding_token_id(tokenizer), packing=False)
    order = np.argsort([-length for length in rows.lengths], kind="stable")  # similar lengths share a batch
    loss, num_tokens = score_rows(model, rows, order, batch_size=batch_size, accelerator=accelerator)
    numbers = {
        "test_loss": loss,
        "test_response_tokens": num_tokens,
        "test_conversations": len(encoded.rows),
        "test_truncated": encoded.account["truncated"],
        "test_dropped": encoded.account["dropped"],
    }
    if max_new_tokens is None:
        return numbers
    stop_at_turns(model, tokenizer, stop_token_id=encoded.stop_token_id)
    questions = [conversations[row.index] for row in encoded.rows]
    own = range(accelerator.process_index, len(questions), accelerator.num_processes)
    asked = [questions[index] for index in own]
    replies = answer(model, tokenizer, asked, batch_size=batch_size, max_new_tokens=max_new_tokens)
    by_index = dict(gather_object(list(zip(own, replies))))
    return numbers | exact_match(questions, [by_index[index] for index in range(len(questions))])


def last_response(question: Conversation) -> int:
    """The index of the last message of the assistant."""
    return max(index for index, message in enumerate(question.messages) if message["role"] == "assistant")


def exact_match(questions: Sequence[Conversation], replies: Sequence[Reply]) -> dict[str, float]:
    """The share of replies that equal the response, as `metrics/exact_answer` counts them, in all and of each kind.

    `test_answers_unfinished` of the `test_answers` reached their limit of tokens, and `test_answers_empty` were empty:
    replies that are too short can look like missing knowledge.
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
