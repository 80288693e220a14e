"""Comparison of llama.cpp's results on a GGUF file with PyTorch's on the same weights."""

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from .gguf import Q8_BLOCK
from .llama_cpp import LlamaCpp, ask_llama_cpp


# Text that tokenizers encode differently: spaces, line ends, digits, contractions, accents composed and not, scripts,
# emoji.
TEXTS = (
    "Hello, world! It's 9:41; they'LL've gone, don't you think?",
    "  two  leading,   three inner and trailing  ",
    "tabs\t\tand\nline\n\nends\r\nof\r\n\r\nboth kinds\n   \n  indented",
    "0 1 12 123 1234 3.14159 1,000,000 0x7f 2\u00b2 \u00bd \u2167",
    "caf\u00e9 and cafe\u0301, na\u00efve and nai\u0308ve, \u00c5ngstr\u00f6m",
    "中文字符，日本語の文、한국어 русский שלום مرحبا हिन्दी",  # noqa: RUF001
    "\U0001f600\U0001f44d\U0001f3fd \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea e\u0301\u0302",
    "no-break\u00a0space, em\u2003space, zero\u200bwidth, next\u0085line, \u2028 and \ufeff",
    "def f(x, *args):\n    return {'a': x**2, \"b\": [*args]}  # done\n",
    "http://example.org/?q=a+b&c=%20#_top <b>&amp;</b> $\\frac{a}{b}$ \u201cquoted\u201d \u2014 \u2026",
)
CONVERSATION = [
    {"role": "user", "content": "  What is 1 + 1?\n"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "Caf\u00e9 \U0001f600?\r\nAnd  2 + 2?"},
]

# The tolerance of llama.cpp's logits against PyTorch's, with the file's weights. For a float32 file they differ by the
# order of additions and, for gpt2, by a GELU from a table of float16 values: at most 0.0018 of the logits' standard
# deviation over tiny, trained and eight-layer random models of the three architectures. In the other dtypes llama.cpp
# also rounds the inputs of each matrix product. The effect of that alone is measured for each model; over the same
# models, the differences were 0.8 to 1.3 times as large.
FLOOR = 0.005  # of the standard deviation
ROUNDING_FACTOR = 3.0
TOP = 20  # logits compared at each position, the largest by llama.cpp


@dataclass(frozen=True)
class NearTie:
    """A greedy token that differs where the two candidates' logits are equal up to rounding."""

    prompt: int
    position: int  # of the new tokens, from 0
    expected: int
    found: int
    gap: float  # logits, by PyTorch


@dataclass(frozen=True)
class LlamaCppComparison:
    """llama.cpp's results on the file. Differences and tolerance are in logits.

    `rounding` is the effect in PyTorch of rounding the inputs of matrix products as llama.cpp does.
    """

    release: str
    num_texts: int
    num_conversations: int
    num_prompts: int
    num_tokens: int
    largest_difference: float
    standard_deviation: float
    rounding: float
    tolerance: float
    near_ties: tuple[NearTie, ...]

    def __str__(self) -> str:
        ties = "".join(
            f"\n  prompt {tie.prompt}, new token {tie.position}: id {tie.found} instead of {tie.expected}, "
            f"{tie.gap:.1e} apart"
            for tie in self.near_ties
        )
        chats = f", {self.num_conversations} conversations rendered" if self.num_conversations else ""
        return (
            f"llama.cpp {self.release}: {self.num_texts} texts encoded the same{chats}; "
            f"{self.num_tokens - len(self.near_ties)} of {self.num_tokens} greedy tokens of {self.num_prompts} prompts "
            f"the same, largest |difference| of the {TOP} largest logits {self.largest_difference:.1e} "
            f"(tolerance {self.tolerance:.1e}, standard deviation {self.standard_deviation:.2f})"
            + (f"; near ties that went the other way:{ties}" if ties else "")
        )


def texts_for(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """TEXTS, and each control token's text between others."""
    return [*TEXTS, *(f"a{token}b {token} \n{token}" for token in tokenizer.all_special_tokens)]


def compare_with_llama_cpp(
    llama_cpp: LlamaCpp,
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    num_new: int,
    *,
    dtype: str,
    timeout: float,
) -> LlamaCppComparison:
    """Compare ids of texts, rendered conversations, and `num_new` greedy tokens after each prompt (token ids).

    `model` holds the weights as the file does, in float32 on the CPU. llama.cpp gets PyTorch's greedy tokens one at a
    time and gives its own at each step: while they are the same, this is its own greedy generation, and a near tie does
    not affect the tokens after it.

    Raises:
        RuntimeError: if anything differs by more than rounding explains.
    """
    texts = texts_for(tokenizer)
    if tokenizer.backend_tokenizer.normalizer is not None:  # llama.cpp has none, see gguf_tokenizer.py
        texts = [tokenizer.backend_tokenizer.normalizer.normalize_str(text) for text in texts]
    conversations = [
        {"messages": messages, "add_generation_prompt": add_generation_prompt, **_named_tokens(tokenizer)}
        for messages, add_generation_prompt in ((CONVERSATION, True), (CONVERSATION[:2], False))
        if tokenizer.chat_template is not None
    ]
    greedy = [_greedy(model, prompt, num_new) for prompt in prompts]
    job = {
        "model": str(path.resolve()),
        "threads": torch.get_num_threads(),
        "texts": texts,
        "conversations": conversations,
        "runs": [{"prompt": prompt, "continuation": tokens} for prompt, (tokens, _) in zip(prompts, greedy)],
        "top": TOP,
    }
    answer = ask_llama_cpp(llama_cpp, job, timeout=timeout)
    _check_encodings(answer, texts, tokenizer)
    _check_conversations(answer, conversations, tokenizer)

    largest, near_ties = 0.0, []
    for index, ((tokens, logits), steps) in enumerate(zip(greedy, answer["runs"], strict=True)):
        for position, (token, row, step) in enumerate(zip(tokens, logits, steps, strict=True)):
            ids, values = zip(*step["top"])
            theirs = torch.tensor([math.nan if value is None else value for value in values])
            difference = (row[list(ids)] - theirs).abs().max().item()
            largest = max(largest, math.inf if math.isnan(difference) else difference)
            if step["token"] != token:
                gap = (row[token] - row[step["token"]]).item()
                near_ties.append(NearTie(index, position, token, step["token"], gap))
    all_logits = torch.cat([logits for _, logits in greedy])
    rounding = _effect_of_rounding(model, prompts, greedy, dtype)
    comparison = LlamaCppComparison(
        release=answer["release"],
        num_texts=len(texts),
        num_conversations=len(answer["chats"] or []),
        num_prompts=len(prompts),
        num_tokens=len(all_logits),
        largest_difference=largest,
        standard_deviation=all_logits.std().item(),
        rounding=rounding,
        tolerance=FLOOR * all_logits.std().item() + ROUNDING_FACTOR * rounding,
        near_ties=tuple(near_ties),
    )
    if not largest <= comparison.tolerance or any(tie.gap > comparison.tolerance for tie in near_ties):
        raise RuntimeError(f"llama.cpp computes something else from {path.name} than transformers does. {comparison}")
    return comparison


def _named_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    return {name: getattr(tokenizer, name) or "" for name in ("bos_token", "eos_token")}


def _check_encodings(answer: dict[str, Any], texts: list[str], tokenizer: PreTrainedTokenizerBase) -> None:
    """Check ids with control tokens parsed and with their text left as text, and the tokens added around a text."""
    as_text = copy.deepcopy(tokenizer.backend_tokenizer)
    as_text.encode_special_tokens = True
    for text, ids, plain_ids in zip(texts, answer["encoded"], answer["encodedAsPlainText"], strict=True):
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        ours_plain = as_text.encode(text, add_special_tokens=False).ids
        if (ids, plain_ids) != (ours, ours_plain):
            raise RuntimeError(
                f"llama.cpp encodes {text!r} as {ids}, and without control tokens as {plain_ids}; this tokenizer as "
                f"{ours} and {ours_plain}."
            )
    bare, whole = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    theirs = [answer["bos"]] * answer["addsBos"] + bare + [answer["eos"]] * answer["addsEos"]
    if theirs != whole:
        raise RuntimeError(f"llama.cpp would encode 'a' as {theirs}, this tokenizer as {whole}.")
    if tokenizer.eos_token_id is not None and answer["eos"] != tokenizer.eos_token_id:
        raise RuntimeError(f"llama.cpp's eos is {answer['eos']}, this tokenizer's {tokenizer.eos_token_id}.")


def _check_conversations(
    answer: dict[str, Any], conversations: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> None:
    for conversation, chat in zip(conversations, answer["chats"] or []):
        messages, add_generation_prompt = conversation["messages"], conversation["add_generation_prompt"]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if (chat["text"], chat["ids"]) != (text, ids):
            raise RuntimeError(
                f"llama.cpp renders the chat template to {chat['text']!r} = {chat['ids']}, transformers to {text!r} = "
                f"{ids}."
            )


@torch.no_grad()
def _greedy(model: PreTrainedModel, prompt: list[int], num_new: int) -> tuple[list[int], torch.Tensor]:
    """`num_new` greedy tokens, also past an end token, and the logits they were chosen from (num_new, V)."""
    tokens, rows, cache = [], [], None
    input_ids = torch.tensor([prompt])
    for _ in range(num_new):
        output = model(input_ids=input_ids, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        rows.append(output.logits[0, -1])
        tokens.append(int(rows[-1].argmax()))
        input_ids = torch.tensor([tokens[-1:]])
    return tokens, torch.stack(rows)


@torch.no_grad()
def _effect_of_rounding(
    model: PreTrainedModel,
    prompts: list[list[int]],
    greedy: list[tuple[list[int], torch.Tensor]],
    dtype: str,
) -> float:
    """The largest difference among each position's TOP logits if the inputs of matrix products are rounded."""
    if dtype == "f32":
        return 0.0
    largest = 0.0
    with _rounding_inputs(model, dtype):
        for prompt, (tokens, logits) in zip(prompts, greedy):
            rounded = model(input_ids=torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
            top = logits.topk(min(TOP, logits.shape[-1])).indices
            largest = max(largest, (rounded - logits).gather(-1, top).abs().max().item())
    return largest


@contextmanager
def _rounding_inputs(model: nn.Module, dtype: str) -> Iterator[None]:
    """Round the inputs of matrix products to the matrix's type as ggml does: f16, bf16 or q8_0."""

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (_rounded(inputs[0], dtype), *inputs[1:])

    products = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    handles = [module.register_forward_pre_hook(hook) for module in products]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype == "bf16":
        return values.bfloat16().float()
    if dtype == "f16" or values.shape[-1] % Q8_BLOCK:
        return values.half().float()
    blocks = values.unflatten(-1, (-1, Q8_BLOCK))
    step = (blocks.abs().amax(-1, keepdim=True) / 127).clamp(min=torch.finfo().tiny)
    return ((blocks / step).round() * step.half().float()).flatten(-2)
