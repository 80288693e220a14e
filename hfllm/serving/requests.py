"""OpenAI's chat requests: every parameter is used, or refused by name."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..data.conversations import Messages
from .replies import LOWEST_TEMPERATURE, Sampling, check_text


ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

HIGHEST_TEMPERATURE = 100  # where all tokens are about equally likely
MOST_REPLIES = 128
MOST_STOPS = 4
LONGEST_STOP = 1000  # characters
MOST_TOP_LOGPROBS = 20

# Parameters that describe the caller or the purpose. They do not change a reply, and nothing of a request is kept.
LABELS = ("user", "safety_identifier", "prompt_cache_key")

# Parameters for features that this server does not have, and their neutral values, which clients may send.
NOT_DONE: dict[str, list[Any]] = {
    "audio": [],
    "function_call": ["none"],
    "functions": [[]],
    "metadata": [{}],
    "modalities": [["text"]],
    "moderation": [],
    "parallel_tool_calls": [True, False],
    "prediction": [],
    "prompt_cache_options": [],
    "prompt_cache_retention": [],
    "reasoning_effort": ["none"],
    "response_format": [{"type": "text"}],
    "service_tier": ["auto", "default"],
    "store": [False],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "verbosity": [],
    "web_search_options": [],
}
# The same for a message; clients send back messages that they received.
NOT_DONE_IN_MESSAGES: dict[str, list[Any]] = {
    "annotations": [[]],
    "audio": [],
    "function_call": [],
    "name": [],
    "refusal": [],
    "tool_call_id": [],
    "tool_calls": [[]],
}


class RequestError(Exception):
    """A refused request, with the fields of OpenAI's error form."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
        type: str = "invalid_request_error",
    ):
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": type, "param": param, "code": code}}


@dataclass(frozen=True)
class ChatRequest:
    messages: Messages
    choices: list[Sampling]  # one for each reply; their max_new_tokens may still be beyond the context
    stream: bool
    include_usage: bool  # in a stream


def read_chat_request(
    body: Any,
    defaults: Sampling,
    *,
    model: str,
    system: str | None,
    vocab_size: int,
    draw_seed: Callable[[], int],
) -> ChatRequest:
    """The request in a JSON body; parameters that it does not give are taken from `defaults` and `system`.

    `draw_seed` gives the seed of a request without one.

    Raises:
        RequestError: names the parameter, its value and what would do.
    """
    if not isinstance(body, dict):
        raise RequestError(f"The body is {_kind(body)}; send a JSON object with `messages`.")
    given = {name: value for name, value in body.items() if value is not None}  # null means left out
    _check_model(given.pop("model", model), model)
    messages = _read_messages(given.pop("messages", []))
    if system and not any(message["role"] == "system" for message in messages):
        messages = [{"role": "system", "content": system}, *messages]

    sampling = replace(
        defaults,
        max_new_tokens=_take_max_tokens(given, defaults.max_new_tokens),
        temperature=_take_number(given, "temperature", defaults.temperature, lowest=0, highest=HIGHEST_TEMPERATURE),
        top_p=_take_number(given, "top_p", defaults.top_p, lowest=0, highest=1),
        stop=_take_stop(given),
        frequency_penalty=_take_number(given, "frequency_penalty", 0.0, lowest=-2, highest=2),
        presence_penalty=_take_number(given, "presence_penalty", 0.0, lowest=-2, highest=2),
        logit_bias=_take_logit_bias(given, vocab_size),
        num_top_logprobs=_take_logprobs(given),
    )
    if 0 < sampling.temperature < LOWEST_TEMPERATURE:
        raise RequestError(
            f"temperature is {sampling.temperature}; give 0, which takes the likeliest token, or at least "
            f"{LOWEST_TEMPERATURE}.",
            param="temperature",
        )
    if sampling.top_p == 0:
        raise RequestError("top_p is 0, which leaves no token; give a number above 0, at most 1.", param="top_p")

    number = _take_integer(given, "n", 1, lowest=1, highest=MOST_REPLIES)
    seed = _take_integer(given, "seed", None, lowest=-(2**63), highest=2**63 - number)
    stream = _take_flag(given, "stream")
    include_usage = _take_stream_options(given, stream)
    for name in LABELS:
        if not isinstance(given.pop(name, ""), str):
            raise RequestError(f"{name} is {_kind(body[name])}; give a string.", param=name)
    _refuse_rest(given, NOT_DONE)
    choices = [replace(sampling, seed=draw_seed() if seed is None else seed + index) for index in range(number)]
    return ChatRequest(messages, choices, stream, include_usage)


def _check_model(name: Any, model: str) -> None:
    if not isinstance(name, str):
        raise RequestError(f"model is {_kind(name)}; give {model!r}, or leave it out.", param="model")
    if name != model:
        raise RequestError(
            f"The model {_short(name)} does not exist here. This server has one model, {model!r}.",
            param="model",
            code="model_not_found",
            status=404,
        )


def _read_messages(messages: Any) -> Messages:
    if not isinstance(messages, list) or not messages:
        what = "empty or missing" if isinstance(messages, list) else _kind(messages)
        raise RequestError(f"messages is {what}; give a list of at least one message.", param="messages")
    return [_read_message(message, f"messages.{index}") for index, message in enumerate(messages)]


def _read_message(message: Any, place: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise RequestError(f"{place} is {_kind(message)}; give an object with role and content.", param=place)
    given = {name: value for name, value in message.items() if value is not None}
    role = given.pop("role", None)
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(
            f"{place}.role is {_short(role)}; this model knows {', '.join(ROLES)}.", param=f"{place}.role"
        )
    content = given.pop("content", None)
    _refuse_rest(given, NOT_DONE_IN_MESSAGES, f"{place}.")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    text = "".join(_read_part(part, f"{place}.content") for part in parts)
    try:
        check_text(text)
    except ValueError as error:
        raise RequestError(f"{place}.content: {error}", param=f"{place}.content") from error
    return {"role": ROLES[role], "content": text}


def _read_part(part: Any, place: str) -> str:
    is_text = isinstance(part, dict) and part.get("type") == "text" and set(part) == {"type", "text"}
    if not is_text or not isinstance(part["text"], str):
        what = _short(part["type"]) if isinstance(part, dict) and part.get("type") != "text" and "type" in part else ""
        raise RequestError(
            f"{place} must be a string, or a list of {{'type': 'text', 'text': ...}}; this model reads text only."
            f"{f' It has a part of type {what}.' if what else ''}",
            param=place,
        )
    return part["text"]


def _take_max_tokens(given: dict[str, Any], default: int) -> int:
    old = _take_integer(given, "max_tokens", None, lowest=1)
    new = _take_integer(given, "max_completion_tokens", None, lowest=1)
    if old is not None and new is not None and old != new:
        raise RequestError(
            f"max_tokens is {old} and max_completion_tokens is {new}; give one of the two.",
            param="max_completion_tokens",
        )
    return next(value for value in (new, old, default) if value is not None)


def _take_stop(given: dict[str, Any]) -> tuple[str, ...]:
    value = given.pop("stop", [])
    stops = [value] if isinstance(value, str) else value
    is_good = isinstance(stops, list) and all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in stops)
    if not is_good or len(stops) > MOST_STOPS:
        raise RequestError(
            f"stop is {_short(value)}; give a string of 1 to {LONGEST_STOP:,} characters, or up to {MOST_STOPS} such.",
            param="stop",
        )
    for stop in stops:
        try:
            check_text(stop)
        except ValueError as error:
            raise RequestError(f"stop: {error}", param="stop") from error
    return tuple(stops)


def _take_logit_bias(given: dict[str, Any], vocab_size: int) -> dict[int, float]:
    value = given.pop("logit_bias", {})
    if not isinstance(value, dict):
        raise RequestError(f"logit_bias is {_kind(value)}; give an object of token ids and biases.", param="logit_bias")
    biases = {}
    for key in value:
        token_id = int(key) if key.isascii() and key.isdecimal() and len(key) < 20 else -1
        if not 0 <= token_id < vocab_size:
            raise RequestError(
                f"logit_bias has the key {_short(key)}; keys are token ids from 0 to {vocab_size - 1:,}.",
                param="logit_bias",
            )
        biases[token_id] = _check_number(f"logit_bias.{token_id}", value[key], lowest=-100, highest=100)
    return biases


def _take_logprobs(given: dict[str, Any]) -> int | None:
    wanted = _take_flag(given, "logprobs")
    number = _take_integer(given, "top_logprobs", None, lowest=0, highest=MOST_TOP_LOGPROBS)
    if number is not None and not wanted:
        raise RequestError("top_logprobs needs logprobs to be true.", param="top_logprobs")
    return (number or 0) if wanted else None


def _take_stream_options(given: dict[str, Any], stream: bool) -> bool:
    options = given.pop("stream_options", None)
    if options is None:
        return False
    if not stream:
        raise RequestError("stream_options needs stream to be true.", param="stream_options")
    if not isinstance(options, dict):
        raise RequestError(f"stream_options is {_kind(options)}; give an object.", param="stream_options")
    options = {name: value for name, value in options.items() if value is not None}
    include_usage = _take_flag(options, "include_usage", "stream_options.include_usage")
    _refuse_rest(options, {"include_obfuscation": [False]}, "stream_options.")
    return include_usage


def _take_flag(given: dict[str, Any], name: str, place: str | None = None) -> bool:
    value = given.pop(name, False)
    if not isinstance(value, bool):
        raise RequestError(f"{place or name} is {_short(value)}; give true or false.", param=place or name)
    return value


def _take_integer(given: dict[str, Any], name: str, default: Any, *, lowest: int, highest: int | None = None) -> Any:
    value = given.pop(name, default)
    if value is default:
        return default
    if isinstance(value, float) and value.is_integer():  # JSON does not tell 5 from 5.0
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} is {_short(value)}; give a whole number.", param=name)
    return _check_number(name, value, lowest=lowest, highest=highest)


def _take_number(given: dict[str, Any], name: str, default: float, *, lowest: float, highest: float) -> float:
    return _check_number(name, given.pop(name, default), lowest=lowest, highest=highest)


def _check_number(name: str, value: Any, *, lowest: float, highest: float | None) -> Any:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not lowest <= value <= (math.inf if highest is None else highest):
        wanted = f"at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise RequestError(f"{name} is {_short(value)}; give a number {wanted}.", param=name)
    return value


def _refuse_rest(given: dict[str, Any], not_done: dict[str, list[Any]], prefix: str = "") -> None:
    """Refuse the remaining parameters: those that are unknown, and those of features that this server lacks."""
    for name, value in given.items():
        if name not in not_done:
            raise RequestError(
                f"Unknown parameter: {_short(prefix + name)}.",
                param=_short(prefix + name)[1:-1],
                code="unknown_parameter",
            )
        if not any(type(value) is type(nothing) and value == nothing for nothing in not_done[name]):
            raise RequestError(
                f"{prefix}{name} is not supported by this server; leave it out.",
                param=f"{prefix}{name}",
                code="unsupported_parameter",
            )


def _short(value: Any) -> str:
    """A value as JSON has it, short enough for a message."""
    if value is None or isinstance(value, dict | list):
        return _kind(value)
    text = ascii(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 60 else f"{text[:60]}..."


def _kind(value: Any) -> str:
    """The kind of a JSON value, in words."""
    names: Sequence[tuple[Any, str]] = [
        (type(None), "missing"),
        (bool, "true or false"),
        (int | float, "a number"),
        (str, "a string"),
        (list, "a list"),
    ]
    return next((name for kind, name in names if isinstance(value, kind)), "an object")
