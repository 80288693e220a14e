"""The exit code that `run` notes, and printed text that any terminal can show."""

import contextlib
import dataclasses
import io
import sys

import pytest
from transformers.hf_argparser import HfArg

from hfllm.cli.arguments import run


@dataclasses.dataclass
class Arguments:
    steps: int = HfArg(default=1, help="Steps.")


def raises(error: BaseException):
    def main(arguments):
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "argv", "code"),
    [
        (lambda arguments: None, [], 0),
        (lambda arguments: None, ["--stepz", "2"], 2),
        (lambda arguments: sys.exit(143), [], 143),
        (lambda arguments: sys.exit("no"), [], 1),
        (raises(ZeroDivisionError()), [], 1),
        (raises(KeyboardInterrupt()), [], 130),
    ],
    ids=["ends well", "a wrong option", "saved and stopped", "a message", "a bug", "Ctrl-C"],
)
def test_a_recipe_adds_its_exit_code_to_the_file_that_its_supervisor_reads(main, argv, code, tmp_path, monkeypatch):
    path = tmp_path / "codes"
    path.write_text("0\n")
    monkeypatch.setenv("HFLLM_EXIT_CODES", str(path))
    monkeypatch.setattr(sys, "argv", ["recipe", *argv])
    with contextlib.suppress(SystemExit, ZeroDivisionError):
        run(main, Arguments)
    assert path.read_text() == f"0\n{code}\n"


@pytest.mark.fault(37)
def test_what_a_terminal_cannot_encode_is_printed_with_escapes(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "argv", ["recipe"])
    run(lambda arguments: print("na\u00efve \u4e2d"), Arguments)
    assert terminal.buffer.getvalue() == rb"na\xefve \u4e2d" + b"\n"
