"""A chat in the browser, by Gradio: settings beside the chat, and a history that the browser keeps."""

import os
import random
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from ..data.conversations import Messages
from .replies import JobEvents, QueueIsFull, ReplyWriter, Sampling, ServerIsClosing, context_length, encode_newest
from .requests import RequestError


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: nothing leaves this machine

import gradio
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .application import LARGEST_BODY, OwnPagesOnly, error_response


REPLACEMENT = "\ufffd"

# Settings are beside the chat, or below it on narrow screens. The chat takes the height of the window.
STYLE = """
footer {display: none !important}
.gradio-container {width: 100% !important; max-width: 1200px !important; margin: 0 auto !important}
"""


def build_page(writer: ReplyWriter, defaults: Sampling, *, name: str, system: str | None = None) -> gradio.Blocks:
    """The page to chat with the writer's model; its settings start with `defaults` and `system`.

    Every reply is drawn with a seed of its own, the first by `defaults.seed`, so that a retry gives another reply.
    """
    seeds = random.Random(defaults.seed)
    context = context_length(writer.model)
    longest = max(1, context // 2)

    async def respond(
        message: str, history: list[dict[str, Any]], temperature: float, max_new_tokens: float, system: str
    ) -> AsyncIterator[str]:
        length = min(int(max_new_tokens), longest)
        messages = as_messages(message, history, system)
        try:
            if REPLACEMENT in message:
                raise ValueError("The message is not valid Unicode. Correct it, and send it again.")
            kept_messages, prompt_ids = encode_newest(messages, writer.tokenizer, max_prompt_length=context - length)
            sampling = replace(defaults, temperature=temperature, max_new_tokens=length, seed=seeds.getrandbits(32))
            events = JobEvents(writer, prompt_ids, [sampling])
        except ValueError as error:
            show_error(str(error))
            return
        except (QueueIsFull, ServerIsClosing):
            show_error("Too many people are waiting. Try again later.")
            return
        if len(kept_messages) < len(messages):
            gradio.Info(f"The context is full: the oldest {len(messages) - len(kept_messages)} messages were left out.")
        text = ""
        try:
            while isinstance(piece := (await events.get())[1], str):
                text += piece
                yield text
        except Exception:  # the writer has logged it
            show_error("The reply could not be written.")
        finally:  # also when the page's stop button, or its end, closes this iterator
            events.cancel()

    with gradio.Blocks(title=name, analytics_enabled=False, fill_height=True, fill_width=True) as page:
        # The key does not change, so that the browser's history outlives this process.
        kept = gradio.BrowserState([], storage_key=f"chat with {name}", secret="chat")
        with gradio.Row(equal_height=False):
            chat_column = gradio.Column(scale=4, min_width=320)
            settings_column = gradio.Column(scale=1, min_width=280)
        with settings_column:
            temperature = gradio.Slider(
                0,
                2,
                value=defaults.temperature,
                step=0.05,
                label="Temperature",
                info="0: no drawing, so a retry gives the same reply.",
                elem_id="temperature",
            )
            max_new_tokens = gradio.Slider(
                1,
                longest,
                value=min(defaults.max_new_tokens, longest),
                step=1,
                label="Longest reply",
                info="In tokens.",
                elem_id="length",
            )
            system_message = gradio.Textbox(
                value=system or "", lines=2, max_lines=8, label="System message", placeholder="None", elem_id="system"
            )
        message_box = gradio.Textbox(
            placeholder="Type a message",
            max_lines=8,
            submit_btn=True,
            stop_btn=True,
            autofocus=True,
            elem_id="message",
            render=False,
        )
        with chat_column:
            chat = gradio.ChatInterface(
                respond,
                # Without Gradio's button that posts the conversation to the Hub.
                chatbot=gradio.Chatbot(buttons=["copy", "copy_all"], show_label=False, height="70vh", render=False),
                textbox=message_box,
                additional_inputs=[temperature, max_new_tokens, system_message],
                title=name,
                concurrency_limit=None,  # the writer has a queue of its own
                analytics_enabled=False,
                api_visibility="private",
            )
        chat.chatbot.change(None, [chat.chatbot], [kept], js="(history) => [history]")  # in the browser alone
        page.load(lambda history: (history, history), [kept], [chat.chatbot, chat.chatbot_state], queue=False)
    return page


def show_error(message: str) -> None:
    """Show an error until it is closed. A gradio.Error would end the event, and the send button would be missing."""
    gradio.Warning(message, duration=None, title="Error")


def as_messages(message: str, history: list[dict[str, Any]], system: str) -> Messages:
    """The conversation of a page, without messages that were not answered."""
    turns = [{"role": turn["role"], "content": plain_text(turn["content"])} for turn in history]
    answered = [
        turn
        for turn, following in zip(turns, [*turns[1:], {"role": "user"}])
        if turn["role"] == "assistant" or following["role"] == "assistant"
    ]
    before: Messages = [{"role": "system", "content": system}] if system.strip() else []
    return [*before, *answered, {"role": "user", "content": message}]


def plain_text(content: Any) -> str:
    """A message's text: Gradio gives it as a string or as a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in content)


def build_page_application(
    writer: ReplyWriter, defaults: Sampling, *, name: str, system: str | None, host: str, port: int
) -> ASGIApp:
    """The page as an application that refuses requests of other web sites' pages."""
    page = build_page(writer, defaults, name=name, system=system)
    app = gradio.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page,
        path="/",
        server_name=host,
        server_port=port,
        show_error=True,
        css=STYLE,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
        run_history=False,
    )
    return OwnPagesOnly(WholeCharacters(app), host)


class WholeCharacters:
    """Replaces halves of surrogate pairs in JSON sent to an application by replacement characters.

    Gradio fails when it sends such a text back, and the page gets no answer.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"]) if scope["type"] == "http" else {}
        if not headers.get(b"content-type", b"").lower().startswith(b"application/json"):
            await self.app(scope, receive, send)
            return
        body, is_more = bytearray(), True
        while is_more:
            message = await receive()
            if message["type"] != "http.request":
                return  # the client has left
            body += message.get("body", b"")
            is_more = message.get("more_body", False)
            if len(body) > LARGEST_BODY:
                error = RequestError(f"The body is larger than {LARGEST_BODY:,} bytes.", status=413)
                await error_response(error)(scope, receive, send)
                return
        messages = [{"type": "http.request", "body": replace_lone_surrogates(bytes(body)), "more_body": False}]

        async def receive_again() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, receive_again, send)


# A whole pair, half of a pair, or any other escape of JSON, so that an escaped backslash is read as one escape.
ESCAPES = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\.", re.DOTALL
)


def replace_lone_surrogates(json_text: bytes) -> bytes:
    return ESCAPES.sub(lambda escape: rb"\ufffd" if escape[1] else escape[0], json_text)
