import json

import pytest


pytest.importorskip("gradio", reason="needs the chat extra: pip install -e '.[chat]'")

from hfllm.serving.page import as_messages, replace_lone_surrogates


def test_half_of_a_surrogate_pair_is_replaced_in_json_and_nothing_else_is():
    texts = ["a\ud800b", "\udfff", "\ud83d\ude00", "\ud800\ud83d\ude00", "\\ud800", "\\\\", 'é "\n', "\ud800\ud800"]
    expected = ["a\ufffdb", "\ufffd", "\U0001f600", "\ufffd\U0001f600", "\\ud800", "\\\\", 'é "\n', "\ufffd\ufffd"]
    body = json.dumps(texts).encode()
    assert json.loads(replace_lone_surrogates(body)) == expected
    assert len(replace_lone_surrogates(body)) == len(body), "the Content-Length holds"


def test_messages_without_an_answer_are_left_out():
    history = [
        {"role": "user", "content": "unanswered"},
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": "unanswered"},
    ]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert as_messages("c", history, "") == turns
    assert as_messages("c", history, "s") == [{"role": "system", "content": "s"}, *turns]
