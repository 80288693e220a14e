import base64
import hashlib
import json
import math
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from hfllm.report import read_run, without_places, write_comparison, write_page
from hfllm.report.charts import Line, chart, line_of
from hfllm.report.page import render_run
from hfllm.report.run import shorten_paths
from hfllm.runs.log import format_sample


class Page(HTMLParser):
    """A page's elements, as (tag, attributes), the tables' cells and all of the text."""

    VOID = {"meta", "link", "br", "wbr"}

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == [], "not every element is closed"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data
        if {"td", "th"} & set(self.open) and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data

    def charts(self) -> dict[str, dict]:
        found = [attributes for tag, attributes in self.elements if attributes.get("class") == "chart"]
        titles = [attributes["aria-label"] for tag, attributes in self.elements if "aria-label" in attributes]
        return {title: json.loads(attributes["data-lines"]) for title, attributes in zip(titles, found, strict=True)}


@pytest.fixture
def make_folder(tmp_path):
    def make(name="a", *, num_steps=20, metrics=None, arguments=None, samples="", rate=1e-3):
        folder = tmp_path / name
        folder.mkdir()
        log = [
            {"step": step, "loss": 6 / step, "learning_rate": rate, "grad_norm": 0.5}
            for step in range(1, num_steps + 1)
        ]
        log[-1] |= {"eval_loss": 1.5, "eval_bits_per_byte": 0.75}
        (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
        (folder / "metrics.json").write_text(
            json.dumps({"eval_loss": 1.5, "num_parameters": 12_345, **(metrics or {})})
        )
        (folder / "arguments.yaml").write_text(yaml.safe_dump({"learning_rate": rate, "seed": 42, **(arguments or {})}))
        (folder / "samples.txt").write_text(samples)
        return folder

    return make


def test_a_page_holds_all_it_shows_and_asks_for_nothing(make_folder, tmp_path):
    path = write_page(read_run(make_folder(samples="--- step 20\nhello\n")), tmp_path / "report.html")
    html = path.read_text()
    page = Page(html)
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or value == "data:,", (tag, value)
    assert not re.search(r"url\(|@import|https?:", html)
    (policy,) = (a["content"] for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    (script,) = page.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_every_logged_number_has_its_curve(make_folder):
    charts = Page(render_run(read_run(make_folder()))).charts()
    assert list(charts) == ["Loss", "Bits per byte", "Learning rate", "Gradient norm"]
    training, validation = charts["Loss"]
    assert training["points"][:2] == [[1, 6], [2, 3]] and len(training["points"]) == 20
    assert validation["points"] == [[20, 1.5]]


def test_a_line_is_where_its_numbers_are():
    html = chart("A", [Line("a", np.array([0.0, 10.0]), np.array([0.0, 10.0]), 0)])
    assert 'd="M0.00 100.00L100.00 0.00"' in html  # SVG counts downwards
    assert '<span style="top:100.00%">0</span>' in html and '<span style="top:0.00%">10</span>' in html
    doubled = chart("A", [Line("a", np.array([0.0, 1, 2]), np.array([1.0, 10, 100]), 0)], can_be_logarithmic=True)
    assert "M0.00 100.00L50.00 50.00L100.00 0.00" in doubled and "logarithmic" in doubled


def test_a_number_that_is_not_finite_leaves_a_gap_and_a_number_never_logged_no_line():
    html = chart("A", [Line("a", np.arange(4.0), np.array([0, math.nan, 10, 10]), 0)])
    assert 'd="M0.00 100.00M66.67 0.00L100.00 0.00"' in html
    assert line_of([{"step": 1, "loss": None}], "loss", "loss", color=0) is None
    assert line_of([{"step": 1}], "loss", "loss", color=0) is None
    assert chart("A", []) == ""


def test_a_long_log_is_thinned_and_keeps_its_spikes():
    log = [{"step": step, "loss": 2.0} for step in range(1, 100_001)]
    log[54_321]["loss"] = 99.0
    page = Page(chart("Loss", [line_of(log, "loss", "training", color=0)]))
    ((line,),) = page.charts().values()
    assert len(line["points"]) <= 801
    assert [54_322, 99] in line["points"] and line["points"][0][0] == 1


def test_what_a_model_wrote_is_text_whatever_it_wrote(make_folder):
    attack = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>"
    folder = make_folder(
        samples=f"--- step 10\n{attack}\x00\x1b\n",
        arguments={"sample_prompt": attack, "dataset": '"><script>'},
        metrics={"dataset": attack, "per_label": {attack: {"f1": 0.5}}, "labels": [attack, "b"],
                 "test_confusion_matrix": [[1, 2], [3, 4]]},
    )  # fmt: skip
    page = Page(render_run(read_run(folder)))
    assert len(page.scripts) == 1 and not any(tag == "img" for tag, _ in page.elements)
    assert page.text.count(attack) >= 4
    assert "\\x00\\x1b" in page.text and "\x00" not in page.text


def test_a_confusion_matrix_shows_each_count(make_folder):
    matrix = {"labels": ["ham", "spam"], "counts": [[90, 10], [3, 47]]}
    page = Page(render_run(read_run(make_folder(metrics={"test_confusion_matrix": matrix, "test_accuracy": 0.9133}))))
    assert ["ham", "90", "10"] in page.rows and ["spam", "3", "47"] in page.rows
    assert "--share:0.900" in str(page.elements) and "91.3%" in page.text


def test_a_confusion_matrix_is_labelled_by_the_table_beside_it(make_folder):
    metrics = {"test_confusion": [[5, 1], [2, 4]], "test_per_label": {"os": {"f1": 0.77}, "json": {"f1": 0.73}}}
    page = Page(render_run(read_run(make_folder(metrics=metrics))))
    assert ["os", "5", "1"] in page.rows and ["json", "2", "4"] in page.rows and ["os", "0.7700"] in page.rows


def test_tables_of_tables_are_shown(make_folder):
    tasks = {"hellaswag": {"acc": 0.25, "stderr": 0.01}, "arc_easy": {"acc": 0.5, "stderr": 0.02}}
    page = Page(render_run(read_run(make_folder(metrics={"tasks": tasks}))))
    assert ["hellaswag", "0.2500", "0.0100"] in page.rows


def test_the_tokenizers_report_is_on_the_page_if_it_is_of_this_tokenizer(make_folder):
    report = {"fingerprint": "abc", "vocab_size": 300, "tokens": 1000, "bytes_per_token": 3.25, "bytes": 3250}
    report |= {"others": {"gpt2": {"vocab_size": 50257, "tokens": 2000, "bytes_per_token": 1.625}}, "unused_ids": 7}
    folder = make_folder(metrics={"tokenizer_sha256": "abc"})
    (folder / "tokenizer_report.json").write_text(json.dumps({**report, "longest_tokens": [" <b>"]}))
    page = Page(render_run(read_run(folder)))
    assert ["this tokenizer", "300", "1,000", "3.2500"] in page.rows and [
        "gpt2",
        "50,257",
        "2,000",
        "1.6250",
    ] in page.rows
    (folder / "metrics.json").write_text(json.dumps({"tokenizer_sha256": "another"}))
    assert "Tokenizer" not in Page(render_run(read_run(folder))).text


def test_samples_that_a_resumed_run_took_back_are_not_shown(make_folder):
    samples = "--- step 10\nten\n--- step 20\nnever happened\n--- step 10\nten again\n--- step 20\ntwenty\n"
    assert read_run(make_folder(samples=samples)).samples == [(10, "ten again"), (20, "twenty")]


def test_answers_stand_under_their_questions(make_folder):
    samples = "--- What is len?\nexpected: 3\nafter:    3\n\n--- And sum?\nafter: 6\n"
    run = read_run(make_folder(samples=samples))
    assert run.samples == [("What is len?", "expected: 3\nafter:    3"), ("And sum?", "after: 6")]
    assert "What it answers" in Page(render_run(run)).text


HEADINGS = "--- step 7\n --- step 8\n--- What is len?\n--- \n---\nthe end"


def test_a_sample_that_looks_like_a_heading_is_shown_as_it_was_written(make_folder):
    samples = format_sample(5, HEADINGS) + format_sample(10, "a\r--- step 11\rb")
    lines = samples.splitlines()
    assert [line for line in lines if line.startswith("--- step")] == ["--- step 5", "--- step 10"]
    run = read_run(make_folder(samples=samples))
    assert run.samples == [(5, HEADINGS), (10, "a\n--- step 11\nb")]
    text = Page(render_run(run)).text
    assert f"step 5{HEADINGS}step 10a\n--- step 11\nb" in text


def test_a_question_that_looks_like_a_step_is_a_question(make_folder):
    questions = ["step 3", " step 4", "first\n--- second\r\nthird", "", "step by step"]
    samples = "\n".join(format_sample(question, f"expected: {HEADINGS}") for question in questions)
    headings, texts = zip(*read_run(make_folder(samples=samples)).samples, strict=True)
    assert headings == ("step 3", " step 4", "first\\n--- second\\nthird", "", "step by step")
    assert set(texts) == {f"expected: {HEADINGS}"}


def test_a_number_that_a_run_does_not_have_is_not_on_its_page(make_folder):
    page = Page(render_run(read_run(make_folder(metrics={"mfu": None, "tokens_per_second": 2000.0}))))
    assert "tokens per second" in page.text and "FLOPs utilization" not in page.text


def test_several_runs_are_compared_on_one_page(make_folder, tmp_path):
    one = read_run(make_folder("one", metrics={"eval_loss": 1.5, "eval_accuracy": 0.5, "dataset": "x"}))
    two = read_run(make_folder("two", metrics={"eval_loss": 1.25, "eval_accuracy": 0.4}, rate=3e-3))
    html = write_comparison([one, two], tmp_path / "compare.html").read_text()
    page = Page(html)
    assert [line["label"] for line in page.charts()["Training loss"]] == ["one", "two"]
    assert ["learning_rate", "0.001", "0.003"] in page.rows
    assert not any(row[0] == "seed" for row in page.rows if row)  # the same in both
    best = re.findall(r'class="number best">([^<]+)<', html)
    assert best == ["1.2500", "50.0%"]
    with pytest.raises(ValueError, match="cannot be compared; give two"):
        write_comparison([one], tmp_path / "compare.html")


def test_two_runs_of_one_name_are_told_apart(make_folder, tmp_path):
    one = make_folder("same")
    shutil.copytree(one, tmp_path / "elsewhere" / "same")
    html = write_comparison([read_run(one), read_run(tmp_path / "elsewhere" / "same")], tmp_path / "c.html").read_text()
    assert "same (2)" in html


def test_a_run_that_is_not_over_has_its_page(make_folder):
    folder = make_folder()
    (folder / "metrics.json").unlink()
    assert "not finished: the log reaches step 20" in Page(render_run(read_run(folder))).text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        read_run(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"not a run's folder.*it holds notes.txt"):
        read_run(tmp_path)
    (tmp_path / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics.json is not JSON"):
        read_run(tmp_path)


def test_paths_are_cut_to_their_last_name(tmp_path, make_folder):
    (tmp_path / "texts").mkdir()
    for given, shown in {
        "/home/me/my.txt": "my.txt",
        "~/a/b.jsonl,../c.txt": "b.jsonl,c.txt",
        "C:\\Users\\me\\x.txt": "x.txt",
        f"{tmp_path}/texts/": "texts",
        "openai-community/gpt2": "openai-community/gpt2",
        "import os / sys": "import os / sys",
    }.items():
        assert shorten_paths(given) == shown
    run = without_places(read_run(make_folder(arguments={"tokenizer": "/x/y/tok", "cache_dir": "/x/cache"})))
    assert run.arguments["tokenizer"] == "tok" and "cache_dir" not in run.arguments


@pytest.mark.parametrize("width", [1400, 390])
def test_a_browser_shows_it_without_a_request_or_an_error(make_folder, tmp_path, width):
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver")
    matrix = {"labels": ["a label", "another"], "counts": [[9, 1], [2, 8]]}
    folder = make_folder(samples="--- step 20\n" + "x" * 500 + "\n", metrics={"test_confusion_matrix": matrix})
    path = write_page(read_run(folder), tmp_path / "report.html")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(path.as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width  # nothing sticks out
        plot = browser.find_element("css selector", ".plot")
        box = browser.execute_script("const b = arguments[0].getBoundingClientRect(); return [b.right, b.top]", plot)
        moved = {"type": "mouseMoved", "x": box[0] - 1, "y": box[1] + 5}
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", moved)
        tip = browser.find_element("css selector", ".tip").text
        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
        asked = [one["request"]["url"] for one in sent if one["documentURL"] == path.as_uri()]  # not the start page's
        errors = browser.get_log("browser")
    finally:
        browser.quit()
    assert tip.splitlines() == ["step 20", "training 0.3", "validation 1.5"]
    assert {url for url in asked if not url.startswith("data:")} == {path.as_uri()}
    assert errors == []
