"""Questions whose answers the interpreter gives."""

import importlib
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from hfllm.data import python_questions as module
from hfllm.data.python_questions import (
    ASKING,
    WORDINGS,
    evaluate_expression,
    first_line,
    further_expressions,
    python_questions,
    reword,
)


@pytest.fixture(scope="module")
def questions():
    return python_questions(400)


def test_there_are_thousands_and_none_twice():
    questions = python_questions()
    assert len(questions) > 13_000
    assert len({question.question for question in questions}) == len(questions)


def test_the_seed_decides(questions):
    assert python_questions(400) == questions
    assert python_questions(400, seed=1) != questions


def test_the_questions_depend_neither_on_pythons_folder_nor_on_its_hashing(tmp_path):
    """One that told the interpreter's path, sys.executable, trained other weights in every environment."""
    python = tmp_path / "somewhere else" / "python"
    python.parent.mkdir()
    python.symlink_to(Path(sys.executable).resolve())
    program = (
        "import runpy, sys; print(sys.executable, file=sys.stderr);"
        f"print(runpy.run_path({module.__file__!r})['python_questions'](40))"
    )
    printed = []
    for interpreter, seed in ((sys.executable, "1"), (python, "2")):
        environment = {"PATH": os.environ["PATH"], "PYTHONHASHSEED": seed}
        process = subprocess.run([interpreter, "-c", program], env=environment, capture_output=True, text=True)
        assert process.stderr == f"{interpreter}\n"
        printed.append(process.stdout)
    assert len(printed[0]) > 100_000
    assert printed[0] == printed[1]


def test_another_interpreter_prints_the_same_answers(questions):
    """Asked of a process that knows nothing of hfllm."""
    asked = [question for question in questions if question.kind not in ("docstring", "name")]
    assert len(asked) == 400
    expressions = [question.question.removeprefix("What does Python print for ") for question in asked]
    program = "\n".join(f"print(repr({expression}))" for expression in expressions)
    printed = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True)
    assert printed.stdout.splitlines() == [question.answer for question in asked]


def test_a_named_function_has_the_docstring(questions):
    named = [question for question in questions if question.kind == "name"]
    assert len(named) > 500
    for question in named:
        place, _, name = question.answer.rpartition(".")
        try:
            owner = importlib.import_module(place or "builtins")
        except ModuleNotFoundError:
            owner = vars(importlib.import_module("builtins"))[place]
        assert first_line(getattr(owner, name)) == question.question.removeprefix("Which function does this: ")


@pytest.mark.parametrize(
    "expression",
    [
        "__import__('os')",
        "().__class__",
        "open('x')",
        "9 ** 9",
        "10 ** 8",
        "[x for x in [1]]",
        "lambda: 1",
        "1_000_000",
    ],
)
def test_nothing_but_our_own_expressions_is_evaluated(expression):
    with pytest.raises(ValueError, match="is not evaluated"):
        evaluate_expression(expression)


def test_more_expressions_than_there_are_is_an_error(monkeypatch):
    monkeypatch.setitem(module.MAKERS, "comparison", lambda draw: f"{draw.randint(0, 9)} < 5")
    with pytest.raises(ValueError, match="not 100 different comparison expressions; 10 were found"):
        python_questions(400)


def test_further_expressions_are_of_the_same_kinds_and_none_is_known(questions):
    known = {question.question for question in questions}
    further = further_expressions(1000, seed=0, is_known=known.__contains__)
    assert further == further_expressions(1000, seed=0, is_known=known.__contains__)
    assert len({question.question for question in further} - known) == len(further) == 1000
    counts = Counter(question.kind for question in further)
    assert counts == {"arithmetic": 250, "string": 200, "list": 350, "comparison": 200}
    for question in further:
        assert question.answer == repr(eval(question.question.removeprefix("What does Python print for ")))


def test_of_a_kind_that_is_used_up_there_are_no_further_ones(monkeypatch):
    monkeypatch.setitem(module.MAKERS, "string", lambda draw: f"'{draw.choice('abc')}' * 2")
    further = further_expressions(100, seed=0, is_known=lambda question: "'a'" in question)
    assert sorted(question.answer for question in further if question.kind == "string") == ["'bb'", "'cc'"]
    assert len(further) == 80 + 2


def test_in_other_words_an_expression_has_the_same_answer_and_other_questions_are_as_they_were(questions):
    draw, wordings, num_quoted = random.Random(0), Counter(), 0
    for question in questions:
        reworded = reword(question.question, draw)
        if not question.question.startswith(ASKING):
            assert reworded == question.question
            continue
        frames = [wording.split("{}") for wording in WORDINGS if wording != "{}"]
        fitting = [frame for frame in frames if reworded.startswith(frame[0]) and reworded.endswith(frame[1])]
        [(before, after)] = fitting or [("", "")]
        expression = reworded.removeprefix(before).removesuffix(after)
        assert evaluate_expression(expression) == question.answer
        wordings[f"{before}{{}}{after}"] += 1
        num_quoted += '"' in expression
    assert wordings.keys() == WORDINGS.keys() and num_quoted > 20
    assert wordings.most_common(1)[0][0] == f"{ASKING}{{}}"
