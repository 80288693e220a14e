"""Questions about the running Python, answered by its interpreter: the offline data of chapter 7.

Three kinds of question have an answer that is right or wrong, character by character: what an expression prints, which
function a docstring describes, and what the first line of a function's docstring is. Expressions are drawn from a seed
and evaluated; functions come from imported modules. Nothing is downloaded, nothing is made up.
"""

import ast
import importlib
import inspect
import platform
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


# Modules whose import only defines names; classes of builtins are there for their methods.
MODULES: list[str] = """
    abc argparse array ast base64 binascii bisect builtins calendar cmath codecs collections collections.abc
    colorsys configparser contextlib copy csv datetime decimal difflib dis email.utils enum fileinput fnmatch
    fractions functools gc getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser http inspect io
    ipaddress itertools json keyword linecache locale logging math mimetypes numbers operator os os.path pathlib
    pickle pickletools pkgutil platform posixpath pprint queue quopri random re reprlib sched secrets selectors
    shlex shutil signal socket sqlite3 stat statistics string struct subprocess symtable sys sysconfig tarfile
    tempfile textwrap threading time timeit token tokenize trace traceback types typing unicodedata unittest
    unittest.mock urllib.parse urllib.request uuid warnings wave weakref xml.dom.minidom xml.etree.ElementTree
    zipfile zlib
""".split()  # noqa: SIM905
TYPES = (str, bytes, bytearray, list, tuple, dict, set, frozenset, int, float, complex, range, slice, memoryview)
LONGEST_LINE = 120  # characters of a question's signature or of a docstring's first line

WORDS: list[str] = """
    apple bread cloud dance earth flame grape house ivory jelly koala lemon mango night ocean piano queen river
    stone tiger uncle voice water xenon youth zebra ant bee cat dog egg fig hat ink jam key
""".split()  # noqa: SIM905

# What an expression may be made of; `evaluate_expression` refuses everything else.
FUNCTIONS: dict[str, Callable] = {f.__name__: f for f in (len, sorted, sum, max, min, abs, list, range, str, bool)}
METHODS = {
    "upper",
    "lower",
    "title",
    "capitalize",
    "swapcase",
    "replace",
    "count",
    "find",
    "startswith",
    "endswith",
    "join",
    "split",
    "zfill",
}
NODES = (
    *(ast.Expression, ast.Constant, ast.List, ast.Tuple, ast.Load, ast.Name, ast.Call, ast.Attribute, ast.Subscript),
    *(ast.Slice, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.UnaryOp, ast.USub, ast.Not),
    *(ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.In, ast.NotIn, ast.BoolOp, ast.And, ast.Or),
)
LARGEST_NUMBER = 10_000
ASKING = "What does Python print for "
# How people ask it. The first is the wording of the questions as they are drawn, and half of all.
WORDINGS = {f"{ASKING}{{}}": 0.5, "{}": 0.2, "What is {}?": 0.2, ">>> {}": 0.1}
DOUBLE_QUOTED = 0.25  # of the expressions with texts
# Of further questions. There are some 7,000 different expressions with strings in all, so they are soon used up.
FURTHER_SHARES = {"arithmetic": 0.25, "string": 0.2, "list": 0.35, "comparison": 0.2}
MISSES_IN_A_ROW = 1000  # repeated draws in a row, after which no others are expected


@dataclass(frozen=True)
class Question:
    kind: str  # "arithmetic", "string", "list", "comparison", "docstring" or "name"
    question: str
    answer: str


def python_questions(num_expressions: int = 12_000, *, seed: int = 0) -> list[Question]:
    """Questions in a random order, no question twice: expressions, docstrings and names of this Python's functions.

    `num_expressions` is a quarter each of arithmetic, strings, lists and comparisons. The number of functions and their
    docstrings depend on the running Python.
    """
    draw = random.Random(seed)
    questions = [*_expression_questions(num_expressions, draw), *_function_questions()]
    draw.shuffle(questions)
    return questions


def describe_questions(questions: list[Question]) -> str:
    counts = Counter(question.kind for question in questions)
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(counts.items()))
    return f"{len(questions):,} questions about Python {platform.python_version()}: {kinds}"


def evaluate_expression(expression: str) -> str:
    """The repr of an expression's value. Only what NODES, FUNCTIONS and METHODS allow is evaluated."""
    tree = ast.parse(expression, mode="eval")
    for node in ast.walk(tree):
        allowed = isinstance(node, NODES)
        if isinstance(node, ast.Name):
            allowed = node.id in FUNCTIONS
        elif isinstance(node, ast.Attribute):
            allowed = node.attr in METHODS
        elif isinstance(node, ast.Constant) and isinstance(node.value, int):
            allowed = abs(node.value) <= LARGEST_NUMBER
        if not allowed:
            raise ValueError(
                f"{expression!r} is not evaluated: it holds {ast.unparse(node)!r} ({type(node).__name__})."
            )
    return repr(eval(compile(tree, "<expression>", "eval"), {"__builtins__": FUNCTIONS}))


def further_expressions(number: int, *, seed: int, is_known: Callable[[str], bool]) -> list[Question]:
    """More questions about expressions, drawn in the same way, none twice and none that `is_known`.

    FURTHER_SHARES divides them among the kinds; a kind that runs out gives fewer.
    """
    draw = random.Random(f"further {seed}")
    questions = []
    for kind, share in FURTHER_SHARES.items():
        wanted = round(number * share)
        seen: set[str] = set()
        num_misses = 0  # in a row
        while len(seen) < wanted and num_misses < MISSES_IN_A_ROW:
            question = _ask(MAKERS[kind](draw))
            num_misses = num_misses + 1 if question in seen or is_known(question) else 0
            if num_misses == 0:
                seen.add(question)
                questions.append(Question(kind, question, evaluate_expression(question.removeprefix(ASKING))))
    draw.shuffle(questions)
    return questions


def reword(question: str, draw: random.Random) -> str:
    """An expression's question in one of WORDINGS, its texts perhaps in double quotes; any other question unchanged.

    The answer stays the same: Python prints a text in single quotes, however it was written.
    """
    if not question.startswith(ASKING):
        return question
    expression = question.removeprefix(ASKING)
    if draw.random() < DOUBLE_QUOTED:
        expression = expression.replace("'", '"')
    [wording] = draw.choices(list(WORDINGS), weights=list(WORDINGS.values()))
    return wording.format(expression)


def _expression_questions(num_expressions: int, draw: random.Random) -> Iterator[Question]:
    for index, (kind, make) in enumerate(MAKERS.items()):
        wanted = (num_expressions + index) // len(MAKERS)
        seen: set[str] = set()
        num_misses = 0  # in a row
        while len(seen) < wanted:
            expression = make(draw)
            num_misses = num_misses + 1 if expression in seen else 0
            if num_misses > MISSES_IN_A_ROW:
                raise ValueError(
                    f"There are not {wanted:,} different {kind} expressions; {len(seen):,} were found. "
                    "Ask for fewer expressions."
                )
            if num_misses == 0:
                seen.add(expression)
                yield Question(kind, _ask(expression), evaluate_expression(expression))


def _ask(expression: str) -> str:
    return f"{ASKING}{expression}"


def _arithmetic(draw: random.Random) -> str:
    operator = draw.choice("++--*%/")
    if operator == "*":
        return f"{draw.randint(2, 20)} * {draw.randint(2, 20)}"
    if operator in "%/":
        return f"{draw.randint(0, 99)} {'//' if operator == '/' else '%'} {draw.randint(2, 12)}"
    return f"{draw.randint(0, 99)} {operator} {draw.randint(0, 99)}"


def _string(draw: random.Random) -> str:
    word, other = draw.sample(WORDS, 2)
    letter = draw.choice(word)
    start = draw.randint(0, len(word) - 1)
    return draw.choice(
        [
            f"'{word}'.{draw.choice(['upper', 'title', 'capitalize'])}()",
            f"len('{word}{other}')",
            f"len('{word}')",
            f"'{word}' + '{other}'",
            f"'{word}' * {draw.randint(2, 3)}",
            f"'{word}'[{start}]",
            f"'{word}'[{-draw.randint(1, len(word))}]",
            f"'{word}'[:{draw.randint(1, len(word))}]",
            f"'{word}'[{start}:]",
            f"'{word}'[::-1]",
            f"'{word}'.{draw.choice(['count', 'find'])}('{letter}')",
            f"'{word}'.replace('{letter}', '{draw.choice('xyz')}')",
            f"'{word} {other}'.split()",
            f"'-'.join(['{word}', '{other}'])",
            f"'{draw.randint(0, 99)}'.zfill({draw.randint(3, 4)})",
        ]
    )


def _list(draw: random.Random) -> str:
    numbers = [draw.randint(0, 20) for _ in range(draw.randint(2, 5))]
    others = [draw.randint(0, 20) for _ in range(draw.randint(1, 2))]
    index = draw.randint(0, len(numbers) - 1)
    return draw.choice(
        [
            f"len({numbers})",
            f"{numbers}[{index}]",
            f"{numbers}[{index - len(numbers)}]",
            f"{numbers}[{index}:]",
            f"{numbers}[:{draw.randint(1, len(numbers))}]",
            f"{numbers}[::-1]",
            f"{numbers} + {others}",
            f"{others} * {draw.randint(2, 3)}",
            f"{draw.choice(['sorted', 'max', 'min'])}({numbers})",
            f"sum({numbers[:3]})",
            f"list(range({draw.randint(0, 20)}, {draw.randint(15, 26)}))[:{draw.randint(2, 4)}]",
        ]
    )


def _comparison(draw: random.Random) -> str:
    word, other = draw.sample(WORDS, 2)
    numbers = [draw.randint(0, 20) for _ in range(draw.randint(2, 4))]
    left, right = draw.randint(0, 99), draw.randint(0, 99)
    operator = draw.choice(["<", ">", "<=", ">=", "==", "!="])
    return draw.choice(
        [
            f"{left} {operator} {right}",
            f"{left} {operator} {draw.choice([left, right])}",
            f"{draw.choice([*numbers, left])} in {numbers}",
            f"'{draw.choice(word + other)}' in '{word}'",
            f"'{word}' {draw.choice(['<', '>'])} '{other}'",
            f"'{word}'.startswith('{draw.choice([word, other])[:2]}')",
            f"'{word}'.endswith('{draw.choice([word, other])[-2:]}')",
            f"not {left} {operator} {right}",
        ]
    )


MAKERS = {"arithmetic": _arithmetic, "string": _string, "list": _list, "comparison": _comparison}


def _function_questions() -> Iterator[Question]:
    """For each function with a docstring what its first line is, and, where only one has that line, which one it is."""
    functions = dict(_functions())
    first_lines = {name: line for name, function in functions.items() if (line := first_line(function))}
    names = {line: [name for name in first_lines if first_lines[name] == line] for line in set(first_lines.values())}
    for name, line in first_lines.items():
        if (call := _call(name, functions[name])) is not None:
            yield Question("docstring", f"What does {call} do", line)
        if names[line] == [name] and name.split(".")[-1] not in line:
            yield Question("name", f"Which function does this: {line}", name)


def _functions() -> Iterator[tuple[str, Any]]:
    """Public functions and methods by the name under which Python finds them, each one once, modules in order."""
    seen: set[int] = set()
    owners: list[tuple[str, Any]] = [(kind.__name__, kind) for kind in TYPES]
    for name in MODULES:
        try:
            owners.append((name, importlib.import_module(name)))
        except ImportError:  # a module that this system's Python was built without
            continue
    for owner_name, owner in owners:
        for name, member in sorted(vars(owner).items()):
            if name.startswith("_") or not inspect.isroutine(member):
                continue
            home = getattr(member, "__module__", None) or owner_name
            if inspect.ismodule(owner) and home not in (owner_name, f"_{owner_name}", "posixpath", "genericpath"):
                continue  # imported from elsewhere
            function = getattr(owner, name)
            if id(member) not in seen:
                seen.add(id(member))
                yield (name if owner_name == "builtins" else f"{owner_name}.{name}"), function


def first_line(function: Any) -> str | None:
    """The first line of the docstring, if it is a sentence that can be asked for."""
    lines = (inspect.getdoc(function) or "").strip().split("\n")
    line = lines[0].strip()
    is_signature = re.match(r"[\w.]+\(.*\)", line) is not None
    return line if 10 <= len(line) <= LONGEST_LINE and line.isascii() and not is_signature else None


def _call(name: str, function: Any) -> str | None:
    try:
        signature = inspect.signature(function)
    except (ValueError, TypeError):  # a C function without a signature
        return None
    if not _is_the_same_everywhere(function, signature):
        return None
    call = f"{name}{signature}"
    return call if len(call) <= LONGEST_LINE and " at 0x" not in call else None


def _is_the_same_everywhere(function: Any, signature: inspect.Signature) -> bool:
    """Whether each default that is a text is also in the function's source, if it has one.

    Other defaults are set when Python starts, such as the interpreter's path in `platform.architecture`. With them, the
    same seed would give other questions in another environment, and train another model.
    """
    texts = [parameter.default for parameter in signature.parameters.values() if isinstance(parameter.default, str)]
    if not texts or not inspect.isfunction(inspect.unwrap(function)):
        return True
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except OSError:
        return False
    return all(repr(text)[1:-1] in source for text in texts)
