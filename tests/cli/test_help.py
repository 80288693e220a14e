"""The `--help` of each recipe."""

import dataclasses
import re

import pytest

from hfllm.cli.options import about_of
from hfllm.cli.parser import OptionParser
from tests.recipes.conftest import RECIPES, arguments_of, load_recipe


NAMES = sorted(path.stem for path in RECIPES.glob("*.py"))


@pytest.fixture(params=NAMES)
def recipe(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    return request.param


def help_of(recipe: str) -> str:
    return OptionParser(arguments_of(recipe), description=load_recipe(recipe).__doc__).format_help()


def test_the_docstring_is_in_the_help_as_it_is_written(recipe):
    docstring = load_recipe(recipe).__doc__
    assert f"\n{docstring.strip()}\n" in help_of(recipe)
    assert "\n    " in docstring  # with its commands


def test_each_option_has_one_spelling_and_its_default_once(recipe):
    text = help_of(recipe).split("\noptions:\n")[1]
    for field in dataclasses.fields(arguments_of(recipe)):
        lines = re.findall(rf"^  --{field.name}\b", text, flags=re.MULTILINE)
        assert len(lines) == (0 if about_of(field).is_hidden else 1), field.name
    assert not re.search(r"--\w+-\w|--no_", text)
    assert "None" not in text and text.count("(default:") == len(re.findall(r"[dD]efault:", text))


def test_the_help_text_begins_with_a_capital_and_ends_as_a_sentence(recipe):
    for field in dataclasses.fields(arguments_of(recipe)):
        text = about_of(field).help
        assert text[0].isupper() or text[0] == "'", field.name
        assert text.endswith(".") or re.search(r"(e\.g\. |: )[^.]*[\w\d?=-]+$", text), field.name


def test_defaults_and_choices_are_the_real_ones(monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    text = " ".join(help_of("pretrain").split())
    assert "--preset {modern,book} 'modern' is a Qwen3, 'book' a GPT-2. (default: modern)" in text
    assert "--num_hidden_layers N Number of blocks. (default: 6)" in text
    assert "--streaming [BOOL] Read and encode while training, for text larger than the disk. (default: false)" in text
    assert "--model PATH_OR_NAME Folder or Hub id of a model to train further. (default: random weights)" in text
    assert "--repo_id TEXT Repository, owner/name; created if it does not exist. (required)" in " ".join(
        help_of("push_to_hub").split()
    )


def test_sections_come_in_the_order_of_a_run():
    sections = re.findall(r"^(\w[\w-]*):$", help_of("finetune_instruction"), flags=re.MULTILINE)
    assert sections == ["options", "text", "model", "LoRA", "optimization", "evaluation", "generation", "output"]
