"""Dataset name -> the files, folders or tables that it stands for, and their records."""

import contextlib
import difflib
import hashlib
import logging
import os
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets

from .readers import SUFFIXES, Record, column_records, lacking, read_records


logger = logging.getLogger(__name__)

# Not the library itself: its tests, other people's packages, and the record of how this machine's Python was built.
STDLIB_LEAVES_OUT = re.compile(r"tests?|idle_test|site-packages|dist-packages|__pycache__|config-.*|_sysconfigdata.*")


@dataclass(frozen=True)
class Source:
    """Where documents come from: their records, what identifies them, and what was found on the way."""

    records: Iterable[Record]
    contents: list[tuple[str, str]]  # names, and hashes of what is in them
    account: dict[str, object]


def find_source(dataset: str, *, dataset_config: str | None, split: str, text_column: str) -> Source:
    """What `dataset` stands for: `stdlib`, else the local files of that name, else the dataset on the Hub."""
    paths = local_paths(dataset, dataset_config=dataset_config, split=split)
    if paths is None:
        return _hub_source(dataset, dataset_config, split=split, text_column=text_column)
    return _file_source(paths, text_column) if paths else _stdlib_source()


def local_paths(dataset: str, *, dataset_config: str | None, split: str) -> list[Path] | None:
    """The files and folders that `dataset` names, none of them for `stdlib`; or None if it is a dataset on the Hub."""
    paths = [] if dataset == "stdlib" else _local_paths(dataset)
    if dataset != "stdlib" and not paths:
        return None
    if dataset_config is not None or split != "train":
        raise ValueError(
            f"dataset_config={dataset_config!r}, split={split!r}: only datasets on the Hub have these; "
            f"{dataset!r} is local. Name the files to read instead."
        )
    return paths


def _local_paths(dataset: str) -> list[Path]:
    """The files and folders that `dataset` names; none if it can only be an id on the Hub."""
    if not dataset.strip():
        raise ValueError("The dataset has no name. Give a file, a folder, an id on the Hub, or 'stdlib'.")
    if Path(dataset).expanduser().exists():
        return [Path(dataset).expanduser()]
    paths = [Path(name.strip()).expanduser() for name in dataset.split(",") if name.strip()]
    missing = [path for path in paths if not path.exists()]
    if not missing:
        return paths
    path = missing[0]
    looks_local = path.suffix.lower() in SUFFIXES or dataset.startswith((".", "~")) or dataset.count("/") > 1
    if looks_local or path.is_absolute() or len(paths) > 1:
        raise FileNotFoundError(f"There is no file or folder {str(path)!r}.{_nearest_names(path)}")
    return []


def _nearest_names(path: Path) -> str:
    if not path.parent.is_dir():
        return f" Nor is there a folder {str(path.parent)!r}."
    names = [other.name for other in path.parent.iterdir()]
    nearest = [str(path.parent / name) for name in difflib.get_close_matches(path.name, names, n=3)]
    return f" Nearest: {', '.join(nearest)}." if nearest else f" {str(path.parent)!r} has {len(names):,} other entries."


def _file_source(paths: list[Path], text_column: str) -> Source:
    files, ignored = files_below(paths)
    records = (record for path in files for record in read_records(path, text_column))
    contents = [(str(path), _sha256(path)) for path in files]
    return Source(records, contents, {"files": len(files), "ignored_files": ignored})


def files_below(paths: list[Path]) -> tuple[list[Path], dict[str, int]]:
    """The files to read, and how many files of a folder are not read, by suffix."""
    files: list[Path] = []
    ignored: Counter[str] = Counter()
    for path in paths:
        if path.is_file():
            if path.suffix.lower() not in SUFFIXES:
                raise ValueError(f"{str(path)!r} is none of {', '.join(SUFFIXES)}. Rename plain text to .txt.")
            files.append(path)
            continue
        if (path / "state.json").exists() and (path / "dataset_info.json").exists():
            raise ValueError(f"{str(path)!r} was written by save_to_disk: give it as Parquet (Dataset.to_parquet).")
        found = sorted((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.parts)
        for file in found:
            if any(part.startswith(".") for part in file.relative_to(path).parts):
                ignored["hidden"] += 1
            elif file.suffix.lower() not in SUFFIXES:
                ignored[file.suffix.lower() or "no suffix"] += 1
            else:
                files.append(file)
    if not files:
        there = ", ".join(f"{count:,} {suffix}" for suffix, count in ignored.most_common()) or "nothing"
        names = ", ".join(map(str, paths))
        raise ValueError(f"There is no {', '.join(SUFFIXES)} file below {names}; what is there: {there}.")
    if others := ", ".join(f"{count:,} {suffix}" for suffix, count in ignored.most_common() if suffix != "hidden"):
        logger.warning("Not read of %s: %s; read are %s.", ", ".join(map(str, paths)), others, ", ".join(SUFFIXES))
    return files, dict(ignored)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stdlib_source() -> Source:
    root, files = stdlib_files()
    contents = [(path.relative_to(root).as_posix(), _sha256(path)) for path in files]
    return Source((python_file(root, path) for path in files), contents, {"files": len(files)})


def stdlib_files() -> tuple[Path, list[Path]]:
    """The standard library's folder and its Python files without the tests, in sorted order."""
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not STDLIB_LEAVES_OUT.fullmatch(name)]
        modules = [name for name in names if name.endswith(".py") and not STDLIB_LEAVES_OUT.fullmatch(name)]
        files.extend(Path(folder, name) for name in modules)
    files.sort(key=lambda path: path.relative_to(root).parts)
    if not files:
        raise FileNotFoundError(f"This Python has no source files of its standard library in {str(root)!r}.")
    return root, files


def python_file(root: Path, path: Path) -> Record:
    """A Python file as a document, decoded as the file itself declares."""
    place = path.relative_to(root).as_posix()
    try:
        with path.open("rb") as file:
            encoding, _ = tokenize.detect_encoding(file.readline)
        return Record(place, text=(path.read_bytes().decode(encoding),))
    except (SyntaxError, UnicodeDecodeError) as error:
        return Record(place, problem=f"cannot be decoded: {error}")


def _hub_source(dataset: str, dataset_config: str | None, *, split: str, text_column: str) -> Source:
    with hub_errors_explained(dataset, dataset_config, split):
        table = datasets.load_dataset(dataset, dataset_config, split=split)
    if text_column not in table.column_names:
        raise ValueError(f"{dataset!r}: {lacking(text_column, table.column_names)}. Name one with text_column.")
    # `datasets` derives the fingerprint from the id, the revision and the files of what it downloaded.
    return Source(_hub_records(table, dataset, text_column), [(dataset, table._fingerprint)], {})


@contextlib.contextmanager
def hub_errors_explained(dataset: str, dataset_config: str | None, split: str) -> Iterator[None]:
    """What `datasets` raises when it cannot find or load a dataset, with the next step."""
    try:
        yield
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"{dataset!r} is neither a file or folder here nor a dataset that the Hub gives: {error}. Check the name; "
            "without a connection, give local files, a dataset downloaded before, or 'stdlib'."
        ) from error
    except ValueError as error:
        given = f"dataset_config={dataset_config!r}, split={split!r}"
        raise ValueError(f"{dataset!r} cannot be loaded with {given}: {error}") from error


def _hub_records(table: datasets.Dataset, dataset: str, text_column: str) -> Iterator[Record]:
    row = 1
    for batch in table.select_columns([text_column]).with_format("arrow").iter(batch_size=64):
        yield from column_records(dataset, batch.column(0), text_column, first_row=row)
        row += len(batch)
