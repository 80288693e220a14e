import inspect
import math

import pytest

from hfllm.serving.replies import Sampling
from hfllm.serving.requests import NOT_DONE, RequestError, read_chat_request


HELLO = [{"role": "user", "content": "Hello"}]
DEFAULTS = Sampling(20, temperature=0.5, top_p=0.9)


def read(body, *, system=None):
    return read_chat_request(
        body, DEFAULTS, model="talker", system=system, vocab_size=400, draw_seed=iter(range(100, 200)).__next__
    )


def test_what_a_request_does_not_say_is_the_commands():
    asked = read({"messages": HELLO}, system="Be kind")
    assert asked.messages == [{"role": "system", "content": "Be kind"}, *HELLO]
    assert asked.choices == [Sampling(20, temperature=0.5, top_p=0.9, seed=100)]
    assert (asked.stream, asked.include_usage) == (False, False)


def test_what_a_request_says_goes_before_the_commands():
    asked = read(
        {
            "model": "talker",
            "messages": [{"role": "developer", "content": "Be brief"}, *HELLO],
            "temperature": 2,
            "top_p": 0.25,
            "max_completion_tokens": 7,
            "n": 2,
            "seed": 5,
            "stop": ["a", "b"],
            "frequency_penalty": 1,
            "presence_penalty": -2,
            "logit_bias": {"3": 100},
            "logprobs": True,
            "top_logprobs": 4,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        system="Be kind",
    )
    expected = {
        "temperature": 2,
        "top_p": 0.25,
        "stop": ("a", "b"),
        "frequency_penalty": 1,
        "presence_penalty": -2,
        "logit_bias": {3: 100},
        "num_top_logprobs": 4,
    }
    assert asked.messages == [{"role": "system", "content": "Be brief"}, *HELLO]
    assert asked.choices == [Sampling(7, seed=5, **expected), Sampling(7, seed=6, **expected)]
    assert (asked.stream, asked.include_usage) == (True, True)


def test_null_is_as_good_as_left_out_and_a_reply_can_be_sent_back():
    nothing = dict.fromkeys(["temperature", "stop", "seed", "tools", "max_tokens", "logit_bias", "stream_options"])
    answered = {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": None, "annotations": []}
    asked = read({"messages": [*HELLO, answered, *HELLO], **nothing})
    assert asked.choices == read({"messages": HELLO}).choices
    assert asked.messages == [*HELLO, {"role": "assistant", "content": "Hi"}, *HELLO]


def test_parts_of_text_are_joined():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    assert read({"messages": [{"role": "user", "content": parts}]}).messages == HELLO


def test_whole_numbers_may_be_written_with_a_point():
    assert read({"messages": HELLO, "max_tokens": 1e9}).choices[0].max_new_tokens == 10**9


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": None}, "messages", "messages is empty or missing; give a list of at least one message"),
        ({"messages": []}, "messages", "empty or missing"),
        ({"messages": "Hello"}, "messages", "messages is a string"),
        ({"messages": ["Hello"]}, "messages.0", "a string; give an object with role and content"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "messages.0.role", "'wizard'; this model knows system"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "'tool'"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "messages.0.role", "a list"),
        ({"messages": [{"content": "a"}]}, "messages.0.role", "missing"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "must be a string"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "must be a string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///"}}]}]},
            "messages.0.content",
            "It has a part of type 'image_url'",
        ),
        ({"messages": [*HELLO, {"role": "user", "content": "a\ud800"}]}, "messages.1.content", "surrogate"),
        ({"messages": [{"role": "user", "content": "a", "name": "Ann"}]}, "messages.0.name", "not supported"),
        ({"messages": [{"role": "user", "content": "a", "weight": 0}]}, "messages.0.weight", "Unknown parameter"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; give a number at least 1"),
        ({"max_tokens": -1}, "max_tokens", "max_tokens is -1"),
        ({"max_completion_tokens": -3}, "max_completion_tokens", "is -3"),
        ({"max_tokens": 1.5}, "max_tokens", "is 1.5; give a whole number"),
        ({"max_tokens": "5"}, "max_tokens", "is '5'"),
        ({"max_tokens": True}, "max_tokens", "is true"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "give one of the two"),
        ({"temperature": -1}, "temperature", "is -1; give a number from 0 to 100"),
        ({"temperature": math.nan}, "temperature", "is nan"),
        ({"temperature": math.inf}, "temperature", "is inf"),
        ({"temperature": "hot"}, "temperature", "is 'hot'"),
        ({"temperature": 1e-30}, "temperature", "give 0, which takes the likeliest token, or at least 0.0001"),
        ({"temperature": 10**400}, "temperature", "temperature is 1000"),
        ({"top_p": 0}, "top_p", "leaves no token"),
        ({"top_p": 1.1}, "top_p", "is 1.1; give a number from 0 to 1"),
        ({"n": 0}, "n", "is 0"),
        ({"n": 129}, "n", "from 1 to 128"),
        ({"seed": 0.5}, "seed", "whole number"),
        ({"seed": 2**63}, "seed", "9223372036854775808"),
        ({"stop": ""}, "stop", "1 to 1,000 characters, or up to 4 such"),
        ({"stop": ["a"] * 5}, "stop", "a list"),
        ({"stop": ["a", 1]}, "stop", "a list"),
        ({"stop": "x" * 1001}, "stop", r"xxx\.\.\.; give"),
        ({"stop": "\ud800"}, "stop", "surrogate"),
        ({"presence_penalty": 3}, "presence_penalty", "from -2 to 2"),
        ({"frequency_penalty": "a"}, "frequency_penalty", "'a'"),
        ({"logit_bias": [1]}, "logit_bias", "a list"),
        ({"logit_bias": {"400": 1}}, "logit_bias", "token ids from 0 to 399"),
        ({"logit_bias": {"\u00b2": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"3": 101}}, "logit_bias.3", "from -100 to 100"),
        ({"logprobs": 1}, "logprobs", "is 1; give true or false"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"stream": "yes"}, "stream", "'yes'"),
        ({"stream_options": {}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": 1}, "stream_options", "a number"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", "true or false"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "Unknown parameter"),
        ({"user": 5}, "user", "give a string"),
        ({"tools": [{}]}, "tools", "tools is not supported by this server; leave it out"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"nonsense": 1}, "nonsense", "Unknown parameter: 'nonsense'"),
        ({"\ud800": 1}, r"\ud800", "Unknown parameter"),
        ({"model": 5}, "model", "a number"),
    ],
)
def test_what_is_not_done_is_refused_by_name(fields, param, message):
    with pytest.raises(RequestError, match=message) as refused:
        read({"messages": HELLO, **fields})
    assert refused.value.status == 400
    error = refused.value.body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_another_model_is_not_found():
    with pytest.raises(RequestError, match="This server has one model, 'talker'") as refused:
        read({"messages": HELLO, "model": "gpt-4"})
    assert refused.value.status == 404
    assert refused.value.body["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("body", [None, [], "text", 5, True])
def test_a_body_that_is_not_an_object_is_refused(body):
    with pytest.raises(RequestError, match="send a JSON object"):
        read(body)


def test_every_parameter_of_openais_client_is_used_or_refused():
    completions = pytest.importorskip("openai").resources.chat.completions.Completions
    transport = {"self", "extra_headers", "extra_query", "extra_body", "timeout"}
    known = inspect.signature(completions.create).parameters.keys() - transport
    done = {
        *("messages", "model", "temperature", "top_p", "max_tokens", "max_completion_tokens", "n", "seed", "stop"),
        *("frequency_penalty", "presence_penalty", "logit_bias", "logprobs", "top_logprobs", "stream"),
        *("stream_options", "user", "safety_identifier", "prompt_cache_key"),
    }
    assert len(known) > 30
    assert known - done == set(NOT_DONE)
    for name in NOT_DONE:
        with pytest.raises(RequestError) as refused:
            read({"messages": HELLO, name: {"asks": "for something"}})
        assert refused.value.body["error"]["code"] == "unsupported_parameter"
