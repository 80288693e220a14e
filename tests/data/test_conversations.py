"""Rows of the published forms become the same messages; other rows are refused with their place."""

import json
import re
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfllm.data.conversations import (
    Conversation,
    as_messages,
    join_turns,
    load_conversations,
    pair,
    split_conversations,
)


ONE_TURN = pair("Add 1 and 2", "3")
FORMS = {
    "alpaca": {"instruction": "Add", "input": "1 and 2", "output": "3"},
    "prompt_response": {"prompt": "Add 1 and 2", "response": "3"},
    "prompt_completion": {"prompt": "Add 1 and 2", "completion": "3"},
    "messages": {"messages": ONE_TURN},
    "sharegpt": {"conversations": [{"from": "human", "value": "Add 1 and 2"}, {"from": "gpt", "value": "3"}]},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_messages(form):
    expected = pair("Add\n\n1 and 2", "3") if form == "alpaca" else ONE_TURN
    assert as_messages(FORMS[form]) == expected


def test_an_alpaca_row_without_input_is_its_instruction_alone():
    assert as_messages({"instruction": "Sing", "input": "", "output": "La"}) == pair("Sing", "La")


@pytest.mark.parametrize("form", FORMS)
def test_a_system_column_goes_first_beside_every_form(form):
    without = as_messages(FORMS[form])
    system = {"role": "system", "content": "You are a pirate."}
    assert as_messages({**FORMS[form], "system": "You are a pirate."}) == [system, *without]
    assert as_messages({**FORMS[form], "system": ""}) == as_messages({**FORMS[form], "system": None}) == without


def test_a_system_message_beside_another_one_in_a_column_is_refused():
    row = {"messages": pair("Q", "A", "Be brief"), "system": "Be brief"}
    assert as_messages(row) == pair("Q", "A", "Be brief")
    with pytest.raises(ValueError, match="begin with a system message, and its column 'system' has another one"):
        as_messages({**row, "system": "Be long"})


def test_history_goes_before_the_question_as_turns():
    turns = [*pair("Hello", "Hi"), *pair("Add 1 and 2", "3")]
    for history in ([["Hello", "Hi"]], pair("Hello", "Hi")):
        assert as_messages({**FORMS["prompt_response"], "history": history}) == turns
    assert (
        as_messages({**FORMS["alpaca"], "input": "", "instruction": "Add 1 and 2", "history": [["Hello", "Hi"]]})
        == turns
    )
    with pytest.raises(ValueError, match="turn 1 of 'history' is 'Hello', not a pair"):
        as_messages({**FORMS["prompt_response"], "history": ["Hello"]})
    with pytest.raises(ValueError, match="it has a 'history' beside 'messages'"):
        as_messages({**FORMS["messages"], "history": [["Hello", "Hi"]]})


def test_input_beside_prompt_and_response_goes_below_the_prompt():
    assert as_messages({"prompt": "Add", "input": "1 and 2", "response": "3"}) == pair("Add\n\n1 and 2", "3")


def test_a_prompt_and_an_answer_may_be_messages():
    row = {
        "prompt": [{"role": "user", "content": "Add 1 and 2"}],
        "completion": [{"role": "assistant", "content": "3"}],
    }
    assert as_messages(row) == as_messages({**row, "completion": "3"}) == ONE_TURN


def test_a_response_of_weight_0_is_kept_and_marked():
    messages = [*pair("Q1", "A1"), *pair("Q2", "A2")]
    weighted = [messages[0], {**messages[1], "weight": 0}, messages[2], {**messages[3], "weight": 1}]
    assert as_messages({"messages": weighted}) == [messages[0], {**messages[1], "weight": 0}, *messages[2:]]
    for message, problem in (
        ({**messages[1], "weight": 0.5}, "message 2 has the weight 0.5; it is 0"),
        ({**messages[1], "weight": 0}, "each response has weight 0"),
    ):
        with pytest.raises(ValueError, match=problem):
            as_messages({"messages": [messages[0], message]})
    with pytest.raises(ValueError, match="message 1 has weight 1, and only what the assistant says is learned"):
        as_messages({"messages": [{**messages[0], "weight": 1}, messages[1]]})


@pytest.mark.parametrize("name", ["tools", "functions", "tool_calls"])
def test_tools_are_refused_by_name(name):
    assert as_messages({**FORMS["messages"], name: None}) == as_messages({**FORMS["messages"], name: []}) == ONE_TURN
    with pytest.raises(ValueError, match=f"it has '{name}', and models are not taught to call tools"):
        as_messages({**FORMS["messages"], name: [{"name": "search"}]})


def test_calls_of_tools_in_a_message_are_refused_by_name_and_other_keys_are_reported(tmp_path, caplog):
    called = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    with pytest.raises(ValueError, match="message 2 has 'tool_calls'"):
        as_messages({"messages": [ONE_TURN[0], called]})
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"messages": [{**ONE_TURN[0], "name": "Ann"}, {**ONE_TURN[1], "tool_calls": None}]}]))
    assert load_conversations(str(path)).rows[0].messages == ONE_TURN
    assert caplog.messages == [f"{path}: not used: messages[].name."]


def test_a_renamed_column_does_not_replace_another(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"question": "Q", "prompt": "P", "response": "A"}]))
    with pytest.raises(ValueError, match="two columns would have the name 'prompt'"):
        load_conversations(str(path), column_map={"question": "prompt"})


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_every_kind_of_file_gives_the_same_conversations(suffix, tmp_path):
    rows = [{"prompt": 'Say "é", twice\nplease', "response": "é, é"}, {"prompt": "Bye", "response": "Good night"}]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "csv":
        path.write_text('prompt,response\n"Say ""é"", twice\nplease","é, é"\nBye,Good night\n', encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    loaded = load_conversations(str(path))
    assert [row.messages for row in loaded.rows] == [pair(row["prompt"], row["response"]) for row in rows]


def test_columns_can_be_renamed(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"question": "Q", "answer": "A"}]))
    loaded = load_conversations(str(path), column_map={"question": "prompt", "answer": "response"})
    assert loaded.rows[0].messages == pair("Q", "A")


user, assistant = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
BAD = {
    "unknown columns": ({"question": "Q", "answer": "A"}, r"\['question', 'answer'\].*instruction, output"),
    "no response": ({"messages": [user]}, "no response"),
    "empty response": ({"instruction": "Q", "output": "  "}, "response in message 2 is empty"),
    "assistant first": ({"messages": [assistant, user]}, "out of order: assistant, user"),
    "two users": ({"messages": [user, user, assistant]}, "out of order: user, user, assistant"),
    "system late": ({"messages": [user, assistant, {"role": "system", "content": "S"}]}, "out of order"),
    "unknown role": ({"messages": [user, {"role": "tool", "content": "{}"}]}, "role 'tool'"),
    "unknown sender": ({"conversations": [{"from": "observation", "value": "x"}]}, "role 'observation'"),
    "not a list": ({"messages": "hello"}, "not a list of messages"),
    "no content": ({"messages": [{"role": "user"}]}, "not an object with role and content"),
    "a number": ({"prompt": "Q", "response": 3}, "is a number, not a text"),
    "not an object": (["Q", "A"], "list, not an object"),
    "null prompt": ({"prompt": None, "response": "A"}, r"\('prompt' is null\) fit no known form"),
    "prompt a number": ({"prompt": 5, "response": "A"}, "'prompt' is a number, not a text"),
    "system a number": ({"prompt": "Q", "response": "A", "system": 5}, "'system' is a number, not a text"),
    "an empty list": ({"messages": []}, "an empty list, not a list of messages"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_is_not_a_conversation_says_why_and_where(name, tmp_path):
    row, message = BAD[name]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (FORMS["messages"], row)))
    with pytest.raises(ValueError, match=re.compile(rf"rows\.jsonl, line 2: .*{message}", re.DOTALL)):
        load_conversations(str(path))
    skipped = load_conversations(str(path), on_bad_record="skip")
    assert len(skipped.rows) == 1 and skipped.account["bad_records"] == 1


def test_a_torn_line_is_a_bad_row_and_not_the_end_of_the_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "Q", "resp\n{"prompt": "Q", "response": "A"}\n')
    with pytest.raises(ValueError, match="line 1: not valid JSON"):
        load_conversations(str(path))
    assert len(load_conversations(str(path), on_bad_record="skip").rows) == 1


def test_nothing_left_is_an_error(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "no conversation"}\n')
    with pytest.raises(ValueError, match="holds no conversation"):
        load_conversations(str(path), on_bad_record="skip")


def test_the_books_instructions_are_recognised(book_data):
    loaded = load_conversations(str(book_data / "instruction-data.json"))
    assert len(loaded.rows) == 1100
    assert loaded.rows[0].messages[0]["content"].endswith("into the spelling given.\n\nfreind --> friend")


def test_no_question_recurs_between_training_validation_and_test():
    conversations = load_conversations("stdlib").rows
    conversations += [  # the same questions written otherwise
        type(row)([{"role": "user", "content": row.messages[0]["content"].upper() + " "}, row.messages[1]], row.place)
        for row in conversations[:500]
    ]
    sides = split_conversations(conversations, validation_fraction=0.05, test_fraction=0.1, seed=1)
    questions = [{" ".join(row.messages[0]["content"].lower().split()) for row in side} for side in sides]
    assert not questions[0] & questions[1] and not questions[0] & questions[2] and not questions[1] & questions[2]
    assert sum(map(len, sides)) == len(conversations)
    assert len(sides[2]) == pytest.approx(0.1 * len(conversations), rel=0.01)


def test_too_few_prompts_to_split_is_an_error():
    row = Conversation(pair("What is 1 + 1?", "2"), "here")
    with pytest.raises(ValueError, match="1 different prompts are too few"):
        split_conversations([row] * 10, validation_fraction=0.1, test_fraction=0.1, seed=0)


def test_joined_turns_have_each_question_once_with_its_answer():
    rows = [Conversation(pair(f"q{number}", f"a{number}"), "here", "sum") for number in range(400)]
    system = Conversation([{"role": "system", "content": "S"}, *pair("q", "a")], "here")
    long = Conversation([*pair("1", "2"), *pair("3", "4")], "here")
    joined = join_turns([*rows, system, long], max_turns=4, seed=1)
    assert system in joined and long in joined
    turns = [row.messages for row in joined if row not in (system, long)]
    for messages in turns:
        for at in range(0, len(messages), 2):
            number = messages[at]["content"].removeprefix("q")
            assert messages[at : at + 2] == pair(f"q{number}", f"a{number}")
    asked = [message["content"] for each in turns for message in each[::2]]
    assert sorted(asked) == sorted(row.messages[0]["content"] for row in rows) and asked != sorted(asked)
    counts = Counter(len(each) // 2 for each in turns)
    assert set(counts) == {1, 2, 3, 4} and min(counts.values()) > 20
    assert (
        join_turns(rows, max_turns=4, seed=1)
        == join_turns(rows, max_turns=4, seed=1)
        != join_turns(rows, max_turns=4, seed=2)
    )
    assert sorted(join_turns(rows, max_turns=1, seed=1), key=str) == sorted(rows, key=str)
