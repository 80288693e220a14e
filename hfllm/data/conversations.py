"""Conversations from rows of several published forms, recognised by their columns, checked, and split."""

import hashlib
import itertools
import json
import logging
import os
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .python_questions import describe_questions, further_expressions, python_questions, reword
from .records import (
    ReadOptions,
    Record,
    check_on_bad_record,
    is_good,
    json_type,
    new_account,
    note_unused,
    tell_account,
    text_problem,
)
from .sources import find_source, local_paths


logger = logging.getLogger(__name__)

Messages = list[dict[str, Any]]  # role and content, both texts; a response that is not learned has weight 0

# The forms; the first that fits is used.
FORMS = (
    "messages: a list of {role, content, [weight]}",
    "conversations: a list of {from, value} (ShareGPT)",
    "instruction, output, [input], [history] (Alpaca)",
    "prompt, response or completion, [input], [history]",
)
BESIDE = "each with [system]"  # a column in brackets may be missing
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
ANSWERS = ("response", "completion")
# Tools, and calls of them. Without these, the rest of the conversation would mean something else.
TOOL_COLUMNS = ("tools", "functions", "tool_calls", "function_call")
TOOL_KEYS = ("tool_calls", "function_call", "tool_call_id")


@dataclass(frozen=True)
class Conversation:
    messages: Messages  # [system], then user and assistant in turns
    place: str  # "alpaca.json, row 3"
    kind: str | None = None  # of a question whose answer can be checked


@dataclass(frozen=True)
class Conversations:
    """The conversations of a dataset; `account` says what was read and what was left out."""

    rows: list[Conversation]
    account: dict[str, Any] = field(default_factory=dict)
    description: str = ""

    @property
    def fingerprint(self) -> str:
        """A sha256 over the messages and their order."""
        return hashlib.sha256(json.dumps([row.messages for row in self.rows]).encode()).hexdigest()


def load_conversations(
    dataset: str,
    *,
    dataset_config: str | None = None,
    split: str = "train",
    column_map: Mapping[str, str] | None = None,
    on_bad_record: str = "error",
    seed: int = 0,
    delimiter: str | None = None,
    exclude: Iterable[str | os.PathLike] = (),
) -> Conversations:
    """The conversations of `stdlib` (questions about this Python, drawn by `seed`), of files here or of the Hub.

    Rows may have any of FORMS; `column_map` renames columns first, e.g. {"question": "instruction"}. A row that is not
    a conversation (no response, roles out of order, a content that is not a text, calls of tools) is an error with its
    place, or, with `on_bad_record="skip"`, left out and counted. Columns that are not used are logged.
    """
    check_on_bad_record(on_bad_record)
    if local_paths(dataset, dataset_config=dataset_config, split=split) == []:
        questions = python_questions(seed=seed)
        rows = [
            Conversation(pair(question.question, question.answer), f"question {number:,}", question.kind)
            for number, question in enumerate(questions, start=1)
        ]
        return Conversations(rows, {"rows": len(rows), "bad_records": 0}, describe_questions(questions))
    pairs, account = _load_rows(
        dataset,
        lambda row: _as_messages(rename(row, column_map or {})),
        dataset_config=dataset_config,
        split=split,
        on_bad_record=on_bad_record,
        delimiter=delimiter,
        exclude=exclude,
    )
    if not pairs:
        raise ValueError(f"{dataset!r} holds no conversation.{_first_bad(account)}")
    rows = [Conversation(messages, place) for place, messages in pairs]
    num_bad = account["bad_records"]
    return Conversations(rows, account, f"{len(rows):,} conversations, {num_bad:,} bad rows left out")


def further_questions(number: int, *, seed: int, held_back: Iterable[Conversation]) -> list[Conversation]:
    """More of `stdlib`'s expressions to train on, beside those that `load_conversations` gives.

    None begins with a prompt that is held back, so that the test questions stay unseen.
    """
    known = {prompt_key(conversation) for conversation in held_back}
    questions = further_expressions(
        number, seed=seed, is_known=lambda text: prompt_key(Conversation(pair(text, "?"), "")) in known
    )
    return [
        Conversation(pair(each.question, each.answer), f"further question {number:,}", each.kind)
        for number, each in enumerate(questions, start=1)
    ]


def reword_questions(rows: list[Conversation], *, seed: int) -> list[Conversation]:
    """`stdlib`'s conversations with their questions in other words, as people ask them (`python_questions.reword`).

    A model that has seen only one wording does not understand others.
    """
    draw = random.Random(f"wordings {seed}")
    return [
        replace(row, messages=[{**question, "content": reword(question["content"], draw)}, *others])
        for row in rows
        for question, *others in [row.messages]
    ]


def join_turns(rows: list[Conversation], *, max_turns: int, seed: int) -> list[Conversation]:
    """Join rows into conversations of 1 to `max_turns` rows: each row once, each length equally often, in random order.

    A model that has seen only conversations of one turn fails in the second turn of a chat. Rows with a system message
    or with several turns stay as they are.
    """
    if max_turns < 1:
        raise ValueError(f"max_turns={max_turns}: a conversation has at least one turn.")
    draw = random.Random(f"turns {seed}")
    is_single = {id(row): [message["role"] for message in row.messages] == ["user", "assistant"] for row in rows}
    single = [row for row in rows if is_single[id(row)]]
    joined = [row for row in rows if not is_single[id(row)]]
    draw.shuffle(single)
    remaining = iter(single)
    while turns := list(itertools.islice(remaining, draw.randint(1, max_turns))):
        joined.append(replace(turns[0], messages=[message for turn in turns for message in turn.messages]))
    draw.shuffle(joined)
    return joined


def _load_rows(
    dataset: str,
    convert: Callable[[dict[str, Any]], tuple[Any, set[str]]],
    *,
    dataset_config: str | None,
    split: str,
    on_bad_record: str,
    delimiter: str | None,
    exclude: Iterable[str | os.PathLike],
) -> tuple[list[tuple[str, Any]], dict[str, Any]]:
    """The rows that can be converted, with their places, and the account; `convert` also names what it did not use."""
    check_on_bad_record(on_bad_record)
    options = ReadOptions(delimiter=delimiter)
    source = find_source(dataset, dataset_config=dataset_config, split=split, options=options, exclude=exclude)
    good: list[tuple[str, Any]] = []
    account: dict[str, Any] = {**source.account, **new_account()}
    for record in source.records:
        value = None
        if record.problem is None and record.columns is None:
            record = Record(record.place, problem=f"plain text, which has no columns; {_known_forms()}")
        elif record.columns is not None:
            try:
                value, unused = convert(dict(record.columns))
            except ValueError as error:
                record = Record(record.place, problem=str(error).rstrip("."))
            else:
                note_unused(sorted(unused), account)
        if is_good(record, account, on_bad_record=on_bad_record):
            good.append((record.place, value))
    tell_account(dataset, account)
    return good, {"rows": len(good), **account}


def _first_bad(account: Mapping[str, Any]) -> str:
    if not account["bad_records"]:
        return ""
    return f" The first of {account['bad_records']:,} bad rows: {account['bad_record_examples'][0]}."


def _known_forms() -> str:
    return f"conversations are {'; or '.join(FORMS)}; {BESIDE}"


def pair(question: str, answer: str, system: str | None = None) -> Messages:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def rename(row: dict[str, Any], column_map: Mapping[str, str]) -> dict[str, Any]:
    if missing := [name for name in column_map if name not in row]:
        raise ValueError(f"column_map: there is no column {missing[0]!r} but {list(row)}.")
    names = [column_map.get(name, name) for name in row]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"column_map: two columns would have the name {twice[0]!r}; rename the other one as well.")
    return dict(zip(names, row.values()))


def as_messages(row: dict[str, Any]) -> Messages:
    """A row of one of FORMS as messages with the roles system, user and assistant; a ValueError says what is wrong."""
    return _as_messages(row)[0]


def _as_messages(row: dict[str, Any]) -> tuple[Messages, set[str]]:
    """The messages, and the columns and keys that are not used."""
    # A table has every column in every row: the columns of other forms are None.
    values = {name: value for name, value in row.items() if value is not None}
    _refuse_tools(values)
    unused: set[str] = set()
    answer = next((name for name in ANSWERS if name in values), None)
    if "messages" in values:
        used = {"messages"}
        messages = _listed(values["messages"], "messages", unused)
    elif "conversations" in values:
        used = {"conversations"}
        messages = _listed(values["conversations"], "conversations", unused)
    elif "instruction" in values and "output" in values:
        used = {"instruction", "input", "output", "history"}
        messages = pair(_question(values, "instruction").strip(), _text(values["output"], "output"))
    elif "prompt" in values and answer is not None:
        used = {"prompt", answer, "history"}
        if isinstance(values["prompt"], list):
            prompt = _listed(values["prompt"], "prompt", unused)
            messages = [*prompt, *_reply(values[answer], answer, unused)]
        else:
            used.add("input")
            messages = pair(_question(values, "prompt"), _text(values[answer], answer))
    else:
        nulls = [name for name, value in row.items() if value is None]
        are_null = f" ({', '.join(map(repr, nulls))} {'is' if len(nulls) == 1 else 'are'} null)" if nulls else ""
        raise ValueError(
            f"the columns {list(values)}{are_null} fit no known form; {_known_forms()}. Rename them with column_map."
        )
    messages = [*_turns_before(values, used, unused), *messages]
    messages = _with_system(messages, values.get("system"))
    check_messages(messages)
    if not any(is_learned(message) for message in messages):
        raise ValueError("each response has weight 0: nothing in it can be learned.")
    return messages, unused | (set(values) - used - {"system"})


def _refuse_tools(values: Mapping[str, Any]) -> None:
    for name in TOOL_COLUMNS:
        if values.get(name) not in (None, "", "[]", [], {}):
            raise ValueError(f"it has {name!r}, and models are not taught to call tools. Leave such rows out.")


def _question(values: Mapping[str, Any], name: str) -> str:
    """The question with the text of the column `input` below it, as in Alpaca's prompt."""
    question = _text(values[name], name)
    more = _text(values.get("input", ""), "input").strip()
    return f"{question.strip()}\n\n{more}" if more else question


def _turns_before(values: Mapping[str, Any], used: set[str], unused: set[str]) -> Messages:
    """The turns in the column `history`: pairs of question and answer, or messages."""
    history = values.get("history")
    if history in (None, "", []):
        return []
    if "history" not in used:
        raise ValueError(f"it has a 'history' beside {', '.join(map(repr, sorted(used)))}. Put its turns in there.")
    if not isinstance(history, list):
        raise ValueError(f"'history' is {json_type(history)}, not a list of pairs of question and answer.")
    if isinstance(history[0], dict):
        return _listed(history, "history", unused)
    turns: Messages = []
    for number, turn in enumerate(history, start=1):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise ValueError(f"turn {number} of 'history' is {turn!r:.60}, not a pair of question and answer.")
        turns += pair(*(_text(text, f"turn {number} of history") for text in turn))
    return turns


def _with_system(messages: Messages, system: Any) -> Messages:
    """The messages, after a column's system message if there is one."""
    if system is None or not _text(system, "system").strip():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() != system.strip():
            raise ValueError("its messages begin with a system message, and its column 'system' has another one.")
        return messages
    return [{"role": "system", "content": system}, *messages]


def is_learned(message: Mapping[str, Any]) -> bool:
    """Whether a message is a response to learn: one of the assistant's, unless its weight is 0."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def _listed(messages: Any, column: str, unused: set[str]) -> Messages:
    """A list of {role, content} or {from, value} as messages; names of keys that are not used go into `unused`."""
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else json_type(messages)
        raise ValueError(f"{column!r} is {what}, not a list of messages.")
    listed: Messages = []
    for number, message in enumerate(messages, start=1):
        keys = {} if not isinstance(message, dict) else {key: v for key, v in message.items() if v is not None}
        role, content = ("from", "value") if column == "conversations" or "from" in keys else ("role", "content")
        if called := [key for key in TOOL_KEYS if keys.get(key)]:
            raise ValueError(f"message {number} has {called[0]!r}, and models are not taught to call tools.")
        if not {role, content} <= set(keys):
            raise ValueError(
                f"message {number} of {column!r} is {message!r:.80}, not an object with {role} and {content}."
            )
        name = str(keys[role])
        plain = {"role": ROLES.get(name, name), "content": keys[content]}
        if "weight" in keys:
            if keys["weight"] not in (0, 1):
                raise ValueError(f"message {number} has the weight {keys['weight']!r}; it is 0 (not learned) or 1.")
            if keys["weight"] == 0:
                plain["weight"] = 0
            elif plain["role"] != "assistant":
                raise ValueError(f"message {number} has weight 1, and only what the assistant says is learned.")
        unused |= {f"{column}[].{key}" for key in set(keys) - {role, content, "weight", *TOOL_KEYS}}
        listed.append(plain)
    return listed


def _reply(reply: Any, column: str, unused: set[str]) -> Messages:
    if isinstance(reply, list):
        return _listed(reply, column, unused)
    return [{"role": "assistant", "content": _text(reply, column)}]


def check_messages(messages: Messages) -> None:
    """Check for an optional system message, then user and assistant in turns, with at least one response."""
    for number, message in enumerate(messages):
        _text(message["content"], f"content of message {number + 1}")
    roles = [message["role"] for message in messages]
    if unknown := [role for role in roles if role not in ("system", "user", "assistant")]:
        raise ValueError(f"the role {unknown[0]!r} is not system, user or assistant.")
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user" if turn % 2 == 0 else "assistant" for turn in range(len(turns))]
    if turns != expected:
        raise ValueError(
            f"the roles are out of order: {', '.join(roles)}. After an optional system message, user and assistant "
            "take turns, and the user begins."
        )
    if "assistant" not in roles:
        raise ValueError("it has no response: nothing in it can be learned.")
    if empty := [n for n, message in enumerate(messages, 1) if message["role"] != "system" and _is_empty(message)]:
        what = "response" if messages[empty[0] - 1]["role"] == "assistant" else "prompt"
        raise ValueError(f"the {what} in message {empty[0]} is empty.")


def _is_empty(message: dict[str, Any]) -> bool:
    return not message["content"].strip()


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is {json_type(value)}, not a text.")
    if text_problem(value, name):
        raise ValueError(f"{name!r} holds bytes that are not UTF-8, or half a surrogate pair.")
    return value


def split_conversations(
    rows: list[Conversation], *, validation_fraction: float, test_fraction: float, seed: int
) -> tuple[list[Conversation], list[Conversation], list[Conversation]]:
    """Training, validation and test; conversations that begin with the same prompt are on the same side.

    Prompts are the same if they differ in case or whitespace only. The fractions count conversations.
    """
    if not (0 <= validation_fraction < 1 and 0 <= test_fraction < 1 and validation_fraction + test_fraction < 1):
        raise ValueError(
            f"validation_fraction={validation_fraction} and test_fraction={test_fraction}: both are at least 0, and "
            "together less than 1."
        )
    groups: dict[str, list[Conversation]] = {}
    for row in rows:
        groups.setdefault(prompt_key(row), []).append(row)
    keys = sorted(groups)
    random.Random(seed).shuffle(keys)
    sides: list[list[Conversation]] = [[], [], []]
    wanted = [0, round(validation_fraction * len(rows)), round(test_fraction * len(rows))]
    for key in keys:
        side = next((side for side in (2, 1) if len(sides[side]) + len(groups[key]) <= wanted[side]), 0)
        sides[side] += groups[key]
    names = ("training", "validation", "test")
    if not sides[0] or any(share and not side for share, side in zip(wanted, sides)):
        sizes = ", ".join(f"{len(side):,} for {name}" for name, side in zip(names, sides))
        raise ValueError(
            f"{len(rows):,} conversations with {len(keys):,} different prompts are too few to split: {sizes}. Give "
            "more of them, or smaller fractions."
        )
    return sides[0], sides[1], sides[2]


def prompt_key(conversation: Conversation) -> str:
    """The text before the first response, without case and spacing."""
    before = []
    for message in conversation.messages:
        if message["role"] == "assistant":
            break
        before.append(" ".join(message["content"].casefold().split()))
    return "\n".join(before)


def shared_prompts(training: Iterable[Conversation], held_out: Iterable[Conversation]) -> int:
    """The number of held-out conversations that begin with a prompt that is trained on."""
    known = {prompt_key(conversation) for conversation in training}
    return sum(prompt_key(conversation) in known for conversation in held_out)


def load_preferences(
    dataset: str,
    *,
    dataset_config: str | None = None,
    split: str = "train",
    on_bad_record: str = "error",
    validation_fraction: float,
    seed: int,
    validation_dataset: str | None = None,
    delimiter: str | None = None,
    exclude: Iterable[str | os.PathLike] = (),
) -> tuple[list[dict[str, Messages]], list[dict[str, Messages]], dict[str, Any]]:
    """Rows of `prompt`, `chosen` and `rejected` as messages, to train on and to validate, and what was left out.

    `prompt` is a text or messages that end with the user's; `chosen` and `rejected` are texts or the assistant's
    messages, which may repeat the prompt, and must differ. Beside them, `system`, `input` and `history` go into the
    prompt. Pairs with the same prompt are on the same side of the split. A `validation_dataset` is used instead of a
    split.
    """
    if local_paths(dataset, dataset_config=dataset_config, split=split) == []:
        raise ValueError("'stdlib' has no preferences: give a Hub id or files with prompt, chosen and rejected.")
    reading: dict[str, Any] = {"on_bad_record": on_bad_record, "delimiter": delimiter, "exclude": exclude}

    def load(dataset: str, **where: Any) -> tuple[list[dict[str, Messages]], dict[str, Any]]:
        pairs, account = _load_rows(dataset, _as_preference, **where, **reading)
        if not pairs:
            raise ValueError(f"{dataset!r} holds no preference.{_first_bad(account)}")
        return [row for _, row in pairs], account

    rows, account = load(dataset, dataset_config=dataset_config, split=split)
    counts = {"rows": len(rows), "bad_records": account["bad_records"]}
    if validation_dataset is not None:
        validation, _ = load(validation_dataset, dataset_config=None, split="train")
        shared = shared_prompts(*([Conversation(row["prompt"], "") for row in side] for side in (rows, validation)))
        if shared:
            logger.warning("%s of the pairs to validate have a prompt that is trained on.", f"{shared:,}")
        return rows, validation, counts
    keyed = [Conversation(row["prompt"], str(number)) for number, row in enumerate(rows)]
    sides = split_conversations(keyed, validation_fraction=validation_fraction, test_fraction=0, seed=seed)
    training, validation = ([rows[int(each.place)] for each in side] for side in sides[:2])
    return training, validation, counts


def as_preference(row: dict[str, Any]) -> dict[str, Messages]:
    return _as_preference(row)[0]


def _as_preference(row: dict[str, Any]) -> tuple[dict[str, Messages], set[str]]:
    """A row as `prompt`, `chosen` and `rejected`, and the columns and keys that are not used."""
    if missing := [name for name in ("prompt", "chosen", "rejected") if name not in row]:
        raise ValueError(f"there is no {', '.join(missing)} among the columns {list(row)}.")
    if nulls := [name for name in ("prompt", "chosen", "rejected") if row[name] is None]:
        raise ValueError(f"its {nulls[0]!r} is null, not a text or a list of messages.")
    values = {name: value for name, value in row.items() if value is not None}
    _refuse_tools(values)
    used, unused = {"prompt", "chosen", "rejected", "history", "system"}, set[str]()
    if isinstance(values["prompt"], list):
        prompt = _listed(values["prompt"], "prompt", unused)
    else:
        used.add("input")
        prompt = [{"role": "user", "content": _question(values, "prompt")}]
    given = prompt
    prompt = _with_system([*_turns_before(values, used, unused), *prompt], values.get("system"))
    replies = {}
    for name in ("chosen", "rejected"):
        reply = _reply(values[name], name, unused)
        for repeated in (prompt, given):
            if reply[: len(repeated)] == repeated:
                reply = reply[len(repeated) :]
                break
        try:
            check_messages([*prompt, *reply])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if any("weight" in message for message in [*prompt, *reply]):
            raise ValueError(f"{name} has a message with weight 0, but the whole reply of a preference is learned.")
        replies[name] = reply
    if replies["chosen"] == replies["rejected"]:
        raise ValueError("chosen and rejected are the same, so nothing is preferred.")
    return {"prompt": prompt, **replies}, unused | (set(values) - used)
