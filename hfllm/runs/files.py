"""Files that are whole or absent: written beside their final place, flushed to the disk, and renamed."""

import contextlib
import hashlib
import json
import math
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically: a reader finds the old text or the new one, never a part."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any, *, indent: int | None = 2) -> None:
    """Write a JSON file atomically; it holds no NaN, so other programs can read it.

    Raises:
        FloatingPointError: a number in it is not finite; names the first one.
    """
    if name := find_non_finite(content):
        raise FloatingPointError(
            f"{Path(path).name} was not written: {name} is not a finite number. Training has diverged; try a lower "
            "learning_rate."
        )
    write_text(path, json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write a file to; it takes the place of `path` when the block ends without an error."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # processes on two hosts may have the same id
    try:
        yield beside
        flush(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    flush(path.parent)


def open_output_dir(output_dir: str | Path) -> Path:
    """The folder, made if it is not there, and found writable before hours of work go into what it is to hold.

    Raises:
        ValueError: no folder is named, or a file.
        OSError: nothing can be written there.
    """
    path = named_folder(output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"x")
    except OSError as error:
        raise OSError(f"The output folder {path} cannot be used: {error}. Choose another output_dir.") from error
    return path


def named_folder(output_dir: str | Path) -> Path:
    """The path of a folder that may be made; a ValueError if none is named, or a file."""
    if not str(output_dir).strip():
        raise ValueError("output_dir is empty. Give the path of a folder, for example out/my-run.")
    path = Path(output_dir).expanduser()
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir {path} is a file. Give the path of a folder, for example out/my-run.")
    return path


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files of `replacing` whose process was killed; no other process may be writing there."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.[0-9a-f]{32}\.tmp", path.name):
            path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk before we continue."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: str | Path) -> str:
    """The sha256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_non_finite(content: Any, name: str = "") -> str:
    """The place of the first number in JSON content that is NaN or infinite, e.g. `test.loss`; empty if there is none.

    `name` is the place of `content` itself.
    """
    if isinstance(content, float) and not math.isfinite(content):
        return name or "the number"
    if isinstance(content, dict):
        parts = ((f"{name}.{key}" if name else str(key), value) for key, value in content.items())
    elif isinstance(content, list | tuple):
        parts = ((f"{name}[{index}]", value) for index, value in enumerate(content))
    else:
        return ""
    return next((found for place, value in parts if (found := find_non_finite(value, place))), "")
