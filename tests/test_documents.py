"""README.md, CONTRIBUTING.md and docs/ fit the tree: links, commands, and numbers with a raw file."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from hfllm.cli.arguments import parse_arguments
from tests.recipes.conftest import RECIPES, load_recipe


ROOT = Path(__file__).parents[1]
MEASUREMENTS = ROOT / "docs" / "measurements"
DOCUMENTS = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)
NO_FILE = "raw file not kept"


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(document: Path) -> set[str]:
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_link_and_every_picture_of_a_document_leads_somewhere(document):
    text = CODE.sub("", document.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        place, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", place):
            continue
        target = (document.parent / place).resolve() if place else document
        assert target.exists(), f"{link} does not exist"
        assert not anchor or anchor in anchors(target), f"{link}: there is no such heading"


def test_pictures_are_small_and_each_one_is_shown():
    shown = " ".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture.stat().st_size < 200_000, picture.name
        assert f"images/{picture.name}" in shown, f"no document shows {picture.name}"


def commands_in(text: str) -> list[tuple[str, list[str]]]:
    """Recipe and options of each command in a Markdown text: `python recipes/x.py --a b  # why` -> ("x", ["--a", "b"]).

    A recipe's name without options, as in prose, is no command.
    """
    commands = []
    for code in CODE.findall(text):
        lines = code.strip("`").replace("\\\n", " ").splitlines()
        for line in lines:
            for name, rest in re.findall(r"recipes/(\w+)\.py((?: +[^|;]+)?)", line):
                options = shlex.split(rest, comments=True)
                if options and options[0].startswith("--"):
                    commands.append((name, options))
    return commands


def test_a_command_is_read_from_a_code_block_and_from_a_line_of_code():
    text = (
        'See `recipes/a.py`, `recipes/a.py --x 1`.\n\n```\nls | python recipes/b.py --y "c d" \\\n    --z  # why\n```\n'
    )
    assert commands_in(text) == [("a", ["--x", "1"]), ("b", ["--y", "c d", "--z"])]


COMMANDS = {document: commands_in(document.read_text(encoding="utf-8")) for document in DOCUMENTS}


@pytest.mark.parametrize("recipe", sorted({name for found in COMMANDS.values() for name, _ in found}))
def test_every_command_of_the_documents_is_one_that_its_recipe_takes(recipe, capsys):
    assert (RECIPES / f"{recipe}.py").exists()
    module = load_recipe(recipe)
    [arguments] = [
        value
        for name, value in vars(module).items()
        if name.endswith("Arguments") and getattr(value, "__module__", None) == module.__name__
    ]
    for document, found in COMMANDS.items():
        for name, options in found:
            if name != recipe:
                continue
            if "--config" in options and options[options.index("--config") + 1] == "my.yaml":  # the reader's own
                place = options.index("--config")
                options = options[:place] + options[place + 2 :]
            try:
                parse_arguments(arguments, options)
            except SystemExit:
                said = capsys.readouterr().err
                pytest.fail(f"{name_of(document)}: {recipe}.py {shlex.join(options)}\n{said}")


def rows_of(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without its head."""
    section = text.split(f"\n{heading}\n", 1)[1]
    lines = [line for line in section.split("\n\n## ", 1)[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def numbers_in(value: object) -> list[float]:
    if isinstance(value, dict | list):
        return [
            number for each in (value.values() if isinstance(value, dict) else value) for number in numbers_in(each)
        ]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def is_among(shown: str, numbers: list[float]) -> bool:
    """Whether one of the numbers reads like this when it is rounded to as many digits, also in percent or millions."""
    digits = len(shown.partition(".")[2])
    return any(f"{number * scale:.{digits}f}" == shown for number in numbers for scale in (1, 100, 1e-6))


def test_a_number_is_compared_to_the_digits_that_are_shown():
    assert is_among("1.18", [1.1842]) and not is_among("1.19", [1.1842])
    assert is_among("84.7", [0.84702]) and is_among("1.3", [1_279_872])


def test_the_readmes_numbers_are_those_of_their_raw_files_or_say_that_there_is_none():
    rows = rows_of((ROOT / "README.md").read_text(encoding="utf-8"), "## Results")
    assert len(rows) == 5
    for _, *cells, source in rows:
        if NO_FILE in source:
            continue
        [file] = re.findall(r"\(docs/measurements/(\w+\.json)\)", source)
        numbers = numbers_in(json.loads((MEASUREMENTS / file).read_text(encoding="utf-8"))["results"])
        shown = re.findall(r"(?<![\w-])\d+(?:\.\d+)?(?!\w)", " ".join(cells))
        assert shown and [number for number in shown if not is_among(number, numbers)] == [], file


def test_every_table_of_numbers_names_its_raw_file_or_says_that_there_is_none():
    sections = (ROOT / "docs" / "numbers.md").read_text(encoding="utf-8").split("\n## ")[1:]
    assert len(sections) > 10
    for section in sections:
        files = re.findall(r"\(measurements/(\w+\.json)\)", section)
        assert files or NO_FILE in section, section.splitlines()[0]
        assert all((MEASUREMENTS / file).exists() for file in files)


def load_tables():
    spec = importlib.util.spec_from_file_location("tables", MEASUREMENTS / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_numbers_of_a_raw_file_reach_the_readme_and_the_page_of_numbers(tmp_path, monkeypatch):
    tables = load_tables()
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    speeds = {"transformers GPT-2, no dropout": 100.4, "transformers Llama": 80.5, "hfllm, modern": 150.6}
    models = {
        name: {
            "tokens_per_second": speed,
            "speed_against_transformers GPT-2, no dropout": speed / 100.4,
            "speed_against_transformers Llama": speed / 80.5,
        }
        for name, speed in speeds.items()
    }
    environment = {"cores": 2, "processor": "a CPU"}
    measured = {"command": "measure decoding", "date": "2026-11-27", "environment": environment}
    results = {"one_thread": {"decoding": models}, "all_threads": {"decoding": models}}
    (tmp_path / "decoding.json").write_text(json.dumps({"measured": measured, "results": results}))
    readme, numbers = tables.render_documents().values()
    row = "151 tokens/s | Llama 80 tokens/s; GPT-2 100 tokens/s | [decoding.json](docs/measurements/decoding.json) |"
    assert row in readme
    assert "| hfllm, modern | 151 tokens/s (1.50 / 1.87) | 151 tokens/s (1.50 / 1.87) |" in numbers
    assert "`measure decoding` on 2026-11-27, 2 cores of a CPU" in numbers
    assert NO_FILE in numbers.split("<!-- scaling -->")[1], "numbers that were not measured stay"


def test_the_documents_hold_what_tables_py_makes_of_the_raw_files():
    for path, text in load_tables().render_documents().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run python docs/measurements/tables.py"
