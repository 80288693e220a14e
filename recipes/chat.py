"""Chapter 7: talk to a model that was fine-tuned to follow instructions.

    python recipes/chat.py --model out/chat
    python recipes/chat.py --model out/demo --adapter out/assistant/adapter     # the LoRA adapter of a run, on its base
    printf "What does Python print for 7 + 15\\n" | python recipes/chat.py --model out/chat
    python recipes/chat.py --model out/chat --web       # in the browser: pip install -e '.[chat]'
    python recipes/chat.py --model out/chat --serve     # an OpenAI-compatible server: the same extra

In the terminal each line is a turn. /reset forgets the conversation, /system TEXT sets the system message and starts a
new conversation, /exit or Ctrl-D ends the chat; Ctrl-C ends a reply. When the context is full, the oldest turns are
dropped.
"""

import importlib.util
import io
import json
import logging
import random
import re
import socket
import sys
from dataclasses import replace
from pathlib import Path

from hfllm.adapters import load_adapter, merge_adapter, tokenizer_source
from hfllm.cli import options as groups
from hfllm.cli.arguments import run
from hfllm.cli.opening import open_causal_lm
from hfllm.cli.options import arguments, check_numbers, differs, option
from hfllm.data.conversations import Messages
from hfllm.data.templates import check_template
from hfllm.serving.replies import LOWEST_TEMPERATURE, Reply, ReplyWriter, Sampling, context_length, encode_newest
from hfllm.serving.text import LONE_SURROGATE
from hfllm.tokenization import load_tokenizer

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar


@arguments
class ChatArguments(
    groups.Model,
    groups.Adapter,
    groups.Dtype,
    groups.RemoteCode,
    groups.NewTokens,
    groups.Sampling,
    groups.Seed,
    groups.Config,
):
    model = differs("out/chat")
    system: str | None = option(
        None, section="generation", help="System message; it is kept when old turns are dropped."
    )
    max_new_tokens = differs(256, help="Longest reply in tokens; without --serve at most half of the context.")
    temperature = differs(0.0, help="Sampling temperature; 0 takes the likeliest token.")
    seed = differs(section="generation", help="Sampling seed.")
    web: bool = option(False, section="server", help="Chat in the browser, with Gradio.")
    serve: bool = option(
        False, section="server", help="Answer HTTP requests in OpenAI's format; the options above are their defaults."
    )
    host: str = option("127.0.0.1", section="server", help="Address of web and serve.")
    port: int = option(8000, section="server", help="Port of web and serve.", at_least=1, at_most=65535)

    def check(self) -> None:
        check_numbers(self)
        is_missing = self.model == ChatArguments.model and not Path(self.model).is_dir()
        problems = [
            (
                is_missing,  # and not looked for on the Hub, where anybody may have the name
                f"There is no folder {self.model}. `make demo` and recipes/finetune_instruction.py write one; or give "
                "another folder or a Hub id as --model.",
            ),
            (self.web and self.serve, "--web and --serve: give one of the two."),
            (
                0 < self.temperature < LOWEST_TEMPERATURE,
                f"--temperature {self.temperature}: give 0 or at least {LOWEST_TEMPERATURE}.",
            ),
            (
                self.temperature == 0 and self.top_p != 1 and not (self.web or self.serve),
                f"--top_p {self.top_p}: nothing is drawn at temperature 0. Set --temperature.",
            ),
        ]
        needed = ["gradio"] if self.web else ["fastapi", "uvicorn"] if self.serve else []
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        problems.append((missing, f"{', '.join(missing)} is not installed: pip install -e '.[chat]'."))
        if wrong := [problem for is_wrong, problem in problems if is_wrong]:
            raise ValueError(" ".join(wrong))


def main(args: ChatArguments) -> None:
    args.check()
    disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if args.web or args.serve:
        check_address(args)
    tokenizer = load_tokenizer(tokenizer_source(args.model, args.adapter))
    check_template(tokenizer)
    model = load_model(args)
    if args.web or args.serve:
        serve(args, model, tokenizer)
    else:
        chat_in_terminal(args, model, tokenizer)


def check_address(args: ChatArguments) -> None:
    """Check the address before the model is loaded; the server would find out only afterwards."""
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
    dtype = {"dtype": args.dtype} if args.dtype else {}
    model = open_causal_lm(args.model, trust_remote_code=args.trust_remote_code, **dtype)
    if args.adapter is not None:
        model = merge_adapter(load_adapter(model, args.adapter))
    return model.to(device).eval()


def default_sampling(args: ChatArguments) -> Sampling:
    return Sampling(args.max_new_tokens, temperature=args.temperature, top_p=args.top_p, seed=args.seed)


# The terminal: messages -> a prompt that fits -> a reply, token by token.


def chat_in_terminal(args: ChatArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    is_person = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # see `replace_undecodable`
    history: Messages = system_message(args.system)
    seeds = random.Random(args.seed)  # one for each turn, so that a question asked again is answered again
    if is_person:
        print("Each line is a turn. /reset, /system TEXT, /exit; Ctrl-C ends a reply, Ctrl-D the chat.")
    while True:
        try:
            line = replace_undecodable(input("> " if is_person else "")).strip()
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
            sampling = replace(default_sampling(args), seed=seeds.getrandbits(32))
            history = take_turn(model, tokenizer, [*history, {"role": "user", "content": line}], sampling)


def take_turn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, messages: Messages, sampling: Sampling
) -> Messages:
    """Print the reply, and return the conversation with it, without the turns that the context has no room for.

    The reply is kept as far as it came; without one, the question is dropped too.
    """
    context = context_length(model)
    max_new_tokens = min(sampling.max_new_tokens, context // 2)
    try:
        kept, prompt_ids = encode_newest(messages, tokenizer, max_prompt_length=context - max_new_tokens)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return messages[:-1]
    reply = Reply(
        model,
        tokenizer,
        prompt_ids,
        replace(sampling, max_new_tokens=max_new_tokens),
        on_text=lambda piece: print(piece, end="", flush=True),
    )
    try:
        reply.advance()
        print(flush=True)
    except KeyboardInterrupt:
        reply.end()
        print(flush=True)
        print("(stopped)", file=sys.stderr)
    if dropped := len(messages) - len(kept):
        print(f"(The context is full: the oldest {dropped} messages were left out.)", file=sys.stderr)
    text = reply.stream.text.strip()
    return [*kept, {"role": "assistant", "content": text}] if text else kept[:-1]


def replace_undecodable(line: str) -> str:
    """The line with a replacement character for every byte that was no text, which is said."""
    line, number = LONE_SURROGATE.subn("\ufffd", line)
    if number:
        print(f"({number} bytes that are not UTF-8 were replaced by \ufffd.)", file=sys.stderr)
    return line


def system_message(text: str | None) -> Messages:
    return [{"role": "system", "content": text}] if text else []


# The browser and HTTP


def serve(args: ChatArguments, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    from hfllm.serving.application import build_application, run_application

    name = re.sub(r"[^\w.-]", "-", Path(args.model).resolve().name)
    address = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{args.port}"
    writer = ReplyWriter(model, tokenizer)
    if args.web:
        from hfllm.serving.page import build_page_application

        application = build_page_application(
            writer, default_sampling(args), name=name, system=args.system, host=args.host, port=args.port
        )
        print(f"Chat with {args.model} at {address}; Ctrl-C ends.", flush=True)
    else:
        application = build_application(writer, default_sampling(args), name=name, system=args.system, host=args.host)
        request = {"model": name, "messages": [{"role": "user", "content": "What does Python print for 7 + 15"}]}
        print(
            f"Serving {args.model} as {name!r} at {address}/v1; Ctrl-C ends.\n"
            f"    curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(request)}'",
            flush=True,
        )
    try:
        run_application(application, writer, host=args.host, port=args.port)
    except KeyboardInterrupt:
        print("\nEnded.")


if __name__ == "__main__":
    run(main, ChatArguments, description=__doc__)
