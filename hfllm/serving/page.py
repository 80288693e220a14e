"""A chat in the browser, by Gradio: settings beside the chat, and a history that the browser keeps."""

import os
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from ..data.conversations import Messages
from .replies import JobEvents, QueueIsFull, ReplyWriter, Sampling, ServerIsClosing, context_length, encode_newest
from .text import LONE_SURROGATE


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: nothing leaves this machine

import gradio
from fastapi import FastAPI
from starlette.types import ASGIApp

from .application import OwnPagesOnly


REPLACEMENT = "\ufffd"

# Settings stand beside the chat, and below it where there is no room. The chat takes the height of the window.
STYLE = """
footer {display: none !important}
.gradio-container {max-width: 1200px !important; margin: 0 auto !important}
"""


def replace_surrogates(text: str | None) -> str | None:
    """A message that Gradio can send back: half of a surrogate pair becomes a replacement character."""
    return None if text is None else LONE_SURROGATE.sub(REPLACEMENT, text)


def build_page(writer: ReplyWriter, defaults: Sampling, *, name: str, system: str | None = None) -> gradio.Blocks:
    """The page that talks to the writer's model; its settings begin with `defaults` and `system`.

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
        # Written with a key that does not change, or the browser's history would not outlive this process.
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
        # Not in a class of our own, for which Gradio would write a file beside this one.
        message_box.preprocess = replace_surrogates  # type: ignore[method-assign, assignment]
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
    """Show an error until it is closed. A gradio.Error would end the event and leave the page without a send button."""
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
    """The page as an application that answers no page of another web site."""
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
    return OwnPagesOnly(app, host)
