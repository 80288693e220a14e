"""recipes/chat.py: the terminal in this process and in a real one, the browser in real Chromium, HTTP over loopback."""

import contextlib
import importlib.util
import io
import json
import os
import pty
import queue
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM

import hfllm
from hfllm.adapters import add_lora, save_adapter
from hfllm.cli.arguments import parse_arguments
from hfllm.data.conversations import Conversation, pair
from hfllm.data.instruction import ConversationRows, encode_conversations, encode_prompt
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


def chat(monkeypatch, capsys, typed: str, **options) -> tuple[str, str]:
    """What is printed, and what goes to stderr, when these lines are piped in."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
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


@pytest.fixture
def prompts(monkeypatch) -> list[list[int]]:
    """The prompts that the model gets, instead of a real reply; each is answered with a word."""
    seen = []

    def generate(self, input_ids, streamer, **kwargs):
        seen.append(input_ids[0].tolist())
        streamer.on_finalized_text("yes ", stream_end=False)
        streamer.on_finalized_text("", stream_end=True)

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


def test_a_message_longer_than_the_context_is_refused_and_the_chat_goes_on(talker, monkeypatch, capsys):
    printed, errors = chat(monkeypatch, capsys, f"{'word ' * 200}\nBye\n", model=talker)
    assert printed == "Good night!\n"
    assert "room for 64. Shorten it" in errors


def test_ctrl_c_ends_the_reply_and_not_the_chat(talker, monkeypatch, capsys):
    real = hfllm.GPTForCausalLM.generate

    def interrupted_once(self, input_ids, streamer, **kwargs):
        monkeypatch.setattr(hfllm.GPTForCausalLM, "generate", real)
        streamer.on_finalized_text("Half a ", stream_end=False)
        raise KeyboardInterrupt

    monkeypatch.setattr(hfllm.GPTForCausalLM, "generate", interrupted_once)
    printed, errors = chat(monkeypatch, capsys, "Say one\n/reset\nBye\n", model=talker)
    assert printed == "Half a \nGood night!\n"
    assert "(stopped)" in errors


def test_what_cannot_be_is_said_at_the_door(talker, tmp_path):
    for option, message in {
        "--max_new_tokens=0": "at least 1",
        "--top_p=0.5": "temperature 0",
        "--adapter=x": "adapter",
    }.items():
        with pytest.raises(ValueError, match=message):
            recipe.main(parse_arguments(recipe.ChatArguments, [f"--model={talker}", option]))
    tokenizer = recipe.load_tokenizer(talker)
    tokenizer.chat_template = None
    shutil.copytree(talker, tmp_path / "mute", ignore=lambda *_: ["chat_template.jinja"])
    tokenizer.save_pretrained(tmp_path / "mute")
    with pytest.raises(ValueError, match="has no chat template"):
        recipe.main(parse_arguments(recipe.ChatArguments, [f"--model={tmp_path / 'mute'}"]))


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
    for name in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(name)
    name = Path(way[1]).name
    with started(*way, "--serve", "--port", port, stdout=subprocess.PIPE) as process:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        request = {"model": name, "messages": [{"role": "user", "content": "A colour?"}]}
        with urllib.request.urlopen(post(port, request), timeout=SECONDS) as response:
            choice = json.load(response)["choices"][0]
        assert choice["message"]["content"] == "Blue and green"
        assert choice["finish_reason"] == "stop"

        with urllib.request.urlopen(post(port, {**request, "stream": True}), timeout=SECONDS) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line.decode().removeprefix("data: ") for line in response if line.startswith(b"data: {")]
        pieces = [json.loads(line)["choices"][0]["delta"].get("content") or "" for line in lines]
        assert "".join(pieces) == "Blue and green"
        assert sum(piece != "" for piece in pieces) > 1

        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=SECONDS) as response:
            assert [model["id"] for model in json.load(response)["data"]] == [name]


@pytest.fixture
def browser(tmp_path):
    """Headless Chromium, which notes every request."""
    selenium = pytest.importorskip("selenium.webdriver")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)")
    options = selenium.ChromeOptions()
    options.binary_location = programs[0]
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1000,800"):
        options.add_argument(f"--{word}")
    options.add_argument(f"--user-data-dir={tmp_path / 'chromium'}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = selenium.Chrome(options=options, service=selenium.ChromeService(programs[1]))
    yield driver
    driver.quit()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio: pip install -e '.[chat]'")
def test_people_talk_to_it_in_a_real_browser_that_asks_nobody_else(way, port, browser, tmp_path):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    with started(*way, "--web", "--port", port, stdout=subprocess.PIPE) as process:
        wait_for(f"http://127.0.0.1:{port}/", process)
        browser.get(f"http://127.0.0.1:{port}/")
        wait = WebDriverWait(browser, SECONDS)
        for question, reply in (("Say one", "One."), ("Bye", None)):
            box = wait.until(lambda page: page.find_element(By.CSS_SELECTOR, "textarea"))
            wait.until(lambda page, box=box: box.is_enabled())
            box.send_keys(question + Keys.ENTER)
            wait.until(lambda page, text=question: text in page.find_element(By.TAG_NAME, "body").text)
            if reply is not None:
                wait.until(lambda page, text=reply: text in page.find_element(By.TAG_NAME, "body").text)
        browser.save_screenshot(os.environ.get("HFLLM_SCREENSHOT", str(tmp_path / "chat.png")))

        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        asked = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        asked = [url for url in asked if not url.startswith(("data:", "blob:", "chrome:", "chrome-"))]
        assert len(asked) > 5
        assert [url for url in asked if not url.startswith(f"http://127.0.0.1:{port}/")] == []


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs gradio: pip install -e '.[chat]'")
def test_the_pages_stop_button_ends_the_reply_and_the_work_for_it(port, browser, tmp_path):
    """The model would babble for 30,000 tokens; what it said by then stays, and the next message is answered."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    save_untrained(tmp_path / "babbler", context=65536, never_stops=True)
    words = [f"--model={tmp_path / 'babbler'}", "--max_new_tokens=30000", "--temperature=1", "--web", f"--port={port}"]
    args = parse_arguments(recipe.ChatArguments, words)
    model = recipe.load_model(args)
    lengths: queue.Queue[int] = queue.Queue()  # of the replies, as their generation ends
    real = model.generate
    model.generate = lambda *args, **kwargs: lengths.put(real(*args, **kwargs).shape[1])
    page = recipe.build_web_chat(args, model, recipe.load_tokenizer(args.model))
    page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, share=False, inbrowser=False)
    try:
        browser.get(f"http://127.0.0.1:{port}/")
        wait = WebDriverWait(browser, SECONDS)

        def replies() -> list[str]:  # by a script, as the page replaces its elements while the reply grows
            return browser.execute_script("return [...document.querySelectorAll('.bot.message')].map(e => e.innerText)")

        for turn in (1, 2):
            box = wait.until(lambda page: page.find_element(By.CSS_SELECTOR, "textarea"))
            wait.until(lambda page, box=box: box.is_enabled())
            box.send_keys(f"Message {turn}" + Keys.ENTER)
            wait.until(lambda _, turn=turn: len(replies()) == turn and len(replies()[-1]) > 20)
            wait.until(
                lambda page: page.execute_script(
                    "const b = document.querySelector('button.stop-button'); if (b) b.click(); return Boolean(b)"
                )
            )
            assert 0 < lengths.get(timeout=SECONDS) < 30000
            wait.until(lambda page: page.find_elements(By.CSS_SELECTOR, "button.submit-button"))
            assert len(replies()) == turn and len(replies()[-1]) > 20
    finally:
        page.close()
