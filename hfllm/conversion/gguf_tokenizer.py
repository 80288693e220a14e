"""The entries of a GGUF file for a byte-level BPE tokenizer, with which llama.cpp gives the same ids."""

import json
import logging
import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase


logger = logging.getLogger(__name__)

# llama.cpp cuts text into words by built-in patterns, which a GGUF file can only name. Each name here was tested
# against the tokenizers library (tests/conversion/test_llama_cpp.py).
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_PATTERN = _QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# (pattern, whether a word that equals a token becomes that token without merging) -> llama.cpp's name
_PRE_TOKENIZERS = {
    (_GPT2_PATTERN, False): "gpt-2",
    (_QWEN2_PATTERN, False): "qwen2",
    (_LLAMA3_PATTERN, True): "llama-bpe",
    (_LLAMA3_PATTERN, False): "smaug-bpe",
}
_KNOWN = "GPT-2's, Qwen2's (which train_bpe uses) and Llama 3's"

# The types of tokens, numbered as in llama.cpp's llama_token_type.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


@dataclass(frozen=True)
class GGUFTokenizer:
    """The `tokenizer.*` keys of a GGUF file.

    Attributes:
        pre: llama.cpp's name of the pattern that cuts text into words.
        tokens: One text for each row of the embedding: in the byte alphabet, or as it is for added tokens.
        token_types: NORMAL, CONTROL (only from a chat template or with "parse special"), USER_DEFINED or UNUSED.
        merges: `"left right"`, the first learned first.
        eot_id: The token that ends a turn of a chat, if it is not the eos.
        add_bos, add_eos: Whether encoding a text adds the token at its start or end.
        chat_template: One template, or several by name.
    """

    pre: str
    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    bos_id: int
    eos_id: int
    eot_id: int | None
    pad_id: int | None
    add_bos: bool
    add_eos: bool
    chat_template: str | dict[str, str] | None


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> GGUFTokenizer:
    """The tokenizer in the form of a GGUF file, with as many tokens as the model's embedding has rows.

    Raises:
        ValueError: if llama.cpp cannot split text as this tokenizer does, or tokenizer and model do not belong
        together.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} has no tokenizer.json: GGUF export needs a byte-level BPE.")
    state = json.loads(backend.to_str())
    pre = _pre_tokenizer(state)
    tokens, token_types = _tokens(state, num_rows=model.get_input_embeddings().weight.shape[0])
    bos_id, eos_id, eot_id = _special_ids(tokenizer, model, tokens, token_types)
    add_bos, add_eos = _added_around(tokenizer, bos_id, eos_id)
    template = getattr(tokenizer, "chat_template", None)
    return GGUFTokenizer(
        pre=pre,
        tokens=tokens,
        token_types=token_types,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]],
        bos_id=bos_id,
        eos_id=eos_id,
        eot_id=eot_id,
        pad_id=tokenizer.pad_token_id,
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=(
            {name: without_generation_tags(text) for name, text in template.items()}
            if isinstance(template, dict)
            else template and without_generation_tags(template)
        ),
    )


def without_generation_tags(template: str) -> str:
    """The same template with `{% generation %}`, which marks the learned text, replaced by `{% if true %}`.

    Rendered text stays exactly the same, trimmed whitespace included. Only transformers and some engines know the tag;
    others refuse to load a model whose template has it (llama-cpp-python before its pull request 2226).
    """
    template = re.sub(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})", r"\1if true\2", template)
    return re.sub(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})", r"\1endif\2", template)


def _pre_tokenizer(state: dict[str, Any]) -> str:
    """llama.cpp's name for the way a tokenizer.json splits text; otherwise an error that says what was found."""
    model = state["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        kind = "a SentencePiece-like BPE (byte_fallback)" if model["type"] == "BPE" else f"a {model['type']} model"
        raise ValueError(
            f"The tokenizer is {kind}, as Llama 2's is; GGUF export is for byte-level BPE: {_KNOWN}. For this one use "
            "llama.cpp's own convert_hf_to_gguf.py."
        )
    for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(option):
            raise ValueError(f"The tokenizer's BPE has {option}={model[option]!r}, which llama.cpp does not know.")

    normalizer = state.get("normalizer")
    if normalizer is not None:
        if normalizer["type"] != "NFC":
            raise ValueError(
                f"The tokenizer normalizes text ({normalizer['type']}) before it splits it; llama.cpp does not, and "
                "would give other ids. A tokenizer for GGUF has no normalizer, like those of train_bpe."
            )
        logger.warning(
            "The tokenizer first normalizes text to Unicode's NFC; llama.cpp does not. Ids are equal for text in NFC, "
            "as nearly all text is; decomposed accents ('e' + U+0301) get other ids there."
        )

    steps = state.get("pre_tokenizer") or {"type": "nothing"}
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    patterns = []
    for step in steps:
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            patterns.append(step["pattern"].get("Regex"))
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            patterns += [_GPT2_PATTERN] if step["use_regex"] else []
        else:
            raise ValueError(
                f"The tokenizer's pre-tokenizer has a step that llama.cpp does not know: {json.dumps(step):.200}. "
                f"Known are {_KNOWN}."
            )
    if not steps or steps[-1]["type"] != "ByteLevel":
        raise ValueError(f"The tokenizer is not byte-level: it splits text by {json.dumps(steps):.200}.")
    ignore_merges = bool(model.get("ignore_merges"))
    name = _PRE_TOKENIZERS.get((patterns[0], ignore_merges), "") if len(patterns) == 1 else ""
    if not name:
        raise ValueError(
            f"llama.cpp has no name for how this tokenizer splits text: {patterns!r}, ignore_merges={ignore_merges}. "
            f"Known are {_KNOWN}. Train one with train_bpe, or add it to hfllm/conversion/gguf_tokenizer.py if "
            "llama.cpp now has it."
        )
    return name


def _tokens(state: dict[str, Any], *, num_rows: int) -> tuple[list[str], list[int]]:
    """The text and type of each id. Rows of the embedding without a token are UNUSED, with a name that no token has."""
    text_of = {token_id: text for text, token_id in state["model"]["vocab"].items()}
    type_of = dict.fromkeys(text_of, NORMAL)
    for token in state["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise ValueError(
                f"The token {token['content']!r} includes whitespace or matches whole words only (lstrip, rstrip, "
                "single_word); llama.cpp does not do that. Save the tokenizer without these flags."
            )
        text_of[token["id"]] = token["content"]
        type_of[token["id"]] = CONTROL if token["special"] else USER_DEFINED

    if max(text_of) >= num_rows:
        raise ValueError(
            f"The tokenizer has ids up to {max(text_of):,}, the model's embedding only {num_rows:,} rows: they do not "
            "belong together. Give the tokenizer that the model was trained with."
        )
    taken = set(text_of.values())
    for token_id in range(num_rows):
        if token_id not in text_of:
            name = f"[PAD{token_id}]"
            while name in taken:
                name = f"[{name}]"
            text_of[token_id], type_of[token_id] = name, UNUSED
    return [text_of[token_id] for token_id in range(num_rows)], [type_of[token_id] for token_id in range(num_rows)]


def _special_ids(
    tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, tokens: list[str], token_types: list[int]
) -> tuple[int, int, int | None]:
    """The ids of bos, eos and the end of a turn; llama.cpp would take id 11 for a bos or eos that is not named."""
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = ends if ends is not None else model.config.eos_token_id
    ends = list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
    eos_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else next(iter(ends), None)
    if eos_id is None:
        raise ValueError(
            "Neither the tokenizer nor the model names an eos token, so llama.cpp could not know where a text ends. "
            'Say which token it is: add "eos_token" to tokenizer_config.json.'
        )
    bos_id = next(i for i in (tokenizer.bos_token_id, model.config.bos_token_id, eos_id) if i is not None)
    turn_ends = [token_id for token_id in ends if token_id != eos_id]
    if not turn_ends:
        turn_ends = [
            tokens.index(text)
            for text in ("<|im_end|>", "<|eot_id|>")
            if text in tokens and token_types[tokens.index(text)] == CONTROL and tokens.index(text) != eos_id
        ]
    if len(turn_ends) > 1:
        logger.warning(
            "A GGUF file names one token that ends a turn beside the eos: %s. The model's generation_config stops at "
            "%s too; llama.cpp may not.",
            tokens[turn_ends[0]],
            [tokens[token_id] for token_id in turn_ends[1:]],
        )
    return bos_id, eos_id, next(iter(turn_ends), None)


def _added_around(tokenizer: PreTrainedTokenizerBase, bos_id: int, eos_id: int) -> tuple[bool, bool]:
    """Whether the tokenizer's post-processor adds the bos at a text's start, and the eos at its end."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    for add_bos in (False, True):
        for add_eos in (False, True):
            if whole == [bos_id] * add_bos + bare + [eos_id] * add_eos:
                return add_bos, add_eos
    raise ValueError(
        f"The tokenizer encodes 'a' as {tokenizer.convert_ids_to_tokens(whole)}: llama.cpp can add a bos token "
        "at the start of a text and an eos token at its end, and nothing else."
    )
