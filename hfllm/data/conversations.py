"""Dataset name -> conversations: rows of several published forms, recognised by their columns, checked, and split."""

import csv
import itertools
import json
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from .python_questions import describe_questions, further_expressions, python_questions, reword
from .readers import repeated
from .sources import files_below, hub_errors_explained, local_paths


logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]

# The forms, the first that fits counts. A column in brackets may be missing.
FORMS = (
    "messages: a list of {role, content}",
    "conversations: a list of {from, value} (ShareGPT), [system]",
    "instruction, output, [input], [system] (Alpaca)",
    "prompt, response or completion, [system]",
)
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
ROLES |= {"chatgpt": "assistant", "model": "assistant", "bot": "assistant"}
PAIRS = {"prompt": ("response", "completion")}


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


def load_conversations(
    dataset: str,
    *,
    dataset_config: str | None = None,
    split: str = "train",
    column_map: Mapping[str, str] | None = None,
    on_bad_record: str = "error",
    seed: int = 0,
) -> Conversations:
    """The conversations of `stdlib` (questions about this Python, drawn by `seed`), of local files or of the Hub.

    Rows may have any of FORMS; `column_map` renames columns first, e.g. {"question": "instruction"}. A row that is no
    conversation (no response, roles out of order, a content that is no text) is an error with its place, or, with
    `on_bad_record="skip"`, left out and counted.
    """
    if on_bad_record not in ("error", "skip"):
        raise ValueError(f"on_bad_record={on_bad_record!r}: it is either 'error' or 'skip'.")
    paths = local_paths(dataset, dataset_config=dataset_config, split=split)
    if paths == []:
        questions = python_questions(seed=seed)
        rows = [
            Conversation(pair(question.question, question.answer), f"question {number:,}", question.kind)
            for number, question in enumerate(questions, start=1)
        ]
        return Conversations(rows, {"rows": len(rows), "bad_records": 0}, describe_questions(questions))
    records = read_records_of(dataset, paths, dataset_config=dataset_config, split=split)
    pairs, problems = keep_good(
        records, lambda row: as_messages(rename(row, column_map or {})), on_bad_record=on_bad_record
    )
    if not pairs:
        first = f" The first of {len(problems):,} bad rows: {problems[0]}" if problems else ""
        raise ValueError(f"{dataset!r} holds no conversation.{first}")
    rows = [Conversation(messages, place) for place, messages in pairs]
    account = {"rows": len(rows), "bad_records": len(problems), "bad_record_examples": problems[:10]}
    return Conversations(rows, account, f"{len(rows):,} conversations, {len(problems):,} bad rows left out")


def further_questions(number: int, *, seed: int, held_back: Iterable[Conversation]) -> list[Conversation]:
    """More of `stdlib`'s expressions to train on, beside those that `load_conversations` gives.

    None begins with a prompt that is held back, so that a test stays one, however much is trained on.
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

    A model that has only seen one wording understands no other.
    """
    draw = random.Random(f"wordings {seed}")
    return [
        replace(row, messages=[{**question, "content": reword(question["content"], draw)}, *others])
        for row in rows
        for question, *others in [row.messages]
    ]


def join_turns(rows: list[Conversation], *, max_turns: int, seed: int) -> list[Conversation]:
    """Each row once, one of 1 to `max_turns` in a conversation, all these lengths alike often, in a random order.

    A model that has only seen conversations of one turn is lost in the second turn of a chat. Rows with a system
    message or with turns of their own stay as they are.
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


def read_records_of(
    dataset: str, paths: list[Path] | None, *, dataset_config: str | None, split: str
) -> Iterable[tuple[str, Any]]:
    """The rows of the files below these paths, or of the Hub's dataset, each with its place."""
    if paths is None:
        with hub_errors_explained(dataset, dataset_config, split):
            table = datasets.load_dataset(dataset, dataset_config, split=split)
        return ((f"{dataset}, row {row:,}", value) for row, value in enumerate(table, start=1))
    return (record for path in files_below(paths)[0] for record in read_objects(path))


def keep_good(
    records: Iterable[tuple[str, Any]], convert: Callable[[Any], Any], *, on_bad_record: str
) -> tuple[list[tuple[str, Any]], list[str]]:
    """The rows that can be converted, with their places, and what is wrong with the others, unless that is an error."""
    good: list[tuple[str, Any]] = []
    problems: list[str] = []
    for place, value in records:
        try:
            good.append((place, convert(value)))
        except ValueError as error:
            problems.append(f"{place}: {error}")
            if on_bad_record == "error":
                raise ValueError(
                    f"{problems[0]} Correct the row, or leave such rows out with on_bad_record='skip'."
                ) from error
    if problems:
        logger.warning("%s bad rows were skipped, first %s", f"{len(problems):,}", problems[0])
    return good, problems


def pair(question: str, answer: str, system: str | None = None) -> Messages:
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def read_objects(path: Path) -> Iterator[tuple[str, Any]]:
    """The rows of a .json (a list, or an object a line), .jsonl, .csv or .parquet, each with its place."""
    suffix = path.suffix.lower()
    if suffix == ".txt":
        raise ValueError(f"{path} is plain text, which has no columns. Conversations are {'; or '.join(FORMS)}.")
    try:
        if suffix == ".parquet":
            with pq.ParquetFile(path) as file:
                row = 1
                for batch in file.iter_batches(batch_size=256):
                    for value in batch.to_pylist():
                        yield f"{path}, row {row:,}", value
                        row += 1
            return
        text = path.read_text(encoding="utf-8-sig")
        if suffix == ".csv":
            reader = csv.DictReader(text.splitlines(keepends=True))
            if problem := repeated(reader.fieldnames or []):
                raise ValueError(f"{path}, line 1: {problem}.")
            for value in reader:
                yield f"{path}, line {reader.line_num:,}", {name: cell for name, cell in value.items() if name}
        elif text.lstrip().startswith("["):
            for row, value in enumerate(json.loads(text), start=1):
                yield f"{path}, row {row:,}", value
        else:
            for number, line in enumerate(text.split("\n"), start=1):
                if line.strip():
                    yield f"{path}, line {number:,}", _parse_line(line)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} holds bytes that are not UTF-8, at byte {error.start:,}.") from error
    except (pa.ArrowException, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as {suffix}: {error}") from error


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        return error  # a bad record, to be skipped or not, and not the end of the file


def rename(value: Any, column_map: Mapping[str, str]) -> Any:
    if not isinstance(value, dict):
        return value
    if missing := [name for name in column_map if name not in value]:
        raise ValueError(f"column_map: there is no column {missing[0]!r} but {list(value)}.")
    return {column_map.get(name, name): cell for name, cell in value.items()}


def as_messages(row: Any) -> Messages:
    """A row of one of FORMS as messages with the roles system, user and assistant; a ValueError says what is wrong."""
    if isinstance(row, ValueError):
        raise ValueError(f"not valid JSON: {row}.")
    if not isinstance(row, dict):
        raise ValueError(f"a {type(row).__name__}, not an object with columns.")
    # A table has every column in every row: those of another form are None.
    row = {name: value for name, value in row.items() if value is not None}
    system = row.get("system") or None
    if "messages" in row:
        messages = _listed(row["messages"], "messages", "role", "content")
    elif "conversations" in row:
        messages = _listed(row["conversations"], "conversations", "from", "value")
        if system and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
    elif "instruction" in row and "output" in row:
        question = _text(row["instruction"], "instruction").strip()
        if more := _text(row.get("input", ""), "input").strip():
            question = f"{question}\n\n{more}"
        messages = pair(question, row["output"], system)
    elif "prompt" in row and (answer := next((row[name] for name in PAIRS["prompt"] if name in row), None)) is not None:
        messages = [*row["prompt"], *answer] if isinstance(row["prompt"], list) else pair(row["prompt"], answer, system)
    else:
        raise ValueError(
            f"the columns {list(row)} are none of the forms known: {'; or '.join(FORMS)}. Rename them with column_map."
        )
    check_messages(messages)
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def check_messages(messages: Any) -> None:
    """A conversation is an optional system message, then user and assistant in turns, and somebody answers."""
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f"message {number + 1} is {message!r:.60}, not an object with role and content.")
        _text(message["content"], f"content of message {number + 1}")
    roles = [message["role"] for message in messages]
    if unknown := [role for role in roles if role not in ("system", "user", "assistant")]:
        raise ValueError(f"the role {unknown[0]!r} is none of system, user and assistant.")
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


def _is_empty(message: dict[str, str]) -> bool:
    return not message["content"].strip()


def _listed(messages: Any, column: str, role: str, content: str) -> Messages:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{column!r} is {messages!r:.60}, not a list of messages.")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not {role, content} <= set(message):
            raise ValueError(
                f"message {number} of {column!r} is {message!r:.80}, not an object with {role} and {content}."
            )
    return [
        {"role": ROLES.get(str(message[role]), str(message[role])), "content": message[content]} for message in messages
    ]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is a {type(value).__name__}, not a text.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name!r} holds half a surrogate pair, at character {error.start:,}.") from None
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
    """What is said before the first response, without case and spacing."""
    before = []
    for message in conversation.messages:
        if message["role"] == "assistant":
            break
        before.append(" ".join(message["content"].casefold().split()))
    return "\n".join(before)


def load_preferences(
    dataset: str,
    *,
    dataset_config: str | None = None,
    split: str = "train",
    on_bad_record: str = "error",
    validation_fraction: float,
    seed: int,
) -> tuple[list[dict[str, Messages]], list[dict[str, Messages]], dict[str, Any]]:
    """Rows of `prompt`, `chosen` and `rejected` as messages, to train on and to validate, and what was left out.

    `prompt` is a text or messages that end with the user's; `chosen` and `rejected` are texts or the assistant's
    messages, which may repeat the prompt, and must differ. Pairs of one prompt are on the same side.
    """
    paths = local_paths(dataset, dataset_config=dataset_config, split=split)
    if paths == []:
        raise ValueError("'stdlib' has no preferences: give a Hub id or files with prompt, chosen and rejected.")
    records = read_records_of(dataset, paths, dataset_config=dataset_config, split=split)
    pairs, problems = keep_good(records, as_preference, on_bad_record=on_bad_record)
    if not pairs:
        raise ValueError(f"{dataset!r} holds no preference.{f' The first bad row: {problems[0]}' if problems else ''}")
    keyed = [Conversation(row["prompt"], str(number)) for number, (_, row) in enumerate(pairs)]
    training, validation, _ = split_conversations(
        keyed, validation_fraction=validation_fraction, test_fraction=0, seed=seed
    )
    sides = [[pairs[int(each.place)][1] for each in side] for side in (training, validation)]
    return sides[0], sides[1], {"rows": len(pairs), "bad_records": len(problems)}


def as_preference(row: Any) -> dict[str, Messages]:
    if isinstance(row, ValueError):
        raise ValueError(f"not valid JSON: {row}.")
    columns = list(row) if isinstance(row, dict) else []
    if missing := [name for name in ("prompt", "chosen", "rejected") if name not in columns]:
        raise ValueError(f"there is no {', '.join(missing)} among the columns {columns}.")
    prompt = row["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    replies = {}
    for name in ("chosen", "rejected"):
        reply = row[name]
        if isinstance(reply, str):
            reply = [{"role": "assistant", "content": reply}]
        if isinstance(reply, list) and reply[: len(prompt)] == prompt:
            reply = reply[len(prompt) :]
        try:
            check_messages([*prompt, *reply])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from error
        replies[name] = reply
    if replies["chosen"] == replies["rejected"]:
        raise ValueError("chosen and rejected are the same, so nothing is preferred.")
    return {"prompt": prompt, **replies}
