"""The files, folders or tables that a dataset's name means, and their records."""

import contextlib
import difflib
import glob
import hashlib
import logging
import os
import re
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import datasets

from .arrow_files import batch_records
from .formats import COMPRESSIONS, READ, SUFFIXES, format_of, refusal
from .readers import read_file
from .records import ReadOptions, Record, header_problem


logger = logging.getLogger(__name__)

# Not the library itself: its tests, other people's packages, and the record of how this machine's Python was built.
STDLIB_LEAVES_OUT = re.compile(r"tests?|idle_test|site-packages|dist-packages|__pycache__|config-.*|_sysconfigdata.*")
RUN_FILE = "arguments.yaml"  # a folder with this file was written by a recipe, and is not read as text
ROWS_FILE, PLAN_FILE = "rows.json", "preparing.json"  # in a folder of prepared rows, see `prepared`
OTHER_NUMBERS = ("before",)  # "eval_loss_before" is a number of its own, and no text's named before.jsonl
SAVED_TO_DISK = ("state.json", "dataset_info.json")  # beside the tables of Dataset.save_to_disk

Row = TypeVar("Row")
Part = tuple[str, Callable[[], Iterator[Record]]]  # a file or a dataset: its name and what reads it


@dataclass(frozen=True)
class Source:
    """Where records come from: the files or the dataset, what identifies them, and what was found on the way."""

    parts: list[Part]
    identify: Callable[[], list[tuple[str, str]]]  # names, and hashes of what is in them
    account: dict[str, object]

    @property
    def records(self) -> Iterator[Record]:
        return (record for _, read in self.parts for record in read())


def find_source(
    dataset: str,
    *,
    dataset_config: str | None,
    split: str,
    options: ReadOptions,
    exclude: Iterable[str | os.PathLike] = (),
    read: Callable[[Path, ReadOptions], Iterator[Record]] = read_file,
) -> Source:
    """What `dataset` names: `stdlib`, else the local files of that name, else the dataset on the Hub."""
    paths = local_paths(dataset, dataset_config=dataset_config, split=split)
    if paths is None:
        return _hub_source(dataset, dataset_config, split=split, options=options)
    if not paths:
        return _stdlib_source()
    files, ignored = files_below(paths, exclude=exclude)
    parts: list[Part] = [(str(path), partial(read, path, options)) for path in files]
    account = {"files": len(files), "ignored_files": ignored}
    return Source(parts, lambda: [(str(path), _sha256(path)) for path in files], account)


def is_local(dataset: str) -> bool:
    """Whether a dataset's name means `stdlib` or local files, and not a dataset on the Hub."""
    return dataset == "stdlib" or bool(_local_paths(dataset))


def named_datasets(dataset: str) -> dict[str, str]:
    """Several datasets separated by commas, each by a short name of its own."""
    return by_short_names(_names_in(dataset))


def load_sides(side: str, dataset: str | None, load: Callable[[str], list[Row]]) -> dict[str, list[Row]]:
    """The rows of the datasets given for a side such as "eval", and of each of several as a side of its own.

    Those of "texts/fr.jsonl,uk.jsonl" are the sides "eval", "eval_fr" and "eval_uk"; without a dataset there are none.
    """
    if dataset is None:
        return {}
    loaded = {name: load(part) for name, part in named_datasets(dataset).items()}
    sides = {f"{side}_{name}": rows for name, rows in loaded.items()} if len(loaded) > 1 else {}
    return {side: [row for rows in loaded.values() for row in rows], **sides}


def by_short_names(names: Iterable[str]) -> dict[str, str]:
    """Short names of files and datasets, for the names of numbers: `fr` for texts/fr.txt.gz."""
    named: dict[str, str] = {}
    for name in dict.fromkeys(names):
        stem = Path(name).name
        while Path(stem).suffix.lower() in (*COMPRESSIONS, *SUFFIXES):
            stem = Path(stem).stem
        short = re.sub(r"\W+", "_", stem).strip("_") or "text"
        number = 2
        unique = short
        while unique in named or unique in OTHER_NUMBERS:
            unique, number = f"{short}_{number}", number + 1
        named[unique] = name
    return named


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
    """The files and folders that `dataset` names; none if it can only be an id on the Hub.

    A file of exactly that name takes precedence over commas and wildcards.
    """
    names = _names_in(dataset)
    paths: list[Path] = []
    missing: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        if _exists(name):
            paths.append(path)
        elif glob.has_magic(name):
            paths += _matches(path)
        else:
            missing.append(path)
    if not missing:
        return paths
    path = missing[0]
    looks_local = format_of(path) in SUFFIXES or path.suffix.lower() in COMPRESSIONS or dataset.count("/") > 1
    if looks_local or dataset.startswith((".", "~")) or path.is_absolute() or len(names) > 1 or path.is_symlink():
        broken = f" It is a link to {str(path.readlink())!r}, which is not there." if path.is_symlink() else ""
        raise FileNotFoundError(f"There is no file or folder {str(path)!r}.{broken or _nearest_names(path)}")
    return []


def _names_in(dataset: str) -> list[str]:
    """What stands between the commas of a dataset's name, unless it is the name of a file."""
    names = [dataset] if _exists(dataset) else [name.strip() for name in dataset.split(",") if name.strip()]
    if not names:
        raise ValueError(f"The dataset {dataset!r} has no name. Give a file, a folder, an id on the Hub, or 'stdlib'.")
    return names


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))  # noqa: PTH110, PTH111  # false for names too long to be a path


def _matches(pattern: Path) -> list[Path]:
    """The files that match a pattern such as texts/*.txt or texts/**/*.md."""
    found = sorted(map(Path, glob.glob(str(pattern), recursive=True)), key=lambda path: path.parts)  # noqa: PTH207
    read = [path for path in found if path.is_dir() or format_of(path) in SUFFIXES]
    if not read:
        there = f"{len(found):,} files of other formats" if found else "nothing"
        raise FileNotFoundError(f"{str(pattern)!r} matches no file that can be read, but {there}; read are {READ}.")
    _tell_ignored([pattern], Counter(_kind(path) for path in found if path not in read))
    return read


def _nearest_names(path: Path) -> str:
    if not path.parent.is_dir():
        return f" There is no folder {str(path.parent)!r} either."
    names = [other.name for other in path.parent.iterdir()]
    nearest = [str(path.parent / name) for name in difflib.get_close_matches(path.name, names, n=3)]
    return f" Nearest: {', '.join(nearest)}." if nearest else f" No name in {str(path.parent)!r} is similar."


def files_below(
    paths: Sequence[Path], *, exclude: Iterable[str | os.PathLike] = ()
) -> tuple[list[Path], dict[str, int]]:
    """The files to read, and how many files of each kind are not read.

    A file that is named itself may have no ending: it is text. In a folder, files of the known endings are read, and
    links are followed once. Other files, files that are named again, links to what is read already or to nothing, and
    folders of runs (those in `exclude`, and those that a recipe wrote) and of prepared rows are left out and reported.
    """
    excluded = {Path(path).expanduser().resolve() for path in exclude}
    files: list[Path] = []
    ignored: Counter[str] = Counter()
    for path in paths:
        if not path.is_dir():
            if format_of(path) not in ("", *SUFFIXES):
                what = refusal(path)
                raise ValueError(
                    f"{str(path)!r}: {what}."
                    if what
                    else f"{str(path)!r} ends in {path.suffix}; read are {READ}. Rename plain text to .txt."
                )
            if not path.is_file():
                raise ValueError(
                    f"{str(path)!r} is a pipe or a device, and files are read more than once. Write what it gives into "
                    "a file, and name that."
                )
            files.append(path)
        elif path.resolve() in excluded:
            raise ValueError(f"The dataset {str(path)!r} is the folder that is written to. Name another folder there.")
        elif _is_prepared(path):
            raise ValueError(
                f"The dataset {str(path)!r} holds prepared rows, and text is wanted here. Only pretraining without "
                "streaming reads rows, and from one folder."
            )
        else:
            files += _files_of(path, excluded, ignored)
    if not files:
        there = ", ".join(f"{count:,} {kind}" for kind, count in ignored.most_common()) or "nothing"
        names = ", ".join(map(str, paths))
        raise ValueError(f"There is no file to read below {names}; what is there: {there}. Read are {READ}.")
    once = {path.resolve(): path for path in reversed(files)}  # by its first name
    if named_again := len(files) - len(once):
        ignored["files that are named already"] += named_again
        files = list(reversed(once.values()))
    _tell_ignored(paths, ignored)
    return files, dict(ignored)


def _tell_ignored(paths: Sequence[Path], ignored: Counter[str]) -> None:
    if others := ", ".join(f"{count:,} {kind}" for kind, count in ignored.most_common() if kind != "hidden"):
        logger.warning("Not read of %s: %s; read are %s.", ", ".join(map(str, paths)), others, READ)


def _kind(path: Path) -> str:
    return path.suffix.lower() or "no suffix"


def _files_of(folder: Path, excluded: set[Path], ignored: Counter[str]) -> list[Path]:
    """The files to read of a folder, in sorted order."""
    files: list[Path] = []
    links: list[Path] = []  # to files
    folders, seen = [folder], set(folder.resolve().parents)  # a link to a folder above leads back to this one
    while folders:  # the folder itself, then those that links lead to
        top = folders.pop(0)
        for root, names, file_names in os.walk(top, onerror=lambda error: _note_unreadable(error, ignored)):
            here, real = Path(root), Path(root).resolve()
            if real in seen:
                ignored["links to folders that are read already"] += 1
                names.clear()
                continue
            seen.add(real)
            if "dataset_dict.json" in file_names:
                raise ValueError(
                    f"{root!r} was written by DatasetDict.save_to_disk: name one of {sorted(names)} in it."
                )
            is_saved = set(SAVED_TO_DISK) <= set(file_names)
            for name in file_names:
                path = here / name
                if name.startswith("."):
                    ignored["hidden"] += 1
                elif not path.is_file():
                    ignored["links to nothing" if path.is_symlink() else "no files"] += 1
                elif format_of(path) not in SUFFIXES:
                    ignored[_kind(path)] += 1
                elif not (is_saved and name in SAVED_TO_DISK):
                    (links if path.is_symlink() else files).append(path)
            for name in sorted(names):
                path = here / name
                if name.startswith("."):
                    ignored["hidden"] += 1
                elif path.resolve() in excluded or (path / RUN_FILE).exists():
                    ignored[f"folder {str(path)!r}, which a run writes"] += 1
                elif _is_prepared(path):
                    ignored[f"folder {str(path)!r}, of prepared rows"] += 1
                elif path.is_symlink():
                    folders.append(path)
                else:
                    continue
                names.remove(name)
    targets = {path.parent.resolve() / path.name for path in files}
    for path in sorted(links, key=lambda path: path.parts):
        if path.resolve() in targets:
            ignored["links to files that are read already"] += 1
        else:
            targets.add(path.resolve())
            files.append(path)
    return sorted(files, key=lambda path: path.parts)


def _is_prepared(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (ROWS_FILE, PLAN_FILE))


def _note_unreadable(error: OSError, ignored: Counter[str]) -> None:
    ignored[f"folder {str(error.filename)!r}, which cannot be opened"] += 1


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stdlib_source() -> Source:
    root, files = stdlib_files()
    parts: list[Part] = [(path.relative_to(root).as_posix(), partial(_python_records, root, path)) for path in files]

    def identify() -> list[tuple[str, str]]:
        return [(path.relative_to(root).as_posix(), _sha256(path)) for path in files]

    return Source(parts, identify, {"files": len(files)})


def _python_records(root: Path, path: Path) -> Iterator[Record]:
    yield python_file(root, path)


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


def _hub_source(dataset: str, dataset_config: str | None, *, split: str, options: ReadOptions) -> Source:
    table = hub_table(dataset, dataset_config, split)
    if problem := header_problem(dataset, table.column_names, options):
        raise ValueError(f"{dataset!r}: {problem.problem}.")
    # `datasets` derives the fingerprint from the id, the revision and the files of what it downloaded.
    part: Part = (dataset, partial(_hub_records, table, dataset, options))
    return Source([part], lambda: [(dataset, table._fingerprint)], {})


def hub_table(dataset: str, dataset_config: str | None, split: str) -> datasets.Dataset:
    """A split of a dataset on the Hub, as `load_dataset` gives it; a download is announced."""
    with hub_errors_explained(dataset, dataset_config, split):
        builder = datasets.load_dataset_builder(dataset, dataset_config)
        if not os.path.exists(builder.cache_dir):  # noqa: PTH110
            logger.warning("Downloading the dataset %r from the Hub, revision %s.", dataset, revision_of(builder))
        builder.download_and_prepare()
        return builder.as_dataset(split=split)


def revision_of(builder: datasets.DatasetBuilder) -> str:
    match = re.search(r"@([0-9a-f]{40})", str(builder.base_path))
    return match[1] if match else str(builder.hash)


def hub_class_names(features: datasets.Features | None) -> dict[str, list[str]]:
    """The names of each column's classes, alone or in lists, by which its numbers are read."""
    names = {}
    for name, feature in (features or {}).items():
        while isinstance(feature, datasets.List | datasets.LargeList):
            feature = feature.feature
        if isinstance(feature, datasets.ClassLabel):
            names[name] = feature.names
    return names


@contextlib.contextmanager
def hub_errors_explained(dataset: str, dataset_config: str | None, split: str) -> Iterator[None]:
    """Turn the errors of `datasets` about a dataset that it cannot find or load into messages with the next step."""
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


def _hub_records(table: datasets.Dataset, dataset: str, options: ReadOptions) -> Iterator[Record]:
    read = [name for name in table.column_names if options.only is None or name in options.only]
    unread = tuple(name for name in table.column_names if name not in read)
    names = hub_class_names(table.features)
    names = {name: names[name] for name in read if name in names}
    row = 1
    for batch in table.select_columns(read).with_format("arrow").iter(batch_size=64):
        yield from batch_records(dataset, batch, first_row=row, class_names=names, unread=unread)
        row += len(batch)
