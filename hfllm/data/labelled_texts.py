"""Labelled texts: read from files, the Hub or the standard library, checked, split so that no text straddles."""

import ast
import csv
import difflib
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .readers import repeated
from .sources import hub_errors_explained, python_file, stdlib_files


SUFFIXES = (".csv", ".tsv", ".txt", ".jsonl", ".json", ".parquet")

# Which of these packages of the standard library does a docstring come from? Each has a hundred or more of them, and
# every Python from 3.11 on has each.
STDLIB_PACKAGES = (
    *("asyncio", "email", "http", "importlib", "logging"),
    *("mailbox", "multiprocessing", "unittest", "urllib", "xml"),
)

Row = tuple[str, dict[str, Any]]  # its place ("spam.csv, line 3") and its columns


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and their labels as words, in the order in which they were read."""

    texts: list[str]
    labels: list[str]
    num_empty: int = 0  # texts without a visible character, left out
    num_bad: int = 0  # records that on_bad_record="skip" left out

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: Iterable[int]) -> "LabelledTexts":
        rows = list(rows)
        return LabelledTexts([self.texts[row] for row in rows], [self.labels[row] for row in rows])


def load_labelled_texts(
    dataset: str,
    *,
    dataset_config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    label_column: str = "label",
    on_bad_record: str = "error",
) -> LabelledTexts:
    """The labelled texts of a file, several separated by commas, a dataset on the Hub, or `stdlib`.

    Files are .csv, .tsv, .jsonl, .json (a list or lines) and .parquet. A file of lines `label<TAB>text` without a
    header, as the SMS Spam Collection comes, is recognised by its first line; in it a quotation mark is a character
    like any other. `stdlib` asks which package of the standard library a docstring comes from.

    Labels are words or whole numbers; a `ClassLabel` of the Hub is read by its names. A record without a text or label
    is an error with its place, or left out and counted with `on_bad_record="skip"`. Empty texts are left out and
    counted.
    """
    texts, labels = [], []
    num_empty = num_bad = 0
    for place, row in _rows(dataset, dataset_config, split, (text_column, label_column)):
        for option, column in (("text_column", text_column), ("label_column", label_column)):
            if column not in row:
                raise ValueError(f"{place}: {_lacking(option, column, row)}")
        text, label = row[text_column], _label(row[label_column])
        if not isinstance(text, str) or label is None:
            column = text_column if not isinstance(text, str) else label_column
            wanted = "a text" if column == text_column else "a word or a whole number"
            if on_bad_record == "error":
                raise ValueError(
                    f"{place}: its {column!r} is {row[column]!r:.80}, not {wanted}. Mend it, or leave such records out "
                    "with on_bad_record='skip'."
                )
            num_bad += 1
        elif not text.strip():
            num_empty += 1
        else:
            texts.append(text)
            labels.append(label)
    if not texts:
        raise ValueError(
            f"{dataset!r} has no labelled text: {num_empty:,} records have an empty text, {num_bad:,} are bad."
        )
    return LabelledTexts(texts, labels, num_empty, num_bad)


def label_names(labels: Iterable[str]) -> list[str]:
    """The distinct labels in the order of their ids: numbers by their value, words by the alphabet.

    One label alone, or about as many labels as texts, is an error: there would be nothing to tell apart.
    """
    labels = list(labels)
    counts = Counter(labels)
    if len(counts) == 1:
        raise ValueError(
            f"All {len(labels):,} texts have the label {labels[0]!r}: there is nothing to tell apart. Is it the right "
            "label_column?"
        )
    if len(counts) > max(10, len(labels) // 2):
        some = ", ".join(repr(f"{label:.20}") for label in list(counts)[:3])
        raise ValueError(
            f"There are {len(counts):,} different labels for {len(labels):,} texts ({some}, ...), so they cannot be "
            "learned from examples. Is it the right label_column?"
        )
    is_number = all(re.fullmatch(r"-?\d+", label) for label in counts)
    return sorted(counts, key=(lambda label: int(label)) if is_number else None)


def normalized(text: str) -> str:
    """What two texts share that are the same but for case and white space."""
    return " ".join(text.split()).casefold()


def balance_labels(data: LabelledTexts, *, seed: int) -> LabelledTexts:
    """As many texts of each label as the rarest one has, drawn at random, in their old order."""
    labels = np.array(data.labels)
    names, counts = np.unique(labels, return_counts=True)
    generator = np.random.default_rng(seed)
    kept = [generator.permutation(np.flatnonzero(labels == name))[: counts.min()] for name in names]
    return data.select(np.sort(np.concatenate(kept)).tolist())


def split_by_text(
    data: LabelledTexts, *, fractions: Sequence[float] = (0.7, 0.1, 0.2), seed: int = 0
) -> list[LabelledTexts]:
    """The data in parts of these fractions, each with its share of every label; equal texts are in the same part.

    Equal means equal but for case and white space. The sizes are those of the book, `int(fraction * rows)` and the rest
    for the last part that has a fraction, unless a text that occurs several times stands at a cut.
    """
    if min(fractions) < 0 or not math.isclose(sum(fractions), 1.0):
        raise ValueError(f"fractions={tuple(fractions)}: they are at least 0, and sum to 1.")
    groups: dict[str, list[int]] = {}
    for row, text in enumerate(data.texts):
        groups.setdefault(normalized(text), []).append(row)
    order = np.random.default_rng(seed).permutation(len(groups))
    shuffled = [list(groups.values())[index] for index in order]

    # Each group gets a place between 0 and 1 within its label. In the order of these places every stretch holds each
    # label in its share.
    totals = Counter(data.labels[group[0]] for group in shuffled)
    seen: Counter[str] = Counter()
    places = []
    for group in shuffled:
        label = data.labels[group[0]]
        places.append((seen[label] + 0.5) / totals[label])
        seen[label] += 1
    parts: list[list[int]] = [[] for _ in fractions]
    sizes = [int(fraction * len(data)) for fraction in fractions]
    last = max(part for part, fraction in enumerate(fractions) if fraction > 0)
    part = 0
    for index in np.argsort(places, kind="stable"):
        while part < last and len(parts[part]) >= sizes[part]:
            part += 1
        parts[part] += shuffled[index]
    return [data.select(rows) for rows in parts]


def check_labels_known(names: Sequence[str], **parts: LabelledTexts) -> None:
    """A part (`validation=...`, `test=...`) with labels that the training texts lack is an error."""
    for part, data in parts.items():
        if unknown := Counter(label for label in data.labels if label not in set(names)):
            listing = ", ".join(f"{label!r} ({count:,} texts)" for label, count in unknown.most_common(5))
            raise ValueError(
                f"The {part} texts have labels that no training text has: {listing}. Those trained on are "
                f"{list(names)}. Mend the labels, or leave the given {part} texts out, and a part of the training "
                "texts is held back instead."
            )


def describe_labelled_texts(
    train: LabelledTexts, validation: LabelledTexts, test: LabelledTexts, names: Sequence[str]
) -> str:
    """What is there, before anything is trained: how many, of which labels, and what is odd about them."""
    parts = (train, validation, test)
    counts = Counter(train.labels)
    common, most = counts.most_common(1)[0]
    listing = ", ".join(f"{name} {counts[name]:,}" for name in names[:12])
    more = f" and {len(names) - 12:,} more" if len(names) > 12 else ""
    by_text: dict[str, set[str]] = {}
    for part in parts:
        for text, label in zip(part.texts, part.labels):
            by_text.setdefault(normalized(text), set()).add(label)
    num_texts = sum(map(len, parts))
    lines = [
        f"Texts: {len(train):,} to train on, {len(validation):,} to validate on, {len(test):,} to test on.",
        f"Labels: {len(names):,}; in training {listing}{more}. Always saying {common!r} is right on "
        f"{most / len(train):.1%} of them.",
    ]
    if num_repeated := num_texts - len(by_text):
        lines.append(f"Repeated texts: {num_repeated:,} occur elsewhere but for case and white space.")
    if num_conflicts := sum(len(labels) > 1 for labels in by_text.values()):
        lines.append(f"Conflicts: {num_conflicts:,} texts occur with more than one label.")
    trained_on = {normalized(text) for text in train.texts}
    for name, part in (("validation", validation), ("test", test)):
        if num_leaks := sum(normalized(text) in trained_on for text in part.texts):
            lines.append(f"Warning: {num_leaks:,} {name} texts are training texts too, so their numbers flatter.")
    if rare := [name for name in names if counts[name] < 5]:
        lines.append(f"Warning: fewer than five training texts of {', '.join(rare[:10])}.")
    for number, what in ((train.num_empty, "empty texts"), (train.num_bad, "bad records")):
        if number:
            lines.append(f"Left out: {number:,} {what}.")
    return "\n".join(lines)


def _rows(dataset: str, dataset_config: str | None, split: str, wanted: tuple[str, str]) -> Iterator[Row]:
    if dataset == "stdlib":
        return _stdlib_rows()
    paths = [Path(dataset)] if Path(dataset).exists() else [Path(name.strip()) for name in dataset.split(",")]
    paths = [path.expanduser() for path in paths]
    missing = [path for path in paths if not path.is_file()]
    if len(missing) == len(paths) == 1 and not _looks_local(dataset):
        return _hub_rows(dataset, dataset_config, split)
    if missing:
        near = [p.name for p in missing[0].parent.iterdir()] if missing[0].parent.is_dir() else []
        nearest = difflib.get_close_matches(missing[0].name, near, n=3)
        hint = f" Nearest: {', '.join(nearest)}." if nearest else ""
        what = "is a folder" if missing[0].is_dir() else "is not there"
        raise FileNotFoundError(f"{str(missing[0])!r} {what}; give a file ({', '.join(SUFFIXES)}).{hint}")
    if dataset_config is not None or split != "train":
        raise ValueError(
            f"dataset_config={dataset_config!r}, split={split!r}: only datasets on the Hub have these; {dataset!r} is "
            "local. Give the files of each part."
        )
    return (row for path in paths for row in _file_rows(path, wanted))


def _looks_local(name: str) -> bool:
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or Path(name).suffix.lower() in SUFFIXES


def _file_rows(path: Path, wanted: tuple[str, str]) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_rows(path)
    if suffix in (".jsonl", ".json"):
        return _json_rows(path)
    if suffix == ".csv":
        return _separated_rows(path, ",")
    text = _read(path)
    first = text.partition("\n")[0].rstrip("\r").split("\t")
    if len(first) == 2 and not set(first) & set(wanted):
        return _headerless_rows(path, text, wanted)
    if len(first) < 2:
        raise ValueError(
            f"{str(path)!r}: its first line has no tab. Give a .csv, .jsonl, .json or .parquet file with columns, or "
            "lines of the form label<TAB>text."
        )
    return _separated_rows(path, "\t")


def _headerless_rows(path: Path, text: str, wanted: tuple[str, str]) -> Iterator[Row]:
    """Lines `label<TAB>text`. pandas' default, by which the book reads them, takes a quotation mark at the text's start
    for a quoted field, and joins lines up to the next one."""
    text_column, label_column = wanted
    lines = text.replace("\r\n", "\n").split("\n")
    counts = Counter(line.partition("\t")[0] for line in lines)
    first_label, _, first_text = lines[0].partition("\t")
    if counts[first_label] == 1 and len(lines) > 3:
        raise ValueError(
            f"{path}, line 1: no other line begins with {first_label!r}. If this is a header, name its columns, "
            f"{first_label!r} and {first_text!r:.60}, with text_column and label_column."
        )
    for number, line in enumerate(lines, start=1):
        label, tab, content = line.partition("\t")
        if tab:
            yield f"{path}, line {number:,}", {text_column: content, label_column: label}
        elif line.strip():
            raise ValueError(f"{path}, line {number:,}: {line!r:.80} has no tab, where label<TAB>text is expected.")


def _separated_rows(path: Path, delimiter: str) -> Iterator[Row]:
    limit = csv.field_size_limit(2**31 - 1)  # its default of 131,072 characters is shorter than many texts
    try:
        reader = csv.reader(_read(path).splitlines(keepends=True), delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            place = f"{path}, line {reader.line_num + 1:,}"
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ValueError(f"{place}: {error}. Is it separated by {delimiter!r}?") from error
            if fields and not header:
                header = fields
                if problem := repeated(header):
                    raise ValueError(f"{place}: {problem}.")
            elif fields and len(fields) != len(header):
                raise ValueError(f"{place}: {len(fields)} fields where the header has {len(header)}.")
            elif fields:
                yield place, dict(zip(header, fields))
    finally:
        csv.field_size_limit(limit)


def _json_rows(path: Path) -> Iterator[Row]:
    text = _read(path)
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not valid JSON: {error}.") from error
        lines: Iterable[Row] = ((f"{path}, item {number:,}", value) for number, value in enumerate(values, start=1))
    else:
        lines = _json_lines(path, text)
    for place, value in lines:
        if not isinstance(value, dict):
            raise ValueError(f"{place}: {value!r:.60} is not an object with columns.")
        yield place, value


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}, line {number:,}", json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number:,}: not valid JSON: {error}.") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{str(path)!r} is not a readable Parquet file: {error}") from error
    for number, row in enumerate(table.to_pylist(), start=1):
        yield f"{path}, row {number:,}", row


def _hub_rows(dataset: str, dataset_config: str | None, split: str) -> Iterator[Row]:
    with hub_errors_explained(dataset, dataset_config, split):
        table = datasets.load_dataset(dataset, dataset_config, split=split)
    named = {
        name: feature.names for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)
    }
    for number, row in enumerate(table, start=1):
        # -1 is what the Hub writes where a test set's labels are kept secret.
        words = {name: names[row[name]] for name, names in named.items() if row[name] is not None and row[name] >= 0}
        yield f"{dataset}, row {number:,}", {**row, **dict.fromkeys(named), **words}


def _stdlib_rows() -> Iterator[Row]:
    """Every docstring of the packages, once; one that several packages share (as `__init__`'s do) is left out."""
    root, files = stdlib_files()
    found: dict[str, dict[str, str]] = {}  # docstring -> package -> place
    for path in files:
        package = path.relative_to(root).parts[0].removesuffix(".py")
        record = python_file(root, path)
        if package not in STDLIB_PACKAGES or record.problem is not None:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse("".join(record.text))
        for node in ast.walk(tree):
            has_docstring = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if has_docstring and (docstring := ast.get_docstring(node)):  # type: ignore[arg-type]
                place = f"{record.place}, line {getattr(node, 'lineno', 1):,}"
                found.setdefault(docstring, {}).setdefault(package, place)
    for docstring, packages in found.items():
        if len(packages) == 1:
            ((package, place),) = packages.items()
            yield place, {"text": docstring, "label": package}


def _read(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{str(path)!r} holds bytes that are not UTF-8 (at byte {error.start:,}). Convert it, for example with: "
            f"iconv -f LATIN1 -t UTF-8 {path.name}"
        ) from error
    if not text.strip():
        raise ValueError(f"{str(path)!r} is empty.")
    return text


def _lacking(option: str, column: str, columns: Iterable[str]) -> str:
    columns = list(columns)
    nearest = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
    hint = f"; did you mean --{option} {nearest[0]}?" if nearest else f". Name the right one with --{option}."
    return f"there is no column {column!r} but {columns}{hint}"


def _label(value: Any) -> str | None:
    """A label as a word; None if the value is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str | int):
        return str(value).strip() or None
    return None
