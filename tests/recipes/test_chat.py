"""recipes/chat.py: the terminal in this process and in a real one, the browser in real Chromium, HTTP over loopback."""

import contextlib
import importlib.util
import io
import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

import hfllm
from hfllm.adapters import add_lora, save_adapter
from hfllm.cli.arguments import parse_arguments
from hfllm.data import instruction
from hfllm.data.conversations import Conversation, pair
from hfllm.data.instruction import ConversationRows, encode_conversations, encode_prompt
from hfllm.model.generation_gpt import CACHE_NAME
from hfllm.serving.replies import ReplyWriter
from tests.conftest import make_tiny_config
from tests.recipes.conftest import RECIPES, load_recipe


recipe = load_recipe("chat")

REPLIES = {"Say one": "One.", "A colour?": "Blue and green", "Bye": "Good night!"}
SECONDS = 120  # for what should take a few; only a process that hangs takes so long


def learn_replies(model: torch.nn.Module, tokenizer, *, learning_rate: float, loss_below: float = 0.05) -> None:
    conversations = [Conversation(pair(*each), "here") for each in REPLIES.items()]
    rows = ConversationRows(
        encode_conversations(conversations, tokenizer, max_length=128), block_size=128, pad_token_id=2
    )
    batch = rows.collate([rows[index] for index in range(len(rows))])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    for _ in range(60):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < loss_below


def save_untrained(folder: Path, *, context: int = 128, never_stops: bool = False) -> Path:
    tokenizer = hfllm.train_bpe(topics.values(), 400)
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = make_tiny_config("modern", vocab_size=400, max_position_embeddings=context, **ids)
    model = hfllm.GPTForCausalLM(config)
    if never_stops:
        model.generation_config.suppress_tokens = [
            tokenizer.eos_token_id,
            tokenizer.convert_tokens_to_ids("<|im_end|>"),
        ]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
    return save_untrained(tmp_path_factory.mktemp("untrained"))


@pytest.fixture(scope="module")
def talker(untrained, tmp_path_factory) -> Path:
    """A model that knows three answers by heart."""
    folder = tmp_path_factory.mktemp("talker")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(untrained), recipe.load_tokenizer(untrained)
    learn_replies(model, tokenizer, learning_rate=1e-2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(untrained, tmp_path_factory) -> Path:
    """What LoRA has to add to the untrained model, so that it knows the three answers."""
    folder = tmp_path_factory.mktemp("adapter")
    model = add_lora(AutoModelForCausalLM.from_pretrained(untrained), r=32, alpha=32)
    learn_replies(model, recipe.load_tokenizer(untrained), learning_rate=2e-2, loss_below=0.2)
    save_adapter(model, folder)
    return folder


@pytest.fixture(params=["model", "adapter"])
def way(request) -> list[str]:
    """The options by which one talks to a model that knows the answers, or to an adapter that does."""
    if request.param == "model":
        return ["--model", str(request.getfixturevalue("talker"))]
    folders = [str(request.getfixturevalue(name)) for name in ("untrained", "adapter")]
    return ["--model", folders[0], "--adapter", folders[1]]


def chat(monkeypatch, capsys, typed: str | bytes, **options) -> tuple[str, str]:
    """What is printed, and what goes to stderr, when these lines are piped in."""
    data = typed if isinstance(typed, bytes) else typed.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    recipe.main(parse_arguments(recipe.ChatArguments, [f"--{name}={value}" for name, value in options.items()]))
    return tuple(capsys.readouterr())


def test_each_line_of_a_pipe_is_a_turn(talker, monkeypatch, capsys):
    typed = "Say one\n/reset\nBye\n\n/reset\nA colour?\n"
    printed, _ = chat(monkeypatch, capsys, typed, model=talker)
    assert printed == "One.\nGood night!\nBlue and green\n"


def test_an_adapter_answers_on_its_base(untrained, adapter, monkeypatch, capsys):
    assert chat(monkeypatch, capsys, "Say one\n", model=untrained)[0] != "One.\n"
    assert chat(monkeypatch, capsys, "Say one\n/reset\nBye\n", model=untrained, adapter=adapter)[0] == (
        "One.\nGood night!\n"
    )


def test_exit_ends_the_chat(talker, monkeypatch, capsys):
    assert chat(monkeypatch, capsys, "Bye\n/exit\nSay one\n", model=talker)[0] == "Good night!\n"


def say(tokenizer, text: str, input_ids: torch.Tensor, stopping_criteria) -> SimpleNamespace:
    """What `generate` does with a model that says this, up to its last token."""
    for token_id in tokenizer(text, add_special_tokens=False).input_ids:
        input_ids = torch.cat([input_ids, torch.tensor([[token_id]])], dim=1)
        if all(criterion(input_ids, None) for criterion in stopping_criteria):
            break
    return SimpleNamespace(sequences=input_ids, **{CACHE_NAME: None})


@pytest.fixture
def prompts(talker, monkeypatch) -> list[list[int]]:
    """The prompts that the model gets, instead of a real reply; each is answered with one word."""
    seen = []
    tokenizer = recipe.load_tokenizer(talker)

    def generate(self, input_ids, stopping_criteria, **kwargs):
        seen.append(input_ids[0].tolist())
        return say(tokenizer, "yes <|im_end|>", input_ids, stopping_criteria)

    monkeypatch.setattr(hfllm.GPTForCausalLM, "generate", generate)
    return seen


def test_the_history_is_kept_and_the_prompt_is_the_templates(talker, prompts, monkeypatch, capsys):
    chat(monkeypatch, capsys, "One\nTwo\n/system Be kind\nThree\n/reset\nFour\n", model=talker, system="Be brief")
    tokenizer = recipe.load_tokenizer(talker)
    brief, kind = ({"role": "system", "content": text} for text in ("Be brief", "Be kind"))
    one, two, three, four = ({"role": "user", "content": text} for text in ("One", "Two", "Three", "Four"))
    yes = {"role": "assistant", "content": "yes"}
    conversations = [[brief, one], [brief, one, yes, two], [kind, three], [kind, four]]
    for prompt, messages in zip(prompts, conversations, strict=True):
        assert prompt == encode_prompt(messages, tokenizer)
        assert prompt == tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def test_past_the_context_the_oldest_turns_are_dropped_and_the_system_message_stays(
    talker, prompts, monkeypatch, capsys
):
    questions = [f"This is question number {number}" for number in range(8)]
    _, errors = chat(monkeypatch, capsys, "\n".join(questions), model=talker, system="Be kind", max_new_tokens=20)
    tokenizer = recipe.load_tokenizer(talker)
    assert all(len(prompt) <= 128 - 20 for prompt in prompts)
    last = tokenizer.decode(prompts[-1])
    assert "Be kind" in last and questions[7] in last and questions[0] not in last
    assert "oldest" in errors


def test_ten_times_as_many_lines_take_ten_times_the_work(talker, prompts, monkeypatch, capsys):
    """Turns that the context has no room for are not encoded again with each line."""
    encode, lengths = instruction.encode_prompt, []

    def count(messages, tokenizer):
        lengths.append(len(messages))
        return encode(messages, tokenizer)

    monkeypatch.setattr(instruction, "encode_prompt", count)
    work = {}
    for number in (20, 200):
        lengths.clear()
        chat(monkeypatch, capsys, "".join(f"Line {line}\n" for line in range(number)), model=talker)
        work[number] = sum(lengths)
    assert work[200] < 11 * work[20]


def test_bytes_that_are_not_utf8_are_replaced_and_reported_and_the_chat_continues(talker, prompts, monkeypatch, capsys):
    printed, errors = chat(monkeypatch, capsys, b"caf\xe9 \xff\nBye\n", model=talker)
    assert printed == "yes \nyes \n"
    assert "(2 bytes that are not UTF-8 were replaced by \ufffd.)" in errors
    tokenizer = recipe.load_tokenizer(talker)
    assert prompts[0] == encode_prompt([{"role": "user", "content": "caf\ufffd \ufffd"}], tokenizer)
    assert len(prompts) == 2


def test_a_message_longer_than_the_context_is_refused_and_the_chat_continues(talker, monkeypatch, capsys):
    printed, errors = chat(monkeypatch, capsys, f"{'word ' * 200}\nBye\n", model=talker)
    assert printed == "Good night!\n"
    assert "room for 64. Shorten it" in errors


def test_ctrl_c_ends_the_reply_and_not_the_chat(talker, monkeypatch, capsys):
    real = hfllm.GPTForCausalLM.generate
    tokenizer = recipe.load_tokenizer(talker)

    def interrupted_once(self, input_ids, stopping_criteria, **kwargs):
        monkeypatch.setattr(hfllm.GPTForCausalLM, "generate", real)
        say(tokenizer, "Half a ", input_ids, stopping_criteria)
        raise KeyboardInterrupt

    monkeypatch.setattr(hfllm.GPTForCausalLM, "generate", interrupted_once)
    printed, errors = chat(monkeypatch, capsys, "Say one\n/reset\nBye\n", model=talker)
    assert printed == "Half a \nGood night!\n"
    assert "(stopped)" in errors


def without_template(model: Path, folder: Path) -> Path:
    """A copy of the model whose tokenizer does not say how a conversation is written, as a base model's."""
    shutil.copytree(model, folder / "base", ignore=lambda *_: ["chat_template.jinja"])
    tokenizer = recipe.load_tokenizer(model)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def test_impossible_options_are_refused_at_the_start(talker, tmp_path):
    for option, message in {
        "--max_new_tokens=0": "at least 1",
        "--top_p=0.5": "temperature 0",
        "--adapter=x": "adapter",
        "--temperature=0.00001": "give 0 or at least 0.0001",
    }.items():
        with pytest.raises(ValueError, match=message):
            recipe.main(parse_arguments(recipe.ChatArguments, [f"--model={talker}", option]))
    with pytest.raises(ValueError, match="has no chat template"):
        recipe.main(parse_arguments(recipe.ChatArguments, [f"--model={without_template(talker, tmp_path)}"]))


def test_the_default_model_is_a_folder_and_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "load_tokenizer", lambda name: pytest.fail(f"looked for {name}"))
    with pytest.raises(ValueError, match=r"There is no folder out/chat\. `make demo` and"):
        recipe.main(recipe.ChatArguments())


def test_code_that_comes_with_a_model_does_not_run_and_nobody_is_asked(talker, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "foreign"
    shutil.copytree(talker, folder)
    config = {"model_type": "foreign", "auto_map": {"AutoConfig": "foreign.C", "AutoModelForCausalLM": "foreign.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    with pytest.raises(ValueError, match="trust_remote_code"):
        chat(monkeypatch, capsys, "yes\n", model=folder)
    assert not (tmp_path / "ran").exists()

    asked = []
    monkeypatch.setattr(recipe, "open_causal_lm", lambda name, **options: asked.append((name, options)))
    with pytest.raises(AttributeError):  # there is no model
        chat(monkeypatch, capsys, "", model=folder, trust_remote_code=True)
    assert asked == [(str(folder), {"trust_remote_code": True})]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(RECIPES.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@contextlib.contextmanager
def started(*arguments: object, **options) -> Iterator[subprocess.Popen]:
    words = [sys.executable, str(RECIPES / "chat.py"), *map(str, arguments)]
    process = subprocess.Popen(words, env=ENVIRONMENT, text=True, **options)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_in_a_real_terminal_ctrl_c_stops_a_long_reply_and_ctrl_d_ends(tmp_path):
    """An untrained model babbles for thousands of tokens, unless it is stopped."""
    save_untrained(tmp_path, context=65536, never_stops=True)
    ours, theirs = pty.openpty()
    seen = ""

    def read_until(is_there: Callable[[str], bool]) -> None:
        nonlocal seen
        deadline = time.monotonic() + SECONDS
        while not is_there(seen):
            assert time.monotonic() < deadline, seen
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 4096).decode(errors="replace")

    arguments = ("--model", tmp_path, "--max_new_tokens", 30000, "--temperature", 1)
    with started(*arguments, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True) as process:
        read_until(lambda text: "> " in text.partition("Ctrl-D the chat.")[2])  # libraries may have printed one before
        os.write(ours, b"Hello\n")
        read_until(lambda text: len(text.partition("Hello\r\n")[2]) > 20)  # the reply has begun
        process.send_signal(signal.SIGINT)
        read_until(lambda text: "> " in text.partition("(stopped)")[2])
        os.write(ours, b"\x04")
        assert process.wait(SECONDS) == 0


def post(port: int, body: dict) -> urllib.request.Request:
    address = f"http://127.0.0.1:{port}/v1/chat/completions"
    return urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})


def wait_for(address: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        assert process.poll() is None and time.monotonic() < deadline, f"nothing answers at {address}"
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)


@pytest.mark.slow
def test_programs_talk_to_it_over_http(way, port):
    openai = pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    name = Path(way[1]).name
    with started(*way, "--serve", "--port", port, stdout=subprocess.PIPE) as process:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=SECONDS)
        assert [model.id for model in client.models.list()] == [name]
        messages = [{"role": "user", "content": "A colour?"}]
        (choice,) = client.chat.completions.create(model=name, messages=messages).choices
        assert (choice.message.content, choice.finish_reason) == ("Blue and green", "stop")
        chunks = list(client.chat.completions.create(model=name, messages=messages, stream=True))
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
        assert "".join(pieces) == "Blue and green"
        assert sum(piece != "" for piece in pieces) > 1
        with pytest.raises(openai.BadRequestError, match="max_tokens is 0"):
            client.chat.completions.create(model=name, messages=messages, max_tokens=0)


@pytest.mark.slow
def test_a_base_model_is_served_to_continue_texts(babbler, port, tmp_path):
    openai = pytest.importorskip("openai")
    pytest.importorskip("fastapi")
    base = without_template(babbler, tmp_path)
    with started("--model", base, "--serve", "--port", port, "--max_new_tokens", 6, stdout=subprocess.PIPE) as process:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=SECONDS)
        answer = client.completions.create(model="base", prompt=["import ", "def "])
        assert answer.usage.completion_tokens == 12 and len({choice.text for choice in answer.choices}) == 2
        pieces = [
            chunk.choices[0].text for chunk in client.completions.create(model="base", prompt="def ", stream=True)
        ]
        assert "".join(pieces) == answer.choices[1].text
        with pytest.raises(openai.NotFoundError, match="no chat template"):
            client.chat.completions.create(model="base", messages=[{"role": "user", "content": "Hello"}])


@pytest.fixture(scope="module")
def babbler(tmp_path_factory) -> Path:
    """A model that never ends a reply by itself."""
    return save_untrained(tmp_path_factory.mktemp("babbler"), context=65536, never_stops=True)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 0)])
def test_a_signal_ends_the_server_while_replies_are_written(babbler, port, number, code):
    pytest.importorskip("fastapi")
    with started("--model", babbler, "--serve", "--port", port, stdout=subprocess.PIPE) as process:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 10**9, "stream": True}
        with urllib.request.urlopen(post(port, body), timeout=SECONDS) as response:
            assert response.readline().startswith(b"data: {")
            process.send_signal(number)
            rest = response.read()
        assert b"The server is closing." in rest
        assert process.wait(SECONDS) == code


@pytest.mark.slow
def test_fifty_clients_are_answered_side_by_side_and_none_waits_for_one_that_left(babbler, port):
    pytest.importorskip("fastapi")
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 30}
    with started("--model", babbler, "--serve", "--port", port, stdout=subprocess.PIPE) as process:
        wait_for(f"http://127.0.0.1:{port}/health", process)

        def ask(number: int) -> str:
            with urllib.request.urlopen(post(port, {**body, "seed": number}), timeout=SECONDS) as response:
                return json.load(response)["choices"][0]["message"]["content"]

        def leave(number: int) -> None:
            endless = {**body, "max_tokens": 10**9, "stream": number % 2 == 0}
            with socket.create_connection(("127.0.0.1", port)) as connection:
                data = json.dumps(endless).encode()
                head = f"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(data)}"
                connection.sendall(f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + data)
                time.sleep(1)

        alone = ask(0)
        before = psutil.Process(process.pid).memory_info().rss
        with ThreadPoolExecutor(70) as pool:
            leaving = [pool.submit(leave, number) for number in range(20)]
            replies = list(pool.map(ask, range(50)))
            assert all(gone.result() is None for gone in leaving)
        assert replies == [alone] * 50
        assert psutil.Process(process.pid).memory_info().rss - before < 200 * 2**20
        assert ask(0) == alone


needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="needs gradio: pip install -e '.[chat]'"
)


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium, which notes every request."""
    selenium = pytest.importorskip("selenium.webdriver")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = programs[0]
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1200,900"):
        options.add_argument(f"--{word}")
    options.add_argument(f"--user-data-dir={tmp_path / 'chromium'}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(programs[1]))
    yield driver
    driver.quit()


class Page:
    """The chat page in a browser. Its elements are found by scripts, as it replaces them while a reply grows."""

    def __init__(self, browser, port: int):
        from selenium.webdriver.support.ui import WebDriverWait

        self.browser = browser
        self.wait = WebDriverWait(browser, SECONDS)
        browser.get(f"http://127.0.0.1:{port}/")

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map(e => e.innerText.trim())"
        return self.browser.execute_script(script, selector)

    def replies(self) -> list[str]:
        return self.texts(".bot.message")

    def click(self, selector: str) -> None:
        script = "const e = document.querySelector(arguments[0]); if (e) e.click(); return Boolean(e)"
        self.wait.until(lambda browser: browser.execute_script(script, selector))

    def fill(self, selector: str, text: str) -> None:
        """Put a text into a field, as the page hears it when it is typed."""
        script = """
            const field = document.querySelector(arguments[0]);
            if (!field || field.disabled) return false;
            field.value = arguments[1].replace("{half}", "\\ud800");
            field.dispatchEvent(new Event("input", {bubbles: true}));
            field.dispatchEvent(new Event("change", {bubbles: true}));
            return true"""
        self.wait.until(lambda browser: browser.execute_script(script, selector, text))

    def send(self, text: str) -> None:
        self.fill("#message textarea", text)
        self.click("#message .submit-button")

    def ask(self, text: str) -> str:
        """Send a message, and wait for the whole reply."""
        number = len(self.replies())
        self.send(text)
        self.wait_for_reply(number + 1)
        self.wait_for_the_end()
        return self.replies()[-1]

    def wait_for_reply(self, number: int, is_there: Callable[[str], object] = bool) -> None:
        """Wait until there are this many replies, and the last one is as it should be."""
        self.wait.until(lambda _: len(replies := self.replies()) == number and is_there(replies[-1]))

    def wait_for_error(self, text: str) -> None:
        self.wait.until(lambda _: any(text in shown for shown in self.texts(".toast-body")))

    def wait_for_the_end(self) -> None:
        self.wait.until(lambda _: self.texts("#message .submit-button") and not self.texts("#message .stop-button"))


@contextlib.contextmanager
def served_page(folder: Path, port: int, *options: str) -> Iterator[ReplyWriter]:
    """The page of recipes/chat.py --web, served in this process; gives what writes its replies."""
    import uvicorn

    from hfllm.serving.page import build_page_application

    args = parse_arguments(recipe.ChatArguments, [f"--model={folder}", "--web", f"--port={port}", *options])
    writer = ReplyWriter(recipe.load_model(args), recipe.load_tokenizer(args.model))
    application = build_page_application(
        writer, recipe.default_sampling(args), name=folder.name, system=args.system, host=args.host, port=port
    )
    server = uvicorn.Server(uvicorn.Config(application, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        deadline = time.monotonic() + SECONDS
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the page's server does not start"
            time.sleep(0.05)
        yield writer
    finally:
        server.should_exit = server.force_exit = True
        writer.close()
        thread.join(30)
        writer.join(30)


def wait_until_idle(writer: ReplyWriter) -> None:
    deadline = time.monotonic() + SECONDS
    while writer._active or writer._waiting:
        assert time.monotonic() < deadline, "a reply is still being written"
        time.sleep(0.05)


@pytest.mark.slow
@needs_gradio
@pytest.mark.parametrize("width", [1200, 390], ids=["desktop", "phone"])
def test_people_talk_to_it_in_a_real_browser_that_asks_nobody_else(way, port, browser, width, tmp_path):
    size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    with started(*way, "--web", "--port", port, stdout=subprocess.PIPE) as process:
        wait_for(f"http://127.0.0.1:{port}/", process)
        page = Page(browser, port)
        assert page.ask("Say one") == "One."
        page.send("Bye")
        page.wait.until(lambda _: page.texts(".user.message")[-1:] == ["Bye"])
        page.wait_for_the_end()
        browser.save_screenshot(os.environ.get("HFLLM_SCREENSHOT", str(tmp_path / "chat.png")))
        overflow = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        assert overflow <= 0, "nothing reaches out of the window"
        box = "return document.querySelector(arguments[0]).getBoundingClientRect()"
        chat, settings = (browser.execute_script(box, name) for name in ("#message", "#temperature"))
        is_beside, is_below = settings["left"] > chat["right"], settings["top"] > chat["bottom"]
        assert (is_beside, is_below) == ((True, False) if width > 1000 else (False, True))

        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        asked = [url for url in asked if not url.startswith(("data:", "blob:", "chrome:", "chrome-"))]
        assert len(asked) > 5
        assert [url for url in asked if not url.startswith(f"http://127.0.0.1:{port}/")] == []
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == -signal.SIGTERM


@pytest.mark.slow
@needs_gradio
def test_the_history_outlives_a_reload_and_settings_hold(talker, port, browser, monkeypatch):
    with served_page(talker, port) as writer:
        jobs = []
        submit = writer.submit
        monkeypatch.setattr(writer, "submit", lambda job: (jobs.append(job), submit(job)))
        page = Page(browser, port)
        assert page.ask("Say one") == "One."
        browser.refresh()
        page.wait.until(lambda _: page.replies() == ["One."])
        page.fill("#system textarea", "Be kind")
        page.fill("#temperature input[type=number]", "1.5")
        page.fill("#length input[type=number]", "7")
        time.sleep(1)  # the fields tell the page a moment later
        page.ask("Bye")
        tokenizer = recipe.load_tokenizer(talker)
        messages = [{"role": "system", "content": "Be kind"}, *pair("Say one", "One.")]
        [prompt] = jobs[-1].prompts
        assert list(prompt) == list(encode_prompt([*messages, {"role": "user", "content": "Bye"}], tokenizer))
        assert (jobs[-1].choices[0].temperature, jobs[-1].choices[0].max_new_tokens) == (1.5, 7)


@pytest.mark.slow
@needs_gradio
def test_retry_draws_again(untrained, port, browser):
    with served_page(untrained, port, "--temperature=2", "--max_new_tokens=20"):
        page = Page(browser, port)
        first = page.ask("Say one")
        page.click("button[aria-label='Retry'], button[title='Retry']")
        page.wait_for_reply(1, lambda reply: reply not in ("", first))
        page.wait_for_the_end()
        assert len(page.replies()) == 1


@pytest.mark.slow
@needs_gradio
def test_an_error_is_shown_and_the_next_message_is_answered(talker, port, browser):
    with served_page(talker, port):
        for wrong, message in (("word " * 300, "Shorten it"), ("half a pair: {half}", "not valid Unicode")):
            page = Page(browser, port)
            for _ in range(2):  # the page makes its text box again with each message
                page.send(wrong)
                page.wait_for_error(message)
                page.wait_for_the_end()
                page.click(".toast-close")
            page.wait.until(lambda _, page=page: page.replies() == [])  # a message that failed leaves none
            assert page.ask("Say one") == "One."
            browser.execute_script("localStorage.clear()")


@pytest.mark.slow
@needs_gradio
def test_the_stop_button_and_leaving_the_page_end_the_work(babbler, port, browser):
    """The model would babble for 30,000 tokens; what it said by then stays, and the next message is answered."""
    with served_page(babbler, port, "--max_new_tokens=30000", "--temperature=1") as writer:
        page = Page(browser, port)
        for turn in (1, 2):
            page.send(f"Message {turn}")
            page.wait_for_reply(turn, lambda reply: len(reply) > 20)
            assert writer._active
            page.click("#message .stop-button")
            wait_until_idle(writer)
            page.wait_for_the_end()
            assert len(page.replies()) == turn and len(page.replies()[-1]) > 20
        page.send("Message 3")
        page.wait_for_reply(3, lambda reply: len(reply) > 20)
        browser.get("about:blank")
        wait_until_idle(writer)
