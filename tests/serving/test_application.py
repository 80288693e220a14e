"""The HTTP server, called in this process as an ASGI server calls it."""

import asyncio
import json
import random
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hfllm.data.instruction import encode_prompt
from hfllm.serving.replies import ReplyWriter, Sampling


pytest.importorskip("fastapi", reason="needs the chat extra: pip install -e '.[chat]'")

from hfllm.serving.application import LARGEST_BODY, build_application, fit_choices
from hfllm.serving.requests import RequestError


HELLO = [{"role": "user", "content": "Hello"}]


def call(
    app: Any,
    method: str,
    path: str,
    body: bytes | Any = None,
    *,
    headers: dict[str, str] | None = None,
    leaves_after: Callable[[list[dict]], bool] | None = None,
) -> tuple[int, str]:
    """Status and text of one request; the client can leave as soon as it has got some messages."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    named = {"host": "127.0.0.1:8000", "content-type": "application/json", **(headers or {})}
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(key.encode(), value.encode()) for key, value in named.items()],
        "client": ("127.0.0.1", 5000),
        "server": ("127.0.0.1", 8000),
    }
    sent: list[dict] = []
    requests = [{"type": "http.request", "body": data, "more_body": False}]

    async def exchange() -> None:
        has_left = asyncio.Event()
        if leaves_after is not None and leaves_after(sent):
            has_left.set()

        async def receive() -> dict:
            if requests:
                return requests.pop()
            await has_left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            sent.append(message)
            if leaves_after is not None and leaves_after(sent):
                has_left.set()

        await asyncio.wait_for(app(scope, receive, send), 60)

    asyncio.run(exchange())
    text = b"".join(message.get("body", b"") for message in sent[1:]).decode()
    return sent[0]["status"], text


def events(text: str) -> list[Any]:
    """What a stream of server-sent events says."""
    lines = [line for line in text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@pytest.fixture
def app(writer):
    return build_application(writer, Sampling(12), name="talker", system=None)


@pytest.fixture
def ask(app):
    def ask(**fields) -> dict:
        status, text = call(app, "POST", "/v1/chat/completions", {"messages": HELLO, **fields})
        assert status == 200, text
        return json.loads(text)

    return ask


def says(answer: dict) -> list[str]:
    return [choice["message"]["content"] for choice in answer["choices"]]


def greedy(model, tokenizer, messages, max_new_tokens: int) -> str:
    prompt = torch.tensor([encode_prompt(messages, tokenizer)])
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=2
    )
    return tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True).rstrip("\ufffd")


def test_a_reply_is_that_of_generate(model, tokenizer, ask):
    answer = ask(model="talker")
    prompt = encode_prompt(HELLO, tokenizer)
    assert says(answer) == [greedy(model, tokenizer, HELLO, 12)]
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 12,
        "total_tokens": len(prompt) + 12,
    }
    assert (answer["object"], answer["model"]) == ("chat.completion", "talker")


def test_the_commands_options_are_a_requests_defaults(model, tokenizer, writer):
    app = build_application(writer, Sampling(5, temperature=1.0), name="talker", system="Be kind")
    answers = [json.loads(call(app, "POST", "/v1/chat/completions", {"messages": HELLO})[1]) for _ in range(3)]
    system = [{"role": "system", "content": "Be kind"}]
    assert {answer["usage"]["completion_tokens"] for answer in answers} == {5}
    assert {answer["usage"]["prompt_tokens"] for answer in answers} == {len(encode_prompt(system + HELLO, tokenizer))}
    assert len({says(answer)[0] for answer in answers}) == 3, "drawn"

    own = [{"role": "system", "content": "Be brief"}, *HELLO]
    answer = call(app, "POST", "/v1/chat/completions", {"messages": own, "temperature": 0, "max_tokens": 9})[1]
    assert says(json.loads(answer)) == [greedy(model, tokenizer, own, 9)]


def test_above_temperature_0_replies_are_drawn_and_a_seed_repeats(ask):
    for temperature in (1, 5):
        assert len({says(ask(temperature=temperature))[0] for _ in range(3)}) == 3
        assert len({says(ask(temperature=temperature, seed=8))[0] for _ in range(2)}) == 1
    assert len({says(ask(temperature=0))[0] for _ in range(2)}) == 1


def test_n_replies_have_seeds_one_after_another(ask):
    three = ask(temperature=1, seed=8, n=3)
    assert says(three) == [says(ask(temperature=1, seed=seed))[0] for seed in (8, 9, 10)]
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    assert three["usage"]["completion_tokens"] == 36


def test_a_stop_string_cuts_exactly_in_an_answer_and_in_a_stream(app, ask):
    (whole,) = says(ask())
    stop = whole[6:8]
    cut = ask(stop=[stop, "never written"])
    assert says(cut) == [whole[: whole.index(stop)]]
    assert cut["choices"][0]["finish_reason"] == "stop"
    body = {"messages": HELLO, "stream": True, "stop": stop}
    streamed = events(call(app, "POST", "/v1/chat/completions", body)[1])
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in streamed) == whole[: whole.index(stop)]


def test_a_stream_has_openais_form_and_its_pieces_are_the_answer(app, ask):
    body = {"messages": HELLO, "stream": True, "n": 2, "stream_options": {"include_usage": True}}
    status, text = call(app, "POST", "/v1/chat/completions", body)
    *pieces, last = events(text)
    answer = ask(n=2)
    assert status == 200
    assert last["choices"] == [] and last["usage"] == answer["usage"]
    assert {piece["object"] for piece in pieces} == {"chat.completion.chunk"}
    assert {piece["usage"] for piece in pieces} == {None}
    assert len({piece["id"] for piece in [*pieces, last]}) == 1
    for index, text in enumerate(says(answer)):
        own = [piece["choices"][0] for piece in pieces if piece["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in own) == text
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["length"]
        assert len(own) > 5, "piece by piece"


def test_log_probabilities_have_openais_form_and_are_the_same_in_a_stream(app, ask, tokenizer):
    answer = ask(logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 12
    for token in content:
        assert set(token) == {"token", "logprob", "bytes", "top_logprobs"}
        assert token["logprob"] == token["top_logprobs"][0]["logprob"] >= token["top_logprobs"][1]["logprob"]
    # The bytes of all tokens are the text, also where a token is a part of a character only.
    written = bytes(byte for token in content for byte in token["bytes"])
    assert written.decode(errors="replace").rstrip("\ufffd") == says(answer)[0]
    body = {"messages": HELLO, "stream": True, "logprobs": True, "top_logprobs": 2}
    streamed = events(call(app, "POST", "/v1/chat/completions", body)[1])
    assert [token for event in streamed for token in event["choices"][0]["logprobs"]["content"]] == content


def test_max_tokens_is_capped_by_the_context(ask, tokenizer):
    answer = ask(max_tokens=10**9)
    assert answer["usage"]["total_tokens"] == 128
    assert answer["choices"][0]["finish_reason"] == "length"


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(app, tokenizer):
    messages = [{"role": "user", "content": "word " * 20_000}]
    status, text = call(app, "POST", "/v1/chat/completions", {"messages": messages})
    error = json.loads(text)["error"]
    assert status == 400 and error["code"] == "context_length_exceeded"
    number = f"{len(encode_prompt(messages, tokenizer)):,}"
    assert (
        f"context is 128 tokens, prompt and reply together, and the messages have {number} tokens" in error["message"]
    )
    assert fit_choices([Sampling(5)], 127, 128) == [Sampling(1)]
    with pytest.raises(RequestError):
        fit_choices([Sampling(5)], 128, 128)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The body is not valid JSON: Expecting value, line 1, column 1"),
        (b'{"messages": [', "not valid JSON"),
        (b'{"\xff": 1}', "The body is not UTF-8: byte 3 is wrong"),
        (b"[" * 100_000, "The body is nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "too many digits"),
        (b"null", "The body is missing; send a JSON object"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "half of a surrogate pair"),
    ],
)
def test_a_body_that_is_not_a_request_is_refused(app, body, message):
    status, text = call(app, "POST", "/v1/chat/completions", body)
    assert status == 400
    assert message in json.loads(text)["error"]["message"]


def test_a_body_that_is_too_large_is_refused(app):
    status, text = call(app, "POST", "/v1/chat/completions", b" " * (LARGEST_BODY + 1))
    assert status == 413 and "larger than 4,194,304 bytes" in text


def test_what_a_template_refuses_is_refused(app, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('one turn only') }}")
    status, text = call(app, "POST", "/v1/chat/completions", {"messages": HELLO})
    assert status == 400 and "one turn only" in text


def test_200_malformed_requests_are_each_refused_and_none_is_an_error_of_the_server(app):
    """Small valid requests in which one thing was exchanged, cut or flipped."""
    draw = random.Random(0)
    strange = [None, True, -1, 0, 1.5, 1e400, "", "\ud800", "x" * 5000, [], {}, [[]], {"a": {}}, [None], 10**30]
    body = {
        "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": [{"type": "text", "text": "b"}]}],
        "temperature": 1,
        "top_p": 0.5,
        "max_tokens": 1,
        "stop": ["x"],
        "n": 1,
        "seed": 1,
        "logit_bias": {"5": 1},
        "logprobs": True,
        "top_logprobs": 1,
        "stream": False,
        "user": "me",
    }

    def places(value, path=()):
        yield path
        for key, inner in (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        ):
            yield from places(inner, (*path, key))

    num_refused = 0
    while num_refused < 200:
        changed = json.loads(json.dumps(body))
        if draw.random() < 0.6:
            *path, last = draw.choice(list(places(changed))[1:])
            inner = changed
            for key in path:
                inner = inner[key]
            inner[last] = draw.choice(strange)
            data = json.dumps(changed).encode()
        else:
            data = bytearray(json.dumps(changed).encode())
            for _ in range(draw.randint(1, 3)):
                data[draw.randrange(len(data))] = draw.randrange(256)
            data = bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])
        status, text = call(app, "POST", "/v1/chat/completions", data)
        assert status in (200, 400, 404), (data, text)
        if status != 200:
            assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}
            num_refused += 1


def test_only_our_routes_are_there(app):
    assert json.loads(call(app, "GET", "/health")[1]) == {"status": "ok"}
    listed = json.loads(call(app, "GET", "/v1/models")[1])
    assert [model["id"] for model in listed["data"]] == ["talker"]
    assert json.loads(call(app, "GET", "/v1/models/talker")[1]) == listed["data"][0]
    for method, path, expected in [
        *[("GET", path, 404) for path in ("/", "/docs", "/redoc", "/openapi.json", "/v1/models/other", "/health/")],
        *[("POST", path, 404) for path in ("/load_model", "/reset", "/v1/audio/transcriptions", "/v1/responses")],
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/models", 405),
    ]:
        status, text = call(app, method, path, {})
        assert (status, set(json.loads(text)["error"])) == (expected, {"message", "type", "param", "code"}), path


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "192.168.1.5:8000"}, 200),
        ({"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"}, 200),
        ({"host": "attacker.example"}, 403),  # DNS rebinding: a name of theirs that was made to point here
        ({"host": "attacker.example:8000", "origin": "http://attacker.example:8000"}, 403),
        ({"host": "127.0.0.1.attacker.example"}, 403),
        ({"host": ""}, 403),
        ({"origin": "https://attacker.example"}, 403),
        ({"origin": "http://127.0.0.1:9000"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_other_names_and_other_sites_pages_are_refused(app, headers, expected):
    assert call(app, "GET", "/health", headers=headers)[0] == expected
    assert (
        call(app, "POST", "/v1/chat/completions", {"messages": HELLO, "max_tokens": 1}, headers=headers)[0] == expected
    )


def test_a_server_goes_by_the_host_that_it_was_given(writer):
    app = build_application(writer, Sampling(5), name="talker", host="chat.example")
    assert call(app, "GET", "/health", headers={"host": "chat.example:8000"})[0] == 200
    assert call(app, "GET", "/health", headers={"host": "other.example:8000"})[0] == 403


def test_a_form_of_another_page_is_refused(app):
    for kind in ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain", ""):
        body = json.dumps({"messages": HELLO}).encode()
        assert call(app, "POST", "/v1/chat/completions", body, headers={"content-type": kind})[0] == 415


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_generation(app, writer, stream):
    begun = 3 if stream else 0
    body = {"messages": HELLO, "n": 128, "max_tokens": 10**9, "stream": stream}
    call(app, "POST", "/v1/chat/completions", body, leaves_after=lambda sent: len(sent) >= begun)
    status, _ = call(app, "POST", "/v1/chat/completions", {"messages": HELLO, "max_tokens": 20})
    assert status == 200
    deadline = time.monotonic() + 60
    while writer._active or writer._waiting:
        assert time.monotonic() < deadline, "it is still being written"
        time.sleep(0.01)


def test_more_clients_than_the_queue_holds_are_refused_for_now(model, tokenizer):
    writer = ReplyWriter(model, tokenizer, max_waiting=0)
    try:
        app = build_application(writer, Sampling(5), name="talker")
        status, text = call(app, "POST", "/v1/chat/completions", {"messages": HELLO})
        assert status == 429 and json.loads(text)["error"]["type"] == "rate_limit_error"
        writer.close()
        assert call(app, "POST", "/v1/chat/completions", {"messages": HELLO})[0] == 503
    finally:
        writer.close()
        writer.join(30)


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_of_the_server_says_nothing_of_the_machine(app, model, stream, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(2, "No such file", "/home/somebody/secret")

    monkeypatch.setattr(model, "generate", fail)
    status, text = call(app, "POST", "/v1/chat/completions", {"messages": HELLO, "stream": stream})
    assert status == (200 if stream else 500)
    assert "The reply could not be written." in text and "secret" not in text
    assert re.search(r'"type": ?"server_error"', text)


def test_openais_client_understands_every_answer(app, ask):
    openai, httpx = pytest.importorskip("openai"), pytest.importorskip("httpx2")

    async def talk() -> None:
        transport = httpx.AsyncClient(transport=httpx.ASGITransport(app))
        client = openai.AsyncOpenAI(
            base_url="http://127.0.0.1/v1", api_key="none", http_client=transport, max_retries=0
        )
        create = client.chat.completions.create
        fields = {"model": "talker", "messages": HELLO, "max_tokens": 6, "logprobs": True, "top_logprobs": 1, "n": 2}
        answer = await create(**fields, user="me", stop=["never"], seed=1, presence_penalty=0.5, logit_bias={"9": 1})
        assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
        assert len(answer.choices[0].logprobs.content) == 6
        chunks = [chunk async for chunk in await create(**fields, stream=True, stream_options={"include_usage": True})]
        assert chunks[-1].usage.completion_tokens == 12
        again = await create(model="talker", messages=[*HELLO, answer.choices[0].message.model_dump()], max_tokens=1)
        assert again.choices[0].message.role == "assistant"
        assert [model.id async for model in await client.models.list()] == ["talker"]
        for error, wrong in [
            (openai.BadRequestError, {"temperature": -1}),
            (openai.BadRequestError, {"tools": [{"type": "function", "function": {"name": "f"}}]}),
            (openai.NotFoundError, {"model": "gpt-4"}),
        ]:
            with pytest.raises(error) as refused:
                await create(**{**fields, **wrong})
            assert refused.value.param == next(iter(wrong))

    asyncio.run(talk())
