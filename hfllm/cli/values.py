"""The text and the paths that options hold."""

import re
from pathlib import Path

from .options import Location


def check_text(text: str) -> None:
    """Reject characters that no file and no tokenizer accepts: a NUL, and bytes that are not UTF-8.

    Raises:
        ValueError: names the character, and says what to do.
    """
    if "\0" in text:
        raise ValueError("it holds a NUL character, which neither a path nor a text can have. Leave it out.")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{printable(text[error.start])} in it is not UTF-8. Set the terminal to UTF-8, or convert the text, for "
            "example with `iconv -f latin1 -t UTF-8`."
        ) from error


def printable(text: str) -> str:
    r"""The text with every byte that is not UTF-8 written out as \xe9; Python reads it as a lone surrogate."""
    text = re.sub("[\udc80-\udcff]", lambda byte: rf"\x{ord(byte[0]) - 0xDC00:02x}", text)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def resolve_path(path: str, location: Location) -> str:
    """A path as every part of the library takes it: with `~` expanded, and without a slash at its end.

    A value that may also be an id of the Hub, or a name that the recipe knows, changes only if it begins with `~`.

    Raises:
        ValueError: the path is empty, or the user of `~user` is not known.
    """
    if not path.strip():
        raise ValueError("it is empty. Give a path, or leave the option out.")
    if location is Location.READ_OR_NAMED and not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(f"there is no home folder of {path.split('/')[0]}. Give the path without `~`.") from error
