"""Make the pictures of the documentation, docs/images/*.png, from what `make demo` wrote.

    make pictures
    python docs/make_pictures.py --model out/demo --chat out/chat

Needs Chromium and its driver (Debian: apt-get install chromium chromium-driver), and selenium and gradio
(pip install -e '.[interop]').
"""

import argparse
import contextlib
import importlib.util
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image


ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
WIDTH = 900  # pixels of a picture
LAYER = "1"  # whose heads are drawn
PROMPT = "def read(self, size):\n    return self.file.read(size)"
QUESTIONS = ("What does Python print for [14, 15, 6, 2, 10][1]", "What does Python print for 'tiger'.startswith('ti')")
SECONDS = 120  # the longest wait for the browser or for the chat


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("out/demo"), help="folder of the pretraining run")
    parser.add_argument("--chat", type=Path, default=Path("out/chat"), help="folder of the chat")
    options = parser.parse_args()
    check(options)
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_small(options.model / "curves.png", "curves")
        inspect = ["recipes/inspect_model.py", "--model", str(options.model), "--prompt", PROMPT, "--layer", LAYER]
        subprocess.run(
            [sys.executable, *inspect, "--output_dir", name], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        save_small(folder / f"attention_layer{LAYER}.png", "attention")
        with browser(folder / "profile", height=1000) as driver:
            driver.get((options.model / "report.html").resolve().as_uri())
            time.sleep(1)  # until the curves are drawn
            driver.save_screenshot(str(folder / "page.png"))
        save_small(folder / "page.png", "page")
        photograph_chat(options.chat, folder)
        save_small(folder / "chat.png", "chat")


def check(options: argparse.Namespace) -> None:
    """Say what is missing before anything is made."""
    needed = [options.model / "curves.png", options.model / "report.html", options.chat / "config.json"]
    problems = [f"{path} is not there: run `make demo` first." for path in needed if not path.exists()]
    problems += [
        f"{program} is not installed: apt-get install chromium chromium-driver."
        for program in ("chromium", "chromedriver")
        if shutil.which(program) is None
    ]
    problems += [
        f"{module} is not installed: pip install -e '.[interop]'."
        for module in ("selenium", "gradio")
        if importlib.util.find_spec(module) is None
    ]
    if problems:
        sys.exit("error: " + "\n       ".join(problems))


def save_small(source: Path, name: str) -> None:
    """Save a picture at the documentation's width, in few colours, which makes it small."""
    picture = Image.open(source).convert("RGB")
    height = round(picture.height * WIDTH / picture.width)
    small = picture.resize((WIDTH, height), Image.Resampling.LANCZOS).quantize(128)
    target = IMAGES / f"{name}.png"
    small.save(target, optimize=True)
    print(f"{target.relative_to(ROOT)}: {target.stat().st_size / 1000:.0f} kB")


@contextlib.contextmanager
def browser(profile: Path, *, height: int) -> Iterator[Any]:
    """Headless Chromium, by its own driver."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for word in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{word}")
    options.add_argument(f"--window-size=1100,{height}")
    options.add_argument(f"--user-data-dir={profile}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def photograph_chat(model: Path, folder: Path) -> None:
    """Ask the web chat some questions, and save what the page then shows."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def find_box(page: Any) -> Any:
        boxes = page.find_elements(By.CSS_SELECTOR, "#message textarea")
        return next((box for box in boxes if box.is_displayed() and box.is_enabled()), None)

    address = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "recipes/chat.py", "--model", str(model), "--web", "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as server:
        try:
            wait_for(address, server)
            with browser(folder / "chat-profile", height=800) as driver:
                driver.get(address)
                wait = WebDriverWait(driver, SECONDS)
                for number, question in enumerate(QUESTIONS, start=1):
                    box = wait.until(find_box)
                    box.send_keys(question + Keys.ENTER)
                    wait.until(lambda page, number=number: len(replies(page)) == number and replies(page)[-1])
                time.sleep(2)  # until the last reply has come to its end
                driver.save_screenshot(str(folder / "chat.png"))
        finally:
            server.terminate()


def replies(driver: Any) -> list[str]:
    """The chat's replies on the page, as far as they have come."""
    return driver.execute_script("return [...document.querySelectorAll('.bot.message')].map(e => e.innerText.trim())")


def wait_for(address: str, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(address, timeout=5).close()
            return
        time.sleep(0.5)
    sys.exit(f"error: the chat's page at {address} does not answer.")


if __name__ == "__main__":
    main()
