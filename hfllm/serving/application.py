"""An OpenAI-compatible HTTP server for one model that is already loaded.

transformers' own server looks up a model's class in its module, so it cannot open ours. It would also load any model
that a request names, and serve audio routes beside the chat. So this is our own application, on FastAPI.
"""

import asyncio
import ipaddress
import itertools
import json
import logging
import random
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

from ..data.json_files import as_object, explain
from .replies import (
    JobEvents,
    QueueIsFull,
    Reply,
    ReplyToken,
    ReplyWriter,
    Sampling,
    ServerIsClosing,
    context_length,
    encode_messages,
    encode_text,
)
from .requests import RequestError, read_chat_request, read_text_request


logger = logging.getLogger(__name__)

LARGEST_BODY = 4 * 2**20  # bytes
MOST_CONNECTIONS = 256
SECONDS_TO_CLOSE = 5  # for connections that are open when the server ends


def build_application(
    writer: ReplyWriter, defaults: Sampling, *, name: str, system: str | None = None, host: str = "127.0.0.1"
) -> ASGIApp:
    """The application that answers requests to the writer's model under this name.

    Parameters that a request does not give are taken from `defaults` and `system`. `defaults.seed` seeds the series of
    seeds for requests without one. `host` is the address that the server listens at, see `OwnPagesOnly`.
    """
    # The documentation's pages would load scripts from other servers.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    created = int(time.time())
    listed = {"id": name, "object": "model", "created": created, "owned_by": "hfllm"}
    seeds = random.Random(defaults.seed)
    tokenizing = threading.Lock()  # long requests one after another

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [listed]}

    @app.get("/v1/models/{model}")
    async def get_model(model: str) -> dict[str, Any]:
        if model != name:
            raise RequestError(
                f"This server has one model, {name!r}.", param="model", code="model_not_found", status=404
            )
        return listed

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        asked = read_chat_request(
            await read_json(request),
            defaults,
            model=name,
            system=system,
            vocab_size=writer.model.config.vocab_size,
            draw_seed=lambda: seeds.getrandbits(32),
        )

        def encode() -> list[int]:
            with tokenizing:
                return encode_messages(asked.messages, writer.tokenizer)

        if writer.tokenizer.chat_template is None:
            raise RequestError(
                "This model has no chat template, so nothing says how a conversation is written. It continues texts: "
                "POST /v1/completions with a prompt.",
                code="unsupported_route",
                status=404,
            )
        try:
            prompt_ids = await run_in_threadpool(encode)
        except ValueError as error:
            raise RequestError(str(error), param="messages") from error
        choices = fit_choices(asked.choices, len(prompt_ids), context_length(writer.model))
        form = ChatForm(writer.tokenizer, choices)
        exchange = Exchange(writer, form, name, [prompt_ids] * len(choices), choices)
        return await exchange.respond(request, stream=asked.stream, include_usage=asked.include_usage)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = read_text_request(
            await read_json(request),
            defaults,
            model=name,
            vocab_size=writer.model.config.vocab_size,
            draw_seed=lambda: seeds.getrandbits(32),
        )

        def encode(prompt: str | list[int]) -> list[int]:
            if not isinstance(prompt, str):
                return prompt
            with tokenizing:
                return encode_text(prompt, writer.tokenizer)

        prompts, choices, echoed = [], [], []
        for prompt in asked.prompts:
            prompt_ids = await run_in_threadpool(encode, prompt)
            choices += fit_choices(asked.choices, len(prompt_ids), context_length(writer.model), param="prompt")
            prompts += [prompt_ids] * len(asked.choices)
            text = prompt if isinstance(prompt, str) else writer.tokenizer.decode(prompt)
            echoed += [text if asked.echo else ""] * len(asked.choices)
        form = TextForm(writer.tokenizer, choices, echoed=echoed)
        exchange = Exchange(writer, form, name, prompts, choices, num_prompts=len(asked.prompts))
        return await exchange.respond(request, stream=asked.stream, include_usage=asked.include_usage)

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        message = {404: "There is no such route.", 405: "This route does not take this method."}
        text = message.get(error.status_code, str(error.detail))
        return error_response(RequestError(text, status=error.status_code), headers=error.headers)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        return error_response(as_request_error(error))

    return OwnPagesOnly(app, host)


def error_response(error: RequestError, headers: Any = None) -> JSONResponse:
    return JSONResponse(error.body, status_code=error.status, headers=headers)


def fit_choices(
    choices: Sequence[Sampling], prompt_length: int, context: int, *, param: str = "messages"
) -> list[Sampling]:
    """The choices, with at most as many new tokens as fit into the context after the prompt."""
    if prompt_length >= context:
        have = "the messages have" if param == "messages" else "the prompt has"
        raise RequestError(
            f"This model's context is {context:,} tokens, prompt and reply together, and {have} {prompt_length:,} "
            f"tokens. Shorten the {param}.",
            param=param,
            code="context_length_exceeded",
        )
    return [replace(each, max_new_tokens=min(each.max_new_tokens, context - prompt_length)) for each in choices]


async def read_json(request: Request) -> Any:
    """The body of a request, as JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form of another web page can send other kinds only
        raise RequestError("Send JSON, with the header Content-Type: application/json.", status=415)
    body = bytearray()
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGEST_BODY:
                raise RequestError(f"The body is larger than {LARGEST_BODY:,} bytes; shorten the text.", status=413)
    except ClientDisconnect as error:
        raise RequestError("The client left before the end of the body.") from error
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=as_object)
    except UnicodeDecodeError as error:
        raise RequestError(f"The body is not UTF-8: byte {error.start + 1:,} is wrong.") from error
    except json.JSONDecodeError as error:
        raise RequestError(
            f"The body is not valid JSON: {error.msg}, line {error.lineno}, column {error.colno}."
        ) from error
    except (RecursionError, ValueError) as error:
        raise RequestError(f"The body cannot be read: {explain(error)}.") from error


class Exchange:
    """A request's replies, in one of OpenAI's two forms."""

    def __init__(
        self,
        writer: ReplyWriter,
        form: "ChatForm | TextForm",
        name: str,
        prompts: Sequence[Sequence[int]],
        choices: Sequence[Sampling],
        *,
        num_prompts: int = 1,
    ):
        self.form = form
        self.num_prompt_tokens = sum(map(len, prompts[:: len(prompts) // num_prompts]))  # each prompt once
        self.choices = choices
        self.head = {"id": f"{form.id_prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        try:
            self.events = JobEvents(writer, prompts, choices)
        except (QueueIsFull, ServerIsClosing) as error:
            raise as_request_error(error) from error

    async def respond(self, request: Request, *, stream: bool, include_usage: bool) -> Response:
        if stream:
            events = self._stream(include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        return await self._answer(request)

    def _usage(self, num_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_tokens,
            "total_tokens": self.num_prompt_tokens + num_tokens,
        }

    async def _answer(self, request: Request) -> Response:
        """The whole answer; if the client leaves, generation of its replies stops."""
        gone = asyncio.ensure_future(wait_until_gone(request))
        answer = asyncio.ensure_future(self._collect())
        try:
            await asyncio.wait({gone, answer}, return_when=asyncio.FIRST_COMPLETED)
            return JSONResponse(answer.result()) if answer.done() else Response(status_code=499)
        finally:
            gone.cancel()
            answer.cancel()
            self.events.cancel()

    async def _collect(self) -> dict[str, Any]:
        texts = [""] * len(self.choices)
        tokens: list[list[ReplyToken]] = [[] for _ in self.choices]
        replies: list[Reply] = []
        while len(replies) < len(self.choices):
            try:
                number, piece, new = await self.events.get()
            except Exception as error:
                raise as_request_error(error) from error
            tokens[number] += new
            if isinstance(piece, str):
                texts[number] += piece
            else:
                replies.append(piece)
        return {
            **self.head,
            "object": self.form.whole,
            "choices": [
                self.form.choice(number, text, tokens[number], replies[number].finish_reason)
                for number, text in enumerate(texts)
            ],
            "usage": self._usage(sum(reply.num_tokens for reply in replies)),
        }

    async def _stream(self, include_usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events. If the client leaves, this iterator is closed, and the job ends."""
        usage = {"usage": None} if include_usage else {}

        def event(choice: dict[str, Any]) -> str:
            return self._event({"choices": [choice], **usage})

        try:
            num_tokens = num_ended = 0
            begun: set[int] = set()
            while num_ended < len(self.choices):
                try:
                    number, piece, new = await self.events.get()
                except Exception as error:
                    yield f"data: {json.dumps(as_request_error(error).body)}\n\n"
                    return
                if number not in begun:
                    begun.add(number)
                    if opening := self.form.opening(number):
                        yield event(opening)
                if isinstance(piece, str):
                    yield event(self.form.piece(number, piece, new, None))
                else:
                    num_ended += 1
                    num_tokens += piece.num_tokens
                    yield event(self.form.piece(number, None, new, piece.finish_reason))
            if include_usage:
                yield self._event({"choices": [], "usage": self._usage(num_tokens)})
            yield "data: [DONE]\n\n"
        finally:
            self.events.cancel()

    def _event(self, fields: dict[str, Any]) -> str:
        return f"data: {json.dumps({**self.head, 'object': self.form.chunk, **fields})}\n\n"


class ChatForm:
    """The form of `/v1/chat/completions`: `choice` is a whole reply, `opening` and `piece` are parts of its stream.

    A piece without text (None) is the end of a reply.
    """

    id_prefix, whole, chunk = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, choices: Sequence[Sampling]):
        self.tokenizer = tokenizer
        self.choices = choices

    def choice(self, number: int, text: str, tokens: list[ReplyToken], finish_reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return _choice(number, {"message": message}, self._describe(number, tokens), finish_reason)

    def opening(self, number: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return _choice(number, {"delta": delta}, self._describe(number, []), None)

    def piece(self, number: int, text: str | None, tokens: list[ReplyToken], finish: str | None) -> dict[str, Any]:
        delta = {} if text is None else {"content": text}
        return _choice(number, {"delta": delta}, self._describe(number, tokens), finish)

    def _describe(self, number: int, tokens: list[ReplyToken]) -> dict[str, Any] | None:
        """OpenAI's form of the probabilities of some tokens; None if they are not requested."""
        if self.choices[number].num_top_logprobs is None:
            return None
        describe = TokenNames(self.tokenizer)
        content = [
            {
                **describe(token.token_id, token.logprob),
                "top_logprobs": [describe(token_id, logprob) for token_id, logprob in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


class TextForm:
    """The form of `/v1/completions`, see `ChatForm`; a reply begins with what `echoed` has for it."""

    id_prefix, whole, chunk = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, choices: Sequence[Sampling], *, echoed: Sequence[str]):
        self.tokenizer = tokenizer
        self.choices = choices
        self.echoed = echoed

    def choice(self, number: int, text: str, tokens: list[ReplyToken], finish_reason: str | None) -> dict[str, Any]:
        return self.piece(number, self.echoed[number] + text, tokens, finish_reason)

    def opening(self, number: int) -> dict[str, Any] | None:
        return self.piece(number, self.echoed[number], [], None) if self.echoed[number] else None

    def piece(self, number: int, text: str | None, tokens: list[ReplyToken], finish: str | None) -> dict[str, Any]:
        return _choice(number, {"text": text or ""}, self._describe(number, tokens), finish)

    def _describe(self, number: int, tokens: list[ReplyToken]) -> dict[str, Any] | None:
        """The older form of the probabilities of some tokens; None where they are not asked for."""
        if self.choices[number].num_top_logprobs is None:
            return None
        describe = TokenNames(self.tokenizer)
        named = [describe(token.token_id, token.logprob) for token in tokens]
        return {
            "tokens": [_plain_name(each) for each in named],
            "token_logprobs": [each["logprob"] for each in named],
            "top_logprobs": [
                {_plain_name(each): each["logprob"] for each in itertools.starmap(describe, token.top)}
                for token in tokens
            ],
            "text_offset": [token.start for token in tokens],
        }


def _choice(number: int, content: dict[str, Any], logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
    """A reply, or a piece of one, in the order that OpenAI's server has."""
    return {"index": number, **content, "logprobs": logprobs, "finish_reason": finish_reason}


def _plain_name(token: dict[str, Any]) -> str:
    """A token as the older form names it: its text, or the bytes of a part of a character."""
    if "\ufffd" not in token["token"] or token["bytes"] is None:
        return token["token"]
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token["bytes"])


class TokenNames:
    """Tokens in OpenAI's form. A token may be only a part of a character, which its bytes then describe exactly."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.is_byte_level = "ByteLevel" in str(getattr(backend, "decoder", ""))

    def __call__(self, token_id: int, logprob: float) -> dict[str, Any]:
        text = self.tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": self._bytes(token_id, text)}

    def _bytes(self, token_id: int, text: str) -> list[int] | None:
        if "\ufffd" not in text:
            return list(text.encode("utf-8"))
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if not self.is_byte_level or not all(character in BYTES for character in token):
            return None
        return [BYTES[character] for character in token]


def _byte_characters() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes (GPT-2's `bytes_to_unicode`), and their bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTES = _byte_characters()


def as_request_error(error: Exception) -> RequestError:
    """The error for a client whose reply failed, without any detail of this machine or of other clients."""
    if isinstance(error, QueueIsFull):
        return RequestError(
            "Too many requests wait already; try again later.",
            code="queue_full",
            status=429,
            type="rate_limit_error",
        )
    if isinstance(error, ServerIsClosing):
        return RequestError("The server is closing.", code="server_closing", status=503, type="server_error")
    return RequestError("The reply could not be written.", code="internal_error", status=500, type="server_error")


async def wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class OwnPagesOnly:
    """An application that answers requests to its own names, and none from pages of other web sites.

    A browser lets any page send requests to this machine. Requests of another site's page carry its Origin. A site
    whose name was made to point here (DNS rebinding) has no such Origin, but its name is the Host: so the Host must be
    an IP address, this machine's name, or the `host` that the server was started with.
    """

    def __init__(self, app: ASGIApp, host: str):
        self.app = app
        self.names = {"localhost", host.lower(), *own_names()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (problem := self._find_problem(scope)):
            await error_response(RequestError(problem, code="forbidden", status=403))(scope, receive, send)
        elif scope["type"] in ("http", "lifespan"):
            await self.app(scope, receive, send)

    def _find_problem(self, scope: Scope) -> str | None:
        headers: dict[bytes, list[bytes]] = {}
        for key, value in scope["headers"]:
            headers.setdefault(key.lower(), []).append(value)
        hosts = [value.decode("latin-1").strip().lower() for value in headers.get(b"host", [])]
        origins = [value.decode("latin-1").strip().lower() for value in headers.get(b"origin", [])]
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            return "This server does not answer to the Host of this request; start it with that name as `host`."
        if any(origin not in (f"http://{hosts[0]}", f"https://{hosts[0]}") for origin in origins):
            return "This server does not answer pages of other web sites (Origin)."
        return None

    def _is_own(self, host: str) -> bool:
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True


def own_names() -> set[str]:
    name = socket.gethostname().lower()
    return {name, f"{name}.local"}


class _Server(uvicorn.Server):
    """Ends the replies that are being written before it waits for connections to close."""

    writer: ReplyWriter

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.writer.close()
        super().handle_exit(sig, frame)


def run_application(app: ASGIApp, writer: ReplyWriter, *, host: str, port: int) -> None:
    """Serve until Ctrl-C or SIGTERM, which also end unfinished replies."""
    server = _Server(
        uvicorn.Config(
            app,
            host=host,
            port=port,
            access_log=False,
            log_level="warning",
            server_header=False,
            ws="none",
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=SECONDS_TO_CLOSE,
        )
    )
    server.writer = writer
    try:
        server.run()
    finally:
        writer.close()
        writer.join(SECONDS_TO_CLOSE)
