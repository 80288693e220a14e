"""Text from elsewhere (labels, questions, samples, names of files) inside HTML, Markdown and pictures.

Content of a model or a dataset is always shown as text: it cannot become markup, end the block it is in, or be taken
for one of our own marks.
"""

import contextlib
import re
from collections.abc import Iterator
from html import escape
from typing import Any


CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")
# What begins emphasis, code, links, cells and mathematics within a line, and blocks at its start (CommonMark 0.31). An
# underscore between letters begins nothing.
MARKDOWN_MARKS = re.compile(r"([\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])|^>|^(?:#+|[+-]|\d+[.)])(?=\s|$))")


def visible(value: Any) -> str:
    """The text with control characters and halves of surrogate pairs shown as `\\x1b`, `\\ud800`."""
    return CONTROL_CHARACTERS.sub(lambda match: match[0].encode("unicode_escape").decode(), str(value))


def html_text(value: Any) -> str:
    """Text for the body or an attribute of HTML."""
    return escape(visible(value))


def markdown_text(value: Any) -> str:
    """Text for one line of Markdown, a heading or a table's cell."""
    line = " ".join(visible(value).split())
    escaped = MARKDOWN_MARKS.sub(lambda match: f"{match[0][:-1]}\\{match[0][-1]}", line)
    return escaped.replace("&", "&amp;").replace("<", "&lt;")


def markdown_code(value: Any) -> str:
    """Code within a line of Markdown or a table's cell: `` `like this` ``."""
    line = " ".join(visible(value).split()).replace("|", "\\|")
    fence = "`" * (_longest_run_of_backticks(line) + 1)
    space = " " if "`" in line or not line else ""
    return f"{fence}{space}{line}{space}{fence}"


def markdown_block(text: str, language: str = "text") -> str:
    """A block of code that its text cannot end. A line that begins an HTML comment gets a space."""
    lines = [f" {line}" if line.lstrip().startswith("<!--") else line for line in visible(text).split("\n")]
    fence = "`" * max(3, _longest_run_of_backticks(text) + 1)
    return "\n".join([f"{fence}{language}", *lines, fence])


def _longest_run_of_backticks(text: str) -> int:
    return max((len(match) for match in re.findall(r"`+", text)), default=0)


@contextlib.contextmanager
def plain_labels() -> Iterator[None]:
    """While the block lasts, matplotlib draws `$` in titles and labels as text instead of parsing mathematics."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):
        yield
