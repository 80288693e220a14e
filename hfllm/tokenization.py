"""A byte-level BPE trained on your text, its reserved tokens and its chat template."""

import copy
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast


logger = logging.getLogger(__name__)

# The reserved tokens have the ids 0 to 4, in this order. All are distinct: a pad that is also the eos is masked out of
# the loss together with it, and the model never learns to stop. The chat turns are reserved from the beginning, so
# that no later stage has to resize an embedding.
BOS_TOKEN = "<|startoftext|>"
EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
TURN_START_TOKEN = "<|im_start|>"
TURN_END_TOKEN = "<|im_end|>"
RESERVED_TOKENS = (BOS_TOKEN, EOS_TOKEN, PAD_TOKEN, TURN_START_TOKEN, TURN_END_TOKEN)

# Text is first cut into words; merges never cross a word's boundary. This is the pattern of Qwen2 and Qwen3, letter
# for letter, which llama.cpp knows as its pre-tokenizer "qwen2". Bytes per token of the three patterns it knows best:
#
#                       vocab_size 4096                        vocab_size 16384
#              held-out library  Verdict  topics    held-out library  Verdict  topics
#     GPT-2               3.379    2.536   3.418               3.888    3.022   4.080
#     Llama 3             3.375    2.553   3.398               3.992    3.041   4.108
#     Qwen2               3.355    2.561   3.400               3.947    3.052   4.095
#
# (Trained on the standard library of Python 3.11.7 without pydoc_data, 10.7 MB, in 2 to 3 s on 2 CPU cores. Held-out
# library: the validation documents of `recipes/train_tokenizer.py --dataset stdlib`; Verdict: Edith Wharton's story;
# topics: pydoc_data.topics.) Qwen2's is best on the story and within 1.2 % of the best elsewhere, so other reasons
# decide. It gives each digit a token of its own, and so uses no ids for numbers (at 16,384, GPT-2's has 625 groups of
# digits, Llama 3's 255) and writes equal numbers alike. GPT-2's joins a line's end to the next line's indentation,
# Qwen2's does not. And the default preset is a Qwen3, so that everybody's Qwen3 code splits text as we do.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ChatML, with the bos token in front. Three things differ from the usual one:
# - A control token's text inside a message is broken up by a space (`<|im_end|>` becomes `<|im_end |>`), so that nobody
#   can type one, whatever program applies the template. The text is always longer afterwards, so breaking up one token
#   can never put another one together. Roles are limited to three for the same reason.
# - The outer whitespace of a message is dropped, as in Llama 3's template. A reply that began with a newline would
#   share one token with the newline that ends the header, and the prompt seen in training would not be the prompt that
#   `add_generation_prompt` gives.
# - `{% generation %}` holds what the assistant must learn: what it says, and to stop.
# It uses only what the Jinja of other engines has too (llama.cpp's, minja, huggingface.js): `.replace()` is a method in
# all of them, while the filter of that name is missing from some.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('A role is system, user or assistant, not ' ~ message['role']) -}}
    {%- endif -%}
    {%- if message['content'] is not string -%}
        {{- raise_exception('A content is a string; a message of the ' ~ message['role'] ~ ' has none') -}}
    {%- endif -%}
    {%- set content = message['content'].strip()
        .replace('<|startoftext|>', '<|startoftext |>')
        .replace('<|endoftext|>', '<|endoftext |>')
        .replace('<|pad|>', '<|pad |>')
        .replace('<|im_start|>', '<|im_start |>')
        .replace('<|im_end|>', '<|im_end |>') -%}
    {{- '<|im_start|>' + message['role'] + '\\n' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- content + '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- content + '<|im_end|>' -}}
    {%- endif -%}
    {{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_RESERVED_ROLES: dict[str, Any] = {
    "bos_token": BOS_TOKEN,
    "eos_token": EOS_TOKEN,
    "pad_token": PAD_TOKEN,
    "extra_special_tokens": [TURN_START_TOKEN, TURN_END_TOKEN],
    "clean_up_tokenization_spaces": False,
    "padding_side": "right",
}

# Texts are fed to the trainer in pieces, because its bookkeeping for a piece is many times as large as the piece: 28 MB
# of text took 284 MB of memory in pieces of 1,000,000 characters, 26 MB in pieces of 10,000, at the same speed.
PIECE_CHARACTERS = 10_000


def check_vocab_size(vocab_size: int) -> None:
    """Raise a ValueError for fewer ids than the reserved tokens, the 256 bytes and one merge."""
    smallest = len(RESERVED_TOKENS) + 256 + 1
    if vocab_size < smallest:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {len(RESERVED_TOKENS)} reserved tokens, 256 bytes and at least one "
            f"merge need {smallest}. Small models do well with 4,096 to 16,384."
        )


def train_bpe(
    texts: Iterable[str],
    vocab_size: int,
    *,
    max_bytes: int = 2**30,
    min_frequency: int = 2,
    model_max_length: int | None = None,
    show_progress: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts; encoding and decoding gives any text back.

    `vocab_size` counts the reserved tokens and the 256 bytes. At most the first `max_bytes` of UTF-8 are read. The
    memory needed depends on the number of different words, not on the length of the iterator. Merges that happen fewer
    than `min_frequency` times are not learned. `model_max_length` is written into the tokenizer, which warns about
    longer inputs. Training twice on the same texts gives the same tokenizer.

    `tokenizer(text)` adds the bos token at the start, and nothing at the end. It pads on the right, which suits
    training with any kind of positions; to generate for a padded batch, set `tokenizer.padding_side = "left"`.
    """
    check_vocab_size(vocab_size)
    if max_bytes < 1:
        raise ValueError(f"max_bytes={max_bytes} leaves nothing to train on; give the number of bytes to read.")
    if isinstance(texts, str):
        raise TypeError("texts is one string; give an iterable of strings, one for each document.")

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in RESERVED_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, also those the texts never show
        show_progress=show_progress,
    )

    num_texts = num_bytes = 0
    left_something_out = False

    def pieces() -> Iterator[str]:
        nonlocal num_texts, num_bytes, left_something_out
        for text in texts:
            if not isinstance(text, str):
                raise TypeError(f"text {num_texts:,} is a {type(text).__name__}, not a string: {text!r:.80}")
            for piece in split_into_pieces(text):
                try:
                    encoded = piece.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise ValueError(
                        f"text {num_texts:,} holds a lone surrogate, {error.object[error.start]!r}, which UTF-8 "
                        "cannot write. Clean it first: text.encode('utf-8', 'replace').decode()."
                    ) from None
                if len(encoded) > max_bytes - num_bytes:
                    left_something_out = True
                    encoded = encoded[: max_bytes - num_bytes]
                    piece = encoded.decode("utf-8", errors="ignore")  # the cut may have gone through a character
                num_bytes += len(encoded)
                yield piece
                if left_something_out:
                    return
            num_texts += 1

    backend.train_from_iterator(pieces(), trainer)

    if num_bytes == 0:
        raise ValueError(f"There is nothing to train on: {num_texts:,} texts, and not one character in them.")
    if left_something_out:
        logger.warning(
            "The tokenizer was trained on the first %s bytes (%s whole texts); what follows was not read. "
            "max_bytes sets the limit.",
            f"{num_bytes:,}",
            f"{num_texts:,}",
        )
    if backend.get_vocab_size() < vocab_size:
        logger.warning(
            "The tokenizer has %s ids instead of %s: the text (%s bytes) holds no more pairs that occur %s times.",
            f"{backend.get_vocab_size():,}",
            f"{vocab_size:,}",
            f"{num_bytes:,}",
            min_frequency,
        )

    # The bos is added by the backend's own post-processor, which travels in tokenizer.json. Transformers'
    # `add_bos_token=True` would be lost: save_pretrained does not write it.
    bos_id = backend.token_to_id(BOS_TOKEN)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS_TOKEN} $A", pair=f"{BOS_TOKEN} $A $B", special_tokens=[(BOS_TOKEN, bos_id)]
    )
    limit = {} if model_max_length is None else {"model_max_length": model_max_length}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE, **_RESERVED_ROLES, **limit)


def split_into_pieces(text: str, max_characters: int = PIECE_CHARACTERS) -> Iterator[str]:
    """Cut a text where this cuts no word of SPLIT_PATTERN: after a newline, before a character that is not whitespace.

    A line longer than a piece is cut anywhere, which splits one word in 10,000 characters.
    """
    start = 0
    while len(text) - start > max_characters:
        end = text.rfind("\n", start, start + max_characters) + 1
        while end > start and text[end].isspace():
            end = text.rfind("\n", start, end - 1) + 1
        if end <= start:
            end = start + max_characters
        yield text[start:end]
        start = end
    yield text[start:]


def document_encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[np.ndarray]]:
    """A function from documents to their ids, with nothing added: the fast path for training data.

    A control token's text inside a document stays text: the ids of special tokens never come out. The arrays are uint16
    where every id of the tokenizer fits, else int32. It works with any tokenizer that has a Rust backend. It has a copy
    of that backend, so neither affects the other. It can be pickled, as `datasets.map(num_proc=...)` needs.
    """
    backend = copy.deepcopy(_backend_of(tokenizer))
    backend.no_truncation()  # a call such as tokenizer(texts, truncation=True) leaves its settings in the backend
    backend.no_padding()
    largest_id = max(backend.get_vocab(with_added_tokens=True).values())
    return partial(_encode_documents, backend, np.dtype(np.uint16 if largest_id < 2**16 else np.int32))


def _encode_documents(backend: Tokenizer, dtype: np.dtype, texts: list[str]) -> list[np.ndarray]:
    backend.encode_special_tokens = True  # set at each call, because pickling forgets it
    try:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    except TypeError as error:
        raise ValueError(f"These documents cannot be encoded: {_what_is_wrong(texts)}") from error
    return [np.array(encoding.ids, dtype=dtype) for encoding in encodings]


def _what_is_wrong(texts: list[str]) -> str:
    if isinstance(texts, str):
        return "one string was given; give a list of strings."
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            return f"number {index:,} is a {type(text).__name__}, not a string."
        if lone := re.search("[\ud800-\udfff]", text):
            return (
                f"number {index:,} holds a lone surrogate, {lone.group()!r}, at character {lone.start():,}. "
                "Clean it first: text.encode('utf-8', 'replace').decode()."
            )
    return "the tokenizers library refused them."


def _backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"{type(tokenizer).__name__} has no backend of the tokenizers library, only Python code, which is too slow "
            "to prepare a corpus. Take a tokenizer that has a tokenizer.json, or train one with train_bpe."
        )
    return backend


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A sha256 over everything that decides which ids a text gets; the same after saving and loading.

    The chat template is not part of it: it decides which text is encoded, not how.
    """
    state = json.loads(_backend_of(tokenizer).to_str())
    state["padding"] = state["truncation"] = None  # left behind by the last call, see `document_encoder`
    state["roles"] = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode("utf-8")).hexdigest()


def load_tokenizer(path_or_id: str | Path, *, require_eos: bool = True) -> PreTrainedTokenizerBase:
    """A tokenizer from a folder, a `tokenizer.json`, a pair `*vocab.json` and `*merges.txt`, or the Hub.

    Where a tokenizer has no bos token, its eos token becomes the bos as well, as GPT-2 has it. A tokenizer without an
    eos token cannot say where a document ends, and is refused, unless `require_eos` is False.
    """
    name = str(path_or_id)
    path = Path(name).expanduser()
    if path.is_file() and path.name == "tokenizer.json" and (path.parent / "tokenizer_config.json").is_file():
        path = path.parent
    if path.is_dir():
        tokenizer = _load_from_folder(path)
    elif path.is_file():
        tokenizer = _load_bare_json(path)
    elif name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or path.suffix == ".json":
        raise FileNotFoundError(
            f"There is no tokenizer at {name!r}: no such file or folder. "
            "Give a folder that recipes/train_tokenizer.py wrote, or an id of the Hub such as 'openai-community/gpt2'."
        )
    else:
        tokenizer = _load_with_auto_tokenizer(name, f"There is no folder {name!r} here, and")

    _backend_of(tokenizer)
    if require_eos and tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {name!r} has no eos token, so nothing can separate two documents. Say which of its "
            'tokens it is: add "eos_token" to its tokenizer_config.json.'
        )
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is not None:
        logger.info("The tokenizer %s has no bos token; its eos, %s, serves as both.", name, tokenizer.eos_token)
        tokenizer.bos_token = tokenizer.eos_token
    return tokenizer


def load_classifier_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, set up for a classifier of whole texts: padded and cut on the right."""
    tokenizer = load_tokenizer(name)
    # A control token's text inside a text stays text, here and (by init_kwargs, which are saved) in a pipeline.
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True
    tokenizer.truncation_side = tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        # Harmless: a text's last token is found by the attention mask, and no text holds the eos token.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_from_folder(folder: Path) -> PreTrainedTokenizerBase:
    if (folder / "tokenizer_config.json").is_file():
        return _load_with_auto_tokenizer(str(folder), f"{str(folder)!r} has a tokenizer_config.json, but")
    if (folder / "tokenizer.json").is_file():
        return _load_bare_json(folder / "tokenizer.json")
    vocabularies, merges = sorted(folder.glob("*vocab.json")), sorted(folder.glob("*merges.txt"))
    if len(vocabularies) == len(merges) == 1:
        return _load_gpt2_pair(vocabularies[0], merges[0])
    names = sorted(child.name for child in folder.iterdir())
    listing = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") if names else "nothing"
    raise ValueError(
        f"{str(folder)!r} is not a tokenizer; it holds {listing}. A tokenizer's folder holds a tokenizer.json "
        "(recipes/train_tokenizer.py writes one), or exactly one vocab.json and one merges.txt."
    )


def _load_with_auto_tokenizer(path_or_id: str, beginning: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{beginning} transformers cannot load a tokenizer {path_or_id!r}: {reason}") from error


def _load_bare_json(file: Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer.json, which does not say which special token is which: only tokenizer_config.json does."""
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises nothing more special
        raise ValueError(f"{str(file)!r} is not a file of the tokenizers library: {error}") from error
    if all(backend.token_to_id(token) is not None for token in RESERVED_TOKENS):
        return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=CHAT_TEMPLATE, **_RESERVED_ROLES)
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    endings = [token for token in special if token in (EOS_TOKEN, "<|end_of_text|>", "</s>", "<eos>")]
    if len(endings) == 1:
        logger.info("%s does not name its eos token; %s is taken for it.", file, endings[0])
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=endings[0])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _load_gpt2_pair(vocab_file: Path, merges_file: Path) -> PreTrainedTokenizerBase:
    """Load vocabulary and merges alone, as OpenAI published GPT-2, with GPT-2's way of splitting words."""
    try:
        vocabulary = json.loads(vocab_file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(vocab_file)!r} is not JSON: {error}") from error
    special = EOS_TOKEN if EOS_TOKEN in vocabulary else None
    # The files go to the Rust side as they are. Reading the merges here would invite the mistake of taking a merge of
    # "#" signs for a comment.
    return GPT2Tokenizer(
        vocab=str(vocab_file), merges=str(merges_file), unk_token=special, bos_token=special, eos_token=special
    )


def tokenizer_report(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    others: Mapping[str, PreTrainedTokenizerBase] | None = None,
    num_longest: int = 10,
) -> dict[str, Any]:
    """How well a tokenizer compresses texts it was not trained on, beside others.

    `unused_ids` counts the ids that never came out, `unused_merges` those among them that a merge made. Some are only
    steps on the way to a longer token; many of them mean that the vocabulary is too large for its text.
    """
    encoders = {"": document_encoder(tokenizer)}
    encoders |= {name: document_encoder(other) for name, other in (others or {}).items()}
    vocabulary = _backend_of(tokenizer).get_vocab(with_added_tokens=True)
    times_seen: np.ndarray = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    num_tokens = dict.fromkeys(encoders, 0)
    num_texts = num_bytes = 0
    for batch in _batches(texts):
        num_texts += len(batch)
        num_bytes += sum(len(text.encode("utf-8")) for text in batch)
        for name, encode in encoders.items():
            documents = encode(batch)
            num_tokens[name] += sum(map(len, documents))
            if name == "":
                times_seen += np.bincount(np.concatenate(documents), minlength=len(times_seen))
    if num_bytes == 0:
        raise ValueError(f"There is nothing to measure the tokenizer on: {num_texts:,} texts without a character.")

    def compression(name: str, vocab_size: int) -> dict[str, Any]:
        tokens = num_tokens[name]
        return {"vocab_size": vocab_size, "tokens": tokens, "bytes_per_token": num_bytes / max(tokens, 1)}

    added = {token.content for token in _backend_of(tokenizer).get_added_tokens_decoder().values()}
    unused = [token for token, token_id in vocabulary.items() if times_seen[token_id] == 0]
    words = [token for token in vocabulary if token not in added and len(set(token)) > 1]  # without rules and indents
    longest = sorted(words, key=lambda token: (-len(token), vocabulary[token]))[:num_longest]
    return {
        "texts": num_texts,
        "bytes": num_bytes,
        **compression("", len(vocabulary)),
        "unused_ids": len(unused),
        "unused_merges": sum(len(token) > 1 and token not in added for token in unused),
        "longest_tokens": [tokenizer.convert_tokens_to_string([token]) for token in longest],
        "others": {name: compression(name, len(other)) for name, other in (others or {}).items()},
    }


def _batches(texts: Iterable[str], max_characters: int = 2**20) -> Iterator[list[str]]:
    batch: list[str] = []
    num_characters = 0
    for text in texts:
        batch.append(text)
        num_characters += len(text)
        if num_characters > max_characters:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def format_tokenizer_report(report: Mapping[str, Any], *, name: str = "this tokenizer") -> str:
    """The report as a small plain table."""
    rows = [(name, report), *report["others"].items()]
    width = max(len("tokenizer"), *(len(row_name) for row_name, _ in rows))
    lines = [f"{'tokenizer':<{width}}  vocabulary       tokens  bytes/token"]
    for row_name, row in rows:
        lines.append(
            f"{row_name:<{width}}  {row['vocab_size']:>10,}  {row['tokens']:>11,}  {row['bytes_per_token']:>11.3f}"
        )
    lines.append(f"on {report['bytes']:,} bytes in {report['texts']:,} text{'s' * (report['texts'] != 1)}")
    lines.append(f"never used there: {report['unused_ids']:,} ids, {report['unused_merges']:,} of them merges")
    lines.append("longest tokens: " + " ".join(map(repr, report["longest_tokens"])))
    return "\n".join(lines)
