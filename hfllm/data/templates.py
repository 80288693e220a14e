"""Chat templates for base models, whose tokenizers have none."""

import json
import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..tokenization import CHAT_TEMPLATE, TURN_END_TOKEN, TURN_START_TOKEN
from .conversations import Messages
from .readers import whole_text


# Chapter 7's prompt, which is Alpaca's (Taori et al. 2023), as plain text: it needs no token that the model has never
# seen. A system message replaces the text before the first turn. The bos comes first, unless the eos is also the bos,
# as in GPT-2. The eos ends a response, so the model stops at the token that ended its documents. A message's outer
# whitespace is dropped, so that no token spans a response's beginning and the text before it.
ALPACA = """\
{{- BOS -}}
{%- if messages[0]['role'] == 'system' -%}
    {{- TEXT(messages[0]) + '\\n\\n' -}}
{%- else -%}
    {{- 'Below is an instruction that describes a task. ' -}}
    {{- 'Write a response that appropriately completes the request.\\n\\n' -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '### Instruction:\\n' + TEXT(message) + '\\n\\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '### Response:\\n' -}}
        {%- generation -%}
            {{- TEXT(message) + eos_token -}}
        {%- endgeneration -%}
        {{- '\\n\\n' -}}
    {%- elif message['role'] != 'system' or not loop.first -%}
        {{- raise_exception('A role is user or assistant, of the first message also system, not ' ~ message['role']) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '### Response:\\n' -}}
{%- endif -%}
"""

# OpenAI's ChatML, for tokenizers that have its two tokens: without them each turn would begin with a dozen tokens. This
# is the template of our own tokenizers, with another one's bos and control tokens.
CHATML_TOKENS = (TURN_START_TOKEN, TURN_END_TOKEN)
CHATML = re.sub(r"message\['content'\]\.strip\(\)(\s*\.replace\([^)]*\))+", "TEXT(message)", CHAT_TEMPLATE)
CHATML = CHATML.replace("{{- bos_token -}}", "{{- BOS -}}")

TEMPLATES = {"alpaca": ALPACA, "chatml": CHATML}


def choose_template(tokenizer: PreTrainedTokenizerBase, choice: str | None) -> str | None:
    """Set the tokenizer's chat template to `alpaca`, `chatml` or a Jinja file; returns what was done, in words.

    `save_pretrained` writes it with the tokenizer, so that `apply_chat_template` writes a conversation everywhere as in
    training. The template breaks up a control token's text in a message by a space (a file's template only if the file
    does so). Without a choice nothing is done.
    """
    if choice is None:
        return None
    had_one = tokenizer.chat_template is not None
    if choice in TEMPLATES:
        missing = [token for token in CHATML_TOKENS if token not in tokenizer.get_added_vocab()]
        if choice == "chatml" and missing:
            raise ValueError(
                f"chat_template='chatml': the tokenizer of {tokenizer.name_or_path!r} has no token {missing[0]}. "
                "'alpaca' needs no token of its own."
            )
        tokenizer.chat_template = _written_for(tokenizer, TEMPLATES[choice])
    else:
        tokenizer.chat_template = _read_template(choice)
    instead = ", instead of its own" if had_one else ", as the tokenizer had none"
    return f"Conversations are written by the chat template {choice!r}{instead}; it is saved with the model."


def _written_for(tokenizer: PreTrainedTokenizerBase, template: str) -> str:
    """The template with this tokenizer's bos, which breaks up its control tokens in messages."""
    replacements = "".join(
        f".replace({_quoted(t)}, {_quoted(broken_up(t))})" for t in control_tokens(tokenizer, template)
    )
    own_bos = tokenizer.bos_token is not None and tokenizer.bos_token_id != tokenizer.eos_token_id
    template = re.sub(r"TEXT\((.*?)\)", lambda match: f"{match[1]}['content'].strip(){replacements}", template)
    return template.replace("{{- BOS -}}", "{{- bos_token -}}" if own_bos else "")


def _quoted(text: str) -> str:
    """A text as a string literal of Jinja (and minja, and huggingface.js)."""
    return "'" + json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"').replace("'", "\\'") + "'"


def _read_template(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(
            f"chat_template={name!r}: it is one of {', '.join(TEMPLATES)}, or a file with a Jinja template, and there "
            "is no such file."
        )
    template = whole_text(path, what="chat_template")
    if "messages" not in template:
        raise ValueError(f"chat_template={name!r}: the file is not a chat template, which loops over `messages`.")
    return template


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a ValueError if the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no chat template, so nothing says how a conversation is "
            "written. recipes/finetune_instruction.py teaches a base model one and saves it with the model: "
            "--chat_template alpaca (plain text, for any model; the book's), chatml (where the tokenizer has "
            f"{' and '.join(CHATML_TOKENS)}), or a file with a Jinja template."
        )


def control_tokens(tokenizer: PreTrainedTokenizerBase, template: str = "") -> list[str]:
    """The tokenizer's control tokens, longest first, and other added tokens that occur in `template`."""
    tokens = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if (token.special or token.content in template) and not token.content.isspace()
    ]
    return sorted(tokens, key=lambda token: (-len(token), token))


def without_control_tokens(messages: Messages, tokenizer: PreTrainedTokenizerBase) -> Messages:
    """The messages, with the text of each control token in them broken up by a space: `<|im_end|>` -> `<|im_end |>`.

    The templates of our own tokenizers and of this file do the same, so this changes nothing for them. Other templates
    leave it to the caller: there, a user who types a control token could end a turn.
    """
    control = control_tokens(tokenizer, tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else "")
    cleaned = []
    for message in messages:
        content = message["content"]
        while found := next((token for token in control if token in content), None):
            content = content.replace(found, broken_up(found))
        cleaned.append({**message, "content": content})
    return cleaned


def broken_up(token: str) -> str:
    cut = len(token) - len(re.search(r"\W*$", token).group())  # type: ignore[union-attr]  # it matches the empty string
    if not 0 < cut < len(token):
        cut = max(1, len(token) // 2)
    return f"{token[:cut]} {token[cut:]}"
