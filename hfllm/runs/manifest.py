"""The manifest of a folder that is whole or absent: size and sha256 of each file, written last."""

import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .files import flush, sha256_of


MANIFEST = "manifest.json"
FORMAT_VERSION = 1


def describe_file(path: Path) -> dict[str, Any]:
    """The manifest's entry of a file."""
    return {"num_bytes": path.stat().st_size, "sha256": sha256_of(path)}


def write_manifest(folder: str | Path, *, written: Mapping[str, dict[str, Any]] | None = None, **others: Any) -> None:
    """List every file below `folder` in its manifest, and have the system write all of them to the disk.

    `written` are the entries of files that other processes wrote, flushed and described; each must be there in its
    size, and is not read again. `others` are further entries of the manifest, for people.
    """
    folder = Path(folder)
    files = dict(written or {})
    for name, entry in files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != entry["num_bytes"]:
            raise OSError(
                f"{name}, which another process wrote, {'is not to be seen here' if size is None else 'is cut'}"
            )
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST):
        name = path.relative_to(folder).as_posix()
        if name not in files:
            flush(path)
            files[name] = describe_file(path)
    manifest = {"format_version": FORMAT_VERSION, "files": files, **others}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    flush(folder / MANIFEST)
    for path in [*(path for path in folder.rglob("*") if path.is_dir()), folder]:
        flush(path)


def listed_files(folder: str | Path) -> list[str]:
    """The names in a folder's manifest; empty if it cannot be read, which `find_fault` explains."""
    try:
        return list(json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def find_fault(
    folder: str | Path, *, required: Iterable[str] = (), verify: bool = True, part: tuple[int, int] = (0, 1)
) -> str | None:
    """The first problem of the files that the folder's manifest lists, or None; reads every byte of them.

    The manifest must list those `required`. `verify=False` skips the sha256, and checks names and sizes only. With
    `part=(i, n)` the sha256 of every n-th file from the i-th is checked: n processes share the reading.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version = int(manifest["format_version"])
        names = dict.fromkeys([*required, *manifest["files"]])
        expected = {name: (manifest["files"][name]["num_bytes"], manifest["files"][name]["sha256"]) for name in names}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{folder} was written by a newer hfllm (format {version}; this one knows {FORMAT_VERSION}). Update hfllm."
        )
    for number, (name, (num_bytes, digest)) in enumerate(expected.items()):
        if not (folder / name).is_file():
            return f"{name} is missing"
        if (size := (folder / name).stat().st_size) != num_bytes:
            return f"{name} has {size:,} bytes instead of {num_bytes:,}"
        if verify and number % part[1] == part[0] and sha256_of(folder / name) != digest:
            return f"{name} has changed since it was written (its sha256 differs)"
    return None


def set_aside(folder: Path) -> Path:
    """Rename the folder to `broken-<its name>`, with a number at its end if that exists; returns its new path."""
    for number in itertools.count(1):
        aside = folder.with_name(f"broken-{folder.name}" + (f"-{number}" if number > 1 else ""))
        if not aside.exists():
            break
    return folder.rename(aside)
