"""An OpenAI-compatible HTTP server for one model that is already loaded.

transformers' own server looks up a model's class in its module, so it cannot open ours. It would also load any model
that a request names, and serve audio routes beside the chat. So this is our own application, on FastAPI.
"""

import asyncio
import ipaddress
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
from starlette.types import ASGIApp, Receive, Scope, Send
from transformers import PreTrainedTokenizerBase

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
)
from .requests import ChatRequest, RequestError, read_chat_request


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

        try:
            prompt_ids = await run_in_threadpool(encode)
        except ValueError as error:
            raise RequestError(str(error), param="messages") from error
        choices = fit_choices(asked.choices, len(prompt_ids), context_length(writer.model))
        exchange = Exchange(writer, name, prompt_ids, choices)
        if asked.stream:
            return StreamingResponse(
                exchange.stream(asked), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
            )
        return await exchange.answer(request)

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


def fit_choices(choices: Sequence[Sampling], prompt_length: int, context: int) -> list[Sampling]:
    """The choices, with at most as many new tokens as fit into the context after the prompt."""
    if prompt_length >= context:
        raise RequestError(
            f"This model's context is {context:,} tokens, prompt and reply together, and the messages have "
            f"{prompt_length:,} tokens. Shorten the messages.",
            param="messages",
            code="context_length_exceeded",
        )
    return [replace(each, max_new_tokens=min(each.max_new_tokens, context - prompt_length)) for each in choices]


async def read_json(request: Request) -> Any:
    """The body of a request, as JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a form of another web page can send other kinds only
        raise RequestError("Send JSON, with the header Content-Type: application/json.", status=415)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise RequestError(f"The body is larger than {LARGEST_BODY:,} bytes; shorten the messages.", status=413)
    try:
        return json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"The body is not UTF-8: byte {error.start + 1:,} is wrong.") from error
    except json.JSONDecodeError as error:
        raise RequestError(
            f"The body is not valid JSON: {error.msg}, line {error.lineno}, column {error.colno}."
        ) from error
    except (RecursionError, ValueError) as error:
        raise RequestError("The body is nested too deeply, or has a number with too many digits.") from error


class Exchange:
    """A request's replies, in OpenAI's form."""

    def __init__(self, writer: ReplyWriter, name: str, prompt_ids: list[int], choices: list[Sampling]):
        self.writer = writer
        self.prompt_ids = prompt_ids
        self.choices = choices
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        try:
            self.events = JobEvents(writer, prompt_ids, choices)
        except (QueueIsFull, ServerIsClosing) as error:
            raise as_request_error(error) from error

    def usage(self, num_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": len(self.prompt_ids),
            "completion_tokens": num_tokens,
            "total_tokens": len(self.prompt_ids) + num_tokens,
        }

    async def answer(self, request: Request) -> Response:
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
            "object": "chat.completion",
            "choices": [
                {
                    "index": number,
                    "message": {"role": "assistant", "content": text, "refusal": None},
                    "logprobs": self._describe(number, tokens[number]),
                    "finish_reason": replies[number].finish_reason,
                }
                for number, text in enumerate(texts)
            ],
            "usage": self.usage(sum(reply.num_tokens for reply in replies)),
        }

    async def stream(self, asked: ChatRequest) -> AsyncIterator[str]:
        """The answer as server-sent events. If the client leaves, this iterator is closed, and the job ends."""
        usage = {"usage": None} if asked.include_usage else {}

        def event(number: int, delta: dict[str, str], new: list[ReplyToken], finish_reason: str | None = None) -> str:
            choice = {
                "index": number,
                "delta": delta,
                "logprobs": self._describe(number, new),
                "finish_reason": finish_reason,
            }
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
                    yield event(number, {"role": "assistant", "content": ""}, [])
                if isinstance(piece, str):
                    yield event(number, {"content": piece}, new)
                else:
                    num_ended += 1
                    num_tokens += piece.num_tokens
                    yield event(number, {}, new, piece.finish_reason)
            if asked.include_usage:
                yield self._event({"choices": [], "usage": self.usage(num_tokens)})
            yield "data: [DONE]\n\n"
        finally:
            self.events.cancel()

    def _event(self, fields: dict[str, Any]) -> str:
        return f"data: {json.dumps({**self.head, 'object': 'chat.completion.chunk', **fields})}\n\n"

    def _describe(self, number: int, tokens: list[ReplyToken]) -> dict[str, Any] | None:
        """OpenAI's form of the probabilities of some tokens; None if they are not requested."""
        if self.choices[number].num_top_logprobs is None:
            return None
        describe = TokenNames(self.writer.tokenizer)
        content = [
            {
                **describe(token.token_id, token.logprob),
                "top_logprobs": [describe(token_id, logprob) for token_id, logprob in token.top],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}


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
