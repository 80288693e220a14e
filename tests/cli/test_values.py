"""Text and paths that options hold."""

from pathlib import Path

import pytest

from hfllm.cli.arguments import parse_arguments
from hfllm.cli.options import Location, arguments, option
from hfllm.cli.values import check_text, printable, resolve_path


@arguments
class Arguments:
    output_dir: str = option("out/run", help="Out.", location=Location.WRITTEN)
    model: str | None = option(None, help="Model.", location=Location.READ_OR_NAMED)
    runs: list[str] | None = option(None, help="Runs.", location=Location.READ)
    prompt: list[str] | None = option(None, help="Prompt.")
    config: str | None = option(None, help="YAML.", location=Location.READ)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ("~/run", "{home}/run"),
        ("~", "{home}"),
        ("~/run/", "{home}/run"),
        ("out/run/", "out/run"),
        ("./out//run", "out/run"),
        ("../out", "../out"),
        ("/", "/"),
        ("out/übung 1/模型", "out/übung 1/模型"),
        ("a~b", "a~b"),
        ("$HOME/run", "$HOME/run"),
    ],
)
def test_a_path_is_resolved_in_one_way(home, given, resolved):
    assert resolve_path(given, Location.WRITTEN) == resolved.format(home=home)
    assert resolve_path(given, Location.READ) == resolved.format(home=home)


def test_what_may_be_an_id_of_the_hub_changes_only_by_its_home(home):
    for given in ("me/my-gpt", "stdlib", "./out/run/", "a.txt, b.txt"):
        assert resolve_path(given, Location.READ_OR_NAMED) == given
    assert resolve_path("~/out/demo", Location.READ_OR_NAMED) == f"{home}/out/demo"


@pytest.mark.parametrize("location", Location)
def test_an_empty_path_and_nobodys_home_are_refused(location):
    for empty in ("", "  "):
        with pytest.raises(ValueError, match=r"it is empty\. Give a path"):
            resolve_path(empty, location)
    with pytest.raises(ValueError, match="no home folder of ~nobody-at-all"):
        resolve_path("~nobody-at-all/run", location)


def test_a_path_in_yaml_or_quoted_on_the_command_line_is_resolved(home):
    (home / "a.yaml").write_text("output_dir: ~/run/\nmodel: ~/base\nruns: [~/a, b/]\n")
    parsed = parse_arguments(Arguments, ["--config", "~/a.yaml"])
    assert (parsed.output_dir, parsed.model) == (f"{home}/run", f"{home}/base")
    assert parsed.runs == [f"{home}/a", "b"]
    assert parse_arguments(Arguments, ["--output_dir=~/other"]).output_dir == f"{home}/other"


BYTES = "caf\udce9"  # as Python reads the bytes `caf\xe9` of a command line


def test_text_that_is_not_utf_8_is_shown_with_its_bytes():
    assert printable(BYTES) == r"caf\xe9"
    assert printable("naïve \ud800") == r"naïve \ud800"
    with pytest.raises(ValueError, match=r"^\\xe9 in it is not UTF-8. Set the terminal to UTF-8, or convert"):
        check_text(BYTES)
    check_text("café 模型 \U0001f600")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "one", BYTES], r"error: --prompt 'caf\xe9': \xe9 in it is not UTF-8"),
        (["--output_dir", BYTES], r"error: --output_dir 'caf\xe9': \xe9 in it is not UTF-8"),
        (["--config", BYTES], r"error: --config 'caf\xe9': \xe9 in it is not UTF-8"),
        (["--model", "a\0b"], "it holds a NUL character"),
        (["--output_dir="], "error: --output_dir '': it is empty. Give a path"),
        (["--output_dir", ""], "error: --output_dir '': it is empty. Give a path"),
        (["--runs", "a", ""], "error: --runs '': it is empty. Give a path"),
        (["--config="], "error: --config '': it is empty. Give a path"),
        (["--model="], "error: --model '': it is empty. Give a path"),
    ],
)
def test_what_no_file_and_no_tokenizer_takes_is_refused_by_the_parser(capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(Arguments, argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_surrogate_in_yaml_is_refused(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text('prompt: "half \\ud83d"\n')
    with pytest.raises(SystemExit):
        parse_arguments(Arguments, ["--config", str(tmp_path / "a.yaml")])
    assert r"error: --prompt 'half \ud83d': \ud83d in it is not UTF-8" in capsys.readouterr().err
