"""Chapter 7: talk to a model that was taught to.

    python recipes/chat.py --model out/chat
    python recipes/chat.py --model out/demo --adapter out/chat/adapter
    printf "What does Python print for 7 + 15\\n" | python recipes/chat.py --model out/chat
    python recipes/chat.py --model out/chat --web       # in the browser: pip install -e '.[chat]'
    python recipes/chat.py --model out/chat --serve     # for programs that speak OpenAI's protocol: the same extra

In the terminal each line is a turn. /reset forgets the conversation, /system TEXT sets the system message and begins
anew, /exit or Ctrl-D ends; Ctrl-C ends a reply. When the context is full, the oldest turns are dropped.
"""

import contextlib
import importlib.util
import json
import logging
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hfllm.adapters import load_adapter, merge_adapter, tokenizer_source
from hfllm.cli import options as groups
from hfllm.cli.arguments import run
from hfllm.cli.opening import open_causal_lm
from hfllm.cli.options import arguments, check_numbers, differs, option
from hfllm.data.conversations import Messages
from hfllm.data.instruction import fit_messages
from hfllm.data.templates import check_template
from hfllm.tokenization import TURN_END_TOKEN, load_tokenizer

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar


@arguments
class ChatArguments(
    groups.Model, groups.Adapter, groups.Dtype, groups.NewTokens, groups.Sampling, groups.Seed, groups.Config
):
    model = differs("out/chat")
    system: str | None = option(
        None, section="generation", help="System message; it is kept when old turns are dropped."
    )
    max_new_tokens = differs(256, help="Longest reply in tokens; at most half of the context.")
    temperature = differs(0.0, help="Sampling temperature; 0 takes the likeliest token.")
    seed = differs(section="generation", help="Sampling seed.")
    web: bool = option(False, section="server", help="Chat in the browser, with Gradio.")
    serve: bool = option(False, section="server", help="Answer HTTP requests in OpenAI's format.")
    host: str = option("127.0.0.1", section="server", help="Address of web and serve.")
    port: int = option(8000, section="server", help="Port of web and serve.", at_least=1, at_most=65535)

    def check(self) -> None:
        check_numbers(self)
        problems = [
            (self.web and self.serve, "--web and --serve: give one of the two."),
            (
                self.temperature == 0 and self.top_p != 1,
                f"--top_p {self.top_p}: nothing is drawn at temperature 0. Set --temperature.",
            ),
        ]
        needed = ["gradio"] if self.web else ["openai", "fastapi", "uvicorn"] if self.serve else []
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        problems.append((missing, f"{', '.join(missing)} is not installed: pip install -e '.[chat]'."))
        if wrong := [problem for is_wrong, problem in problems if is_wrong]:
            raise ValueError(" ".join(wrong))


def main(args: ChatArguments) -> None:
    args.check()
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    set_seed(args.seed)
    if args.web or args.serve:
        check_address(args)
    tokenizer = load_tokenizer(tokenizer_source(args.model, args.adapter))
    check_template(tokenizer)
    model = load_model(args)
    if args.serve:
        serve(args, model, tokenizer)
    elif args.web:
        build_web_chat(args, model, tokenizer).launch(
            server_name=args.host, server_port=args.port, share=False, inbrowser=False
        )
    else:
        chat_in_terminal(args, model, tokenizer)


def check_address(args: ChatArguments) -> None:
    """Before the model is loaded: the servers would find it out only afterwards, and say it by a traceback."""
    try:
        family = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)[0][0]
        with socket.create_server((args.host, args.port), family=family):
            pass
    except OSError as error:
        raise ValueError(
            f"Nobody can be served at {args.host}:{args.port}: {error.strerror}. Give another --port or --host."
        ) from error


def load_model(args: ChatArguments) -> PreTrainedModel:
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model = open_causal_lm(args.model, **({"dtype": args.dtype} if args.dtype else {}))
    if args.adapter is not None:
        model = merge_adapter(load_adapter(model, args.adapter))
    return model.to(device).eval()


# The chat itself: messages -> a prompt that fits -> a reply, token by token.


def generate(
    args: ChatArguments,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    streamer: TextStreamer,
    stop: StoppingCriteria | None = None,
) -> int:
    """Write the reply to the messages into the streamer; returns how many old messages were dropped to make room."""
    context = getattr(model.config, "max_position_embeddings", None) or 2**30
    max_new_tokens = min(args.max_new_tokens, context // 2)
    _, input_ids, dropped = fit_messages(messages, tokenizer, max_prompt_length=context - max_new_tokens)
    choice: dict[str, Any] = {"do_sample": False}
    if args.temperature > 0:
        choice = {"do_sample": True, "temperature": args.temperature, "top_p": args.top_p, "top_k": 0}
    prompt = torch.tensor([input_ids], device=model.device)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        eos_token_id=stop_token_ids(model, tokenizer),
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([stop] if stop else []),
        **choice,
    )
    return dropped


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a reply: the model's own, and the turn's end where the tokenizer is one of ours."""
    own = model.generation_config.eos_token_id
    ids = set(own if isinstance(own, list) else [own] if own is not None else [tokenizer.eos_token_id])
    turn_end = tokenizer.convert_tokens_to_ids(TURN_END_TOKEN)
    if turn_end is not None and turn_end != tokenizer.unk_token_id:
        ids.add(turn_end)
    return sorted(ids)


class KeepingStreamer(TextStreamer):
    """Prints a reply as it comes, and keeps what was printed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        print(text, end="\n" if stream_end else "", flush=True)


def chat_in_terminal(args: ChatArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    is_person = sys.stdin.isatty()
    history: Messages = system_message(args.system)
    if is_person:
        print("Each line is a turn. /reset, /system TEXT, /exit; Ctrl-C ends a reply, Ctrl-D the chat.")
    while True:
        try:
            line = input("> " if is_person else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit ends the chat)")
            continue
        command, _, rest = line.partition(" ")
        if command == "/exit":
            break
        if command == "/reset":
            history = history[:1] if history and history[0]["role"] == "system" else []
        elif command == "/system":
            history = system_message(rest.strip())
        elif command.startswith("/") and command[1:].isalpha() and is_person:
            print("The commands are /reset, /system TEXT and /exit.")
        elif line:
            history = take_turn(args, model, tokenizer, [*history, {"role": "user", "content": line}])


def take_turn(
    args: ChatArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: Messages
) -> Messages:
    """Print the reply, and return the conversation with it, as far as it came; without the turn if it has none."""
    streamer = KeepingStreamer(tokenizer)
    try:
        dropped = generate(args, model, tokenizer, messages, streamer)
        if dropped:
            print(f"(The context is full: the oldest {dropped} messages were left out.)", file=sys.stderr)
    except KeyboardInterrupt:
        streamer.end()  # it holds back the last word
        print("(stopped)", file=sys.stderr)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return messages[:-1]
    reply = streamer.text.strip()
    return [*messages, {"role": "assistant", "content": reply}] if reply else messages[:-1]


def system_message(text: str | None) -> Messages:
    return [{"role": "system", "content": text}] if text else []


class Stop(StoppingCriteria):
    """Ends a reply from outside."""

    def __init__(self) -> None:
        self.asked_for = threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.asked_for.is_set(), device=input_ids.device)


def build_web_chat(args: ChatArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The Gradio page. It keeps the history and hands it over with each message."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the import: nothing leaves this machine
    import gradio

    def respond(message: str, history: list[dict[str, Any]]) -> Iterator[str]:
        messages = system_message(args.system)
        messages += [{"role": turn["role"], "content": plain_text(turn["content"])} for turn in history]
        messages.append({"role": "user", "content": message})
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop, failed = Stop(), []

        def write() -> None:
            try:
                generate(args, model, tokenizer, messages, streamer, stop)
            except ValueError as error:  # the message does not fit
                failed.append(error)
                streamer.end()

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        text = ""
        try:
            for piece in streamer:
                text += piece
                yield text
        finally:  # also when the page's stop button closes this generator
            stop.asked_for.set()
            writer.join()
        if failed:
            raise gradio.Error(str(failed[0]))

    # Without Gradio's button that posts the conversation to the Hub.
    chatbot = gradio.Chatbot(buttons=["copy", "copy_all"], label=Path(args.model).name)
    return gradio.ChatInterface(respond, chatbot=chatbot, title=Path(args.model).name, analytics_enabled=False)


def plain_text(content: Any) -> str:
    """A message's text: Gradio hands it over as a string or as a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in content)


def serve(args: ChatArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """transformers' own server, which looks a model's class up among its own: ours is put there first."""
    import transformers
    from transformers.cli.serve import Serve
    from transformers.cli.serving.model_manager import ModelManager

    setattr(sys.modules["transformers"], type(model).__name__, type(model))
    # Merged, if there is an adapter; and with what ends a turn, whatever the folder says.
    model.generation_config.eos_token_id = stop_token_ids(model, tokenizer)
    name = re.sub(r"[^\w.-]", "-", Path(args.model).resolve().name)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
        # The list of models would be that of the Hub's cache, without this one.
        listed = [{"id": name, "object": "model", "owned_by": "", "created": int(time.time())}]
        ModelManager.get_gen_models = lambda *_, **__: listed
        address = f"http://{args.host}:{args.port}/v1"
        request = {"model": name, "messages": [{"role": "user", "content": "What does Python print for 7 + 15"}]}
        print(
            f"Serving {args.model} as {name!r} at {address} by transformers {transformers.__version__}; Ctrl-C ends.\n"
            f"    curl {address}/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(request)}'",
            flush=True,
        )
        Serve(force_model=name, host=args.host, port=args.port)  # by a relative path: that is the name in requests


if __name__ == "__main__":
    run(main, ChatArguments, description=__doc__)
