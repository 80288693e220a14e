"""Conversations as token ids and a mask of the learned tokens, packed into rows.

A conversation is rendered and tokenised once, as a whole, by the model's own chat template: if prompt and response were
tokenised separately, the tokens where they meet could differ from what the model sees when it answers. The responses
are learned, each with the token that ends the turn, so that the model learns to stop.
"""

import bisect
import functools
import inspect
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .conversations import Conversation, Messages, is_learned
from .templates import check_template, without_control_tokens


GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
INPUTS = ("input_ids", "position_ids")
BATCH = 512  # conversations rendered and tokenised at a time
PROMPTS_CHECKED = 32  # conversations; a wrong template is wrong in all of them


@dataclass(frozen=True)
class EncodedConversation:
    input_ids: np.ndarray  # (T,) int32
    is_learned: np.ndarray  # (T,) bool
    index: int  # in the conversations that were given


@dataclass(frozen=True)
class EncodedConversations:
    rows: list[EncodedConversation]
    account: dict[str, int]
    stop_token_id: int  # the token that ends a response

    def summary(self) -> str:
        """What became of the conversations, in words."""
        account = self.account
        share = account["learned_tokens"] / max(1, account["tokens"])
        text = (
            f"{account['conversations']:,} conversations, {account['tokens']:,} tokens, of which "
            f"{account['learned_tokens']:,} are learned ({share:.1%})"
        )
        if account["truncated"]:
            text += f"; {account['truncated']:,} were longer than the context and cut at their end"
        if account["dropped"]:
            text += f", {account['dropped']:,} of them dropped: nothing was left to learn"
        return text


def encode_conversations(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    train_on_prompt: bool = False,
) -> EncodedConversations:
    """Token ids, and which of them are learned; the tokenizer's chat template says how a conversation is written.

    The learned tokens are those that the template puts between `{% generation %}` and `{% endgeneration %}`. A template
    without these is rendered turn by turn to find the responses' places in the text, and refused if one rendering does
    not continue the one before. A template is also refused if its generation prompt differs from the prompt in
    training. With `train_on_prompt`, all tokens but the first are learned.

    A response with the weight 0 is read but not learned. A conversation longer than `max_length` tokens is cut at its
    end, and dropped if nothing to learn is left of it; it is an error if all are dropped. A response that does not end
    with a control token is an error too: the model would never stop.
    """
    check_template(tokenizer)
    encoded: list[EncodedConversation] = []
    account = dict.fromkeys(("conversations", "tokens", "learned_tokens", "truncated", "dropped"), 0)
    stop_ids: set[int] = set()
    for first in range(0, len(conversations), BATCH):
        some = conversations[first : first + BATCH]
        for index, (token_ids, mask) in enumerate(_encode_batch(some, tokenizer), start=first):
            _check_mask(mask, conversations[index])
            if index < PROMPTS_CHECKED:
                _check_prompt(token_ids, mask, conversations[index], tokenizer)
            stop_ids |= set(token_ids[mask & ~np.append(mask[1:], False)].tolist())
            unlearned = _unlearned_responses(mask, conversations[index])
            if train_on_prompt:
                mask = np.ones_like(mask)
            mask &= ~unlearned
            mask[0] = False  # nothing comes before it
            account["truncated"] += len(token_ids) > max_length
            token_ids, mask = token_ids[:max_length], mask[:max_length]
            if not mask.any():
                account["dropped"] += 1
                continue
            account["conversations"] += 1
            account["tokens"] += len(token_ids)
            account["learned_tokens"] += int(mask.sum())
            encoded.append(EncodedConversation(token_ids, mask, index))
    if not encoded:
        raise ValueError(
            f"Nothing is left to learn: of all {len(conversations):,} conversations the first {max_length:,} tokens "
            "hold no response. Choose a longer block_size, or a model with a longer context."
        )
    return EncodedConversations(encoded, account, _the_stop_token(stop_ids, tokenizer))


def render(messages: Messages, tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = False) -> str:
    """The text of a conversation as training, evaluation and chat see it, character by character."""
    cleaned = without_control_tokens(messages, tokenizer)
    return tokenizer.apply_chat_template(cleaned, tokenize=False, add_generation_prompt=add_generation_prompt)


def encode_prompt(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids after which the model answers. The template writes the bos, so none is added."""
    text = render(messages, tokenizer, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def padding_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that pads rows: the pad token's, or else the eos's. Positions, labels and masks say what is padding."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def _encode_batch(
    conversations: Sequence[Conversation], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[np.ndarray, np.ndarray]]:
    cleaned = [without_control_tokens(conversation.messages, tokenizer) for conversation in conversations]
    if GENERATION_BLOCK.search(str(tokenizer.chat_template)):
        batch = tokenizer.apply_chat_template(cleaned, return_dict=True, return_assistant_tokens_mask=True)
        rows = list(zip(batch["input_ids"], batch["assistant_masks"]))
    else:
        rows = [_encode_by_turns(messages, tokenizer) for messages in cleaned]
    return [(np.array(ids, dtype=np.int32), np.array(mask, dtype=bool)) for ids, mask in rows]


def _encode_by_turns(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """For templates without generation marks: find the responses by rendering longer and longer conversations."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:turn], tokenize=False, add_generation_prompt=True)
        through = tokenizer.apply_chat_template(messages[: turn + 1], tokenize=False)
        if not (text.startswith(through) and through.startswith(prompt)):
            raise ValueError(
                f"The chat template of {tokenizer.name_or_path!r} has no {{% generation %}} block, and writes a "
                "conversation otherwise than its beginning, so what is to be learned cannot be found. Put "
                "{% generation %} and {% endgeneration %} around what the assistant says and the token that ends it."
            )
        spans.append((len(prompt), len(through.rstrip())))
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    mask = []
    for start, end in encoding["offset_mapping"]:
        inside = [first <= start and end <= last for first, last in spans]
        crosses = any(start < first < end for first, last in spans)
        if crosses:
            raise ValueError(
                f"The tokenizer of {tokenizer.name_or_path!r} has a token in which the prompt ends and the response "
                f"begins, {text[start:end]!r}: the model would not see that prompt when it answers. Correct the chat "
                "template, so that a control token or a newline is between them."
            )
        mask.append(any(inside) and end > start)
    return encoding["input_ids"], mask


def _check_mask(mask: np.ndarray, conversation: Conversation) -> None:
    """Refuse a template with `{% generation %}` in the wrong place, where nothing or everything would be learned."""
    if not mask.any() or mask.all():
        what = "all" if mask.all() else "none"
        raise ValueError(
            f"{conversation.place}: by the chat template {what} of the {len(mask):,} tokens are learned. Put "
            "{% generation %} and {% endgeneration %} around what the assistant says, and nothing else."
        )


def _unlearned_responses(mask: np.ndarray, conversation: Conversation) -> np.ndarray:
    """The tokens of the responses with weight 0, where each response is a run of tokens in the mask."""
    responses = [message for message in conversation.messages if message["role"] == "assistant"]
    if all(map(is_learned, responses)):
        return np.zeros_like(mask)
    starts = mask & ~np.append(False, mask[:-1])
    if starts.sum() != len(responses):
        raise ValueError(
            f"{conversation.place}: the chat template puts nothing between some of its {len(responses):,} responses, "
            "so those of weight 0 cannot be told from the others."
        )
    number = np.cumsum(starts) - 1  # of the response that a token is in, or after
    return mask & ~np.array([is_learned(message) for message in responses])[number]


def _check_prompt(
    token_ids: np.ndarray, mask: np.ndarray, conversation: Conversation, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Check that the text before the last response equals what `add_generation_prompt` gives, to the last space."""
    is_start = mask & ~np.append(False, mask[:-1])
    before = token_ids[: int(np.flatnonzero(is_start)[-1])].tolist()
    last = max(turn for turn, message in enumerate(conversation.messages) if message["role"] == "assistant")
    prompt = encode_prompt(conversation.messages[:last], tokenizer)
    if before != prompt:
        raise ValueError(
            f"{conversation.place}: the chat template of {tokenizer.name_or_path!r} writes another prompt with "
            f"add_generation_prompt, ending in {tokenizer.decode(prompt[-8:])!r}, than before a response in "
            f"training, ending in {tokenizer.decode(before[-8:])!r}. Correct it, to the last space and newline."
        )


def _the_stop_token(stop_ids: set[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """The one token that ends the responses."""
    added = tokenizer.added_tokens_decoder
    if len(stop_ids) == 1 and (stop := next(iter(stop_ids))) in added:
        return stop
    endings = ", ".join(repr(tokenizer.decode([token_id])) for token_id in sorted(stop_ids)[:5])
    raise ValueError(
        f"The chat template of {tokenizer.name_or_path!r} lets responses end with {endings}"
        f"{' and others' if len(stop_ids) > 5 else ''}, and not with one control token, so the model would never learn "
        "to stop. Put the token that ends a turn inside {% generation %}."
    )


class ConversationRows:
    """Rows of one or several conversations each, read at random, padded to the longest of a batch.

    `position_ids` restart at 0 with each conversation, which keeps them apart in the model, and are 0 on padding.
    """

    def __init__(self, encoded: EncodedConversations, *, block_size: int, pad_token_id: int, packing: bool = True):
        self.encoded = encoded
        self.block_size = block_size
        self.pad_token_id = pad_token_id
        lengths = [len(row.input_ids) for row in encoded.rows]
        self.contents = pack(lengths, block_size) if packing else [[index] for index in range(len(lengths))]
        self.lengths = [sum(lengths[index] for index in row) for row in self.contents]
        self.num_bytes = 0  # unknown: responses are compared by their tokens
        self.tokens_seen = self.places_seen = 0  # in the batches made so far, without and with padding

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """A row as `input_ids`, `position_ids` and `labels`, (T,) each; labels are not shifted, -100 is not learned."""
        parts = [self.encoded.rows[number] for number in self.contents[index]]
        input_ids = np.concatenate([part.input_ids for part in parts])
        is_learned = np.concatenate([part.is_learned for part in parts])
        return {
            "input_ids": input_ids,
            "position_ids": np.concatenate([np.arange(len(part.input_ids)) for part in parts]),
            "labels": np.where(is_learned, input_ids, -100),
        }

    def collate(self, rows: Sequence[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        """A batch (B, T) of rows for the model, without an attention mask, which would let the conversations mix."""
        length = max(len(row["input_ids"]) for row in rows)
        fillings = {"input_ids": self.pad_token_id, "position_ids": 0, "labels": -100}
        batch = {}
        for name, filling in fillings.items():
            array: np.ndarray = np.full((len(rows), length), filling, dtype=np.int64)
            for number, row in enumerate(rows):
                array[number, : len(row[name])] = row[name]
            batch[name] = torch.from_numpy(array)
        self.tokens_seen += sum(len(row["input_ids"]) for row in rows)
        self.places_seen += len(rows) * length
        return batch

    def batch(self, indices: np.ndarray, *, count_once: bool = False) -> dict[str, torch.Tensor]:
        """The rows as `hfllm.evaluation.rows` reads them; every target is in one row only, so counted once."""
        batch = self.collate([self[int(index)] for index in indices])
        labels = batch.pop("labels")
        shifted = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], dim=1)
        return {**batch, "shift_labels": shifted}

    @property
    def packing_waste(self) -> float:
        """The share of the rows' places that packing left empty; batches are padded to their longest row only."""
        return 1 - sum(self.lengths) / (self.block_size * len(self.lengths))

    @property
    def seen_padding_share(self) -> float:
        """The share of padding in the batches made so far."""
        return 1 - self.tokens_seen / max(1, self.places_seen)


def pack(lengths: Sequence[int], block_size: int) -> list[list[int]]:
    """The conversations of each row of at most `block_size` tokens: best fit, longest first; none is cut."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        assert 0 < lengths[index] <= block_size, "encode_conversations cut them"
        place = bisect.bisect_left(room, (lengths[index], -1))
        if place == len(room):
            left, row = block_size, len(rows)
            rows.append([])
        else:
            left, row = room.pop(place)
        rows[row].append(index)
        bisect.insort(room, (left - lengths[index], row))
    return rows


@torch.no_grad()
def check_packing(model: PreTrainedModel, rows: ConversationRows) -> None:
    """Compare a row of several conversations with each of them alone; it is an error if the model lets them mix."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__} takes no position_ids, which keep conversations apart.")
    shared = [index for index, row in enumerate(rows.contents) if len(row) > 1]
    if not shared:
        return
    was_training = model.training
    model.eval()
    row = {name: torch.from_numpy(rows[shared[0]][name])[None].long().to(model.device) for name in INPUTS}
    together = model(**row, use_cache=False).logits[0].float()
    start = len(rows.encoded.rows[rows.contents[shared[0]][0]].input_ids)
    end = start + len(rows.encoded.rows[rows.contents[shared[0]][1]].input_ids)
    alone = model(input_ids=row["input_ids"][:, start:end], use_cache=False).logits[0].float()
    model.train(was_training)
    difference = (together[start:end] - alone).abs().max() / alone.abs().max().clamp(min=1e-6)
    if difference > 0.05:
        raise ValueError(
            f"{type(model).__name__} lets conversations that share a row see each other (logits differ by "
            f"{difference:.0%}). Give each a row of its own with packing=false."
        )


def mark_learned(row: EncodedConversation, tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation as text, with what is learned of it between >> and <<."""
    pieces = []
    starts = [0, *(np.flatnonzero(np.diff(row.is_learned)) + 1), len(row.input_ids)]
    for start, end in itertools.pairwise(starts):
        text = tokenizer.decode(row.input_ids[start:end].tolist())
        pieces.append(f">>{text}<<" if row.is_learned[start] else text)
    return "".join(pieces)


def fit_messages(
    messages: Messages, tokenizer: PreTrainedTokenizerBase, *, max_prompt_length: int
) -> tuple[Messages, list[int], int]:
    """The newest messages whose prompt fits into a number of tokens, its ids, and how many messages were dropped.

    The oldest turns go first, a question together with its answer; the system message stays. The prompt is encoded
    again: the keys and values of a longer conversation were computed at other positions and after what was dropped.
    """
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = messages[len(system) :]
    drops = range(0, len(turns), 2)

    @functools.cache
    def prompt(dropped: int) -> list[int]:
        return encode_prompt([*system, *turns[dropped:]], tokenizer)

    def fits(dropped: int) -> bool:
        return len(prompt(dropped)) <= max_prompt_length

    # Bisection: a long conversation is encoded a few times, and not once for each turn that is dropped.
    number = 0 if fits(0) else bisect.bisect_left(drops, True, lo=1, key=fits)
    if number == len(drops):
        raise ValueError(
            f"With this message alone the prompt has {len(prompt(drops[-1])):,} tokens, and there is room for "
            f"{max_prompt_length:,}. Shorten it{', or the system message' if system else ''}."
        )
    return [*system, *turns[drops[number] :]], prompt(drops[number]), drops[number]
