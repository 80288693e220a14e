"""Labelled texts: read from files, the Hub or the standard library, checked, and split with equal texts together."""

import ast
import hashlib
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .formats import TEXT, decoding_problem, format_of, read_lines, refusal
from .readers import read_file
from .records import (
    ReadOptions,
    Record,
    check_on_bad_record,
    is_good,
    json_type,
    lacks_required,
    new_account,
    note_unused,
    tell_account,
    text_problem,
)
from .sources import find_source, local_paths, python_file, stdlib_files
from .tables import read as read_table


# Which of these packages of the standard library does a docstring come from? Each has a hundred or more of them, and
# every Python from 3.11 on has each.
STDLIB_PACKAGES = (
    *("asyncio", "email", "http", "importlib", "logging"),
    *("mailbox", "multiprocessing", "unittest", "urllib", "xml"),
)


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and their labels as strings, in the order in which they were read; `account` says what was left out."""

    texts: list[str]
    labels: list[str]
    num_empty: int = 0  # texts without a visible character, left out
    num_bad: int = 0  # records that on_bad_record="skip" left out
    account: Mapping[str, Any] = field(default_factory=dict)
    named_rows: Mapping[str, range] = field(default_factory=dict)  # of several datasets that were joined

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def fingerprint(self) -> str:
        """A sha256 over the texts, the labels and their order."""
        return hashlib.sha256(json.dumps([self.texts, self.labels]).encode()).hexdigest()

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
    delimiter: str | None = None,
    exclude: Iterable[str | os.PathLike] = (),
) -> LabelledTexts:
    """The labelled texts of files or folders, several separated by commas, a dataset on the Hub, or `stdlib`.

    Files are .csv, .tsv, .jsonl, .json, .parquet and .arrow. A file of lines `label<TAB>text` without a header, as the
    SMS Spam Collection comes, is recognised by its first line; in it a quotation mark is a character like any other.
    `stdlib` asks which package of the standard library a docstring comes from.

    Labels are words or whole numbers; a `ClassLabel` is read by its names. A record without a text or label is an error
    with its place, or left out and counted with `on_bad_record="skip"`. Empty texts are left out and counted.
    """
    check_on_bad_record(on_bad_record)
    required = {text_column: "text_column", label_column: "label_column"}
    options = ReadOptions(required, only=set(required), delimiter=delimiter)
    found: dict[str, Any] = {}
    records: Iterable[Record]
    if local_paths(dataset, dataset_config=dataset_config, split=split) == []:
        if problem := lacks_required(("text", "label"), options):
            raise ValueError(f"stdlib: {problem}.")
        records = _stdlib_records()
    else:
        where: dict[str, Any] = {"dataset_config": dataset_config, "split": split, "exclude": exclude}
        read = partial(_read_labelled, text_column=text_column, label_column=label_column)
        source = find_source(dataset, **where, options=options, read=read)
        records, found = source.records, source.account
    texts, labels = [], []
    account = {**found, **new_account()}
    for record in records:
        record = _checked(record, text_column, label_column)
        if not is_good(record, account, on_bad_record=on_bad_record):
            continue
        assert record.columns is not None
        note_unused((name for name in record.columns if name not in required), account)
        text, label = record.columns[text_column], _label(record.columns[label_column])
        if text.strip():
            texts.append(text)
            labels.append(label or "")
        else:
            account["empty_documents"] += 1
    num_empty, num_bad = account["empty_documents"], account["bad_records"]
    if not texts:
        first = f" The first: {account['bad_record_examples'][0]}." if num_bad else ""
        counts = f"{num_empty:,} records have an empty text, {num_bad:,} are bad"
        what = counts if num_empty or num_bad else "nothing is in it"
        raise ValueError(f"{dataset!r} has no labelled text: {what}.{first}")
    tell_account(dataset, account)
    return LabelledTexts(texts, labels, num_empty, num_bad, account)


def _checked(record: Record, text_column: str, label_column: str) -> Record:
    """The record, or what is wrong with its text or label."""
    columns = record.columns
    if columns is None:
        problem = record.problem or f"plain text, which has no columns {text_column!r} and {label_column!r}"
        return replace(record, problem=problem)
    label = _label(columns[label_column])
    label_problem = None if label is None else text_problem(label, label_column)
    if label is None:
        given = columns[label_column]
        what = repr(given)[:60] if isinstance(given, str | float) else json_type(given)
        label_problem = f"its {label_column!r} is {what}, not a text or a whole number"
    return replace(record, problem=text_problem(columns[text_column], text_column) or label_problem)


def join_labelled_texts(parts: Mapping[str, LabelledTexts]) -> LabelledTexts:
    """Several datasets as one; `named_rows` says which rows belong to which, if there are several."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    named_rows, start = {}, 0
    for name, part in parts.items():
        named_rows[name] = range(start, start + len(part))
        start += len(part)
    return LabelledTexts(
        texts=[text for part in parts.values() for text in part.texts],
        labels=[label for part in parts.values() for label in part.labels],
        num_empty=sum(part.num_empty for part in parts.values()),
        num_bad=sum(part.num_bad for part in parts.values()),
        named_rows=named_rows,
    )


def label_names(labels: Iterable[str]) -> list[str]:
    """The distinct labels in the order of their ids: numbers by value, texts alphabetically.

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
    """The text without case and whitespace differences, to compare texts."""
    return " ".join(text.split()).casefold()


def balance_labels(data: LabelledTexts, *, seed: int) -> LabelledTexts:
    """As many texts of each label as the rarest one has, drawn at random, in the original order."""
    labels = np.array(data.labels)
    names, counts = np.unique(labels, return_counts=True)
    generator = np.random.default_rng(seed)
    kept = [generator.permutation(np.flatnonzero(labels == name))[: counts.min()] for name in names]
    return data.select(np.sort(np.concatenate(kept)).tolist())


def split_by_text(
    data: LabelledTexts, *, fractions: Sequence[float] = (0.7, 0.1, 0.2), seed: int = 0
) -> list[LabelledTexts]:
    """The data in parts of these fractions, each with its share of every label; equal texts are in the same part.

    Texts that differ only in case and whitespace are equal. The sizes are as in the book, `int(fraction * rows)` and
    the rest for the last part that has a fraction, unless equal texts are on both sides of a cut.
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
    """Raise a ValueError if a part (`validation=...`, `test=...`) has labels that the training texts lack."""
    for part, data in parts.items():
        if unknown := Counter(label for label in data.labels if label not in set(names)):
            listing = ", ".join(f"{label!r} ({count:,} texts)" for label, count in unknown.most_common(5))
            raise ValueError(
                f"The {part} texts have labels that no training text has: {listing}. Those trained on are "
                f"{list(names)}. Correct the labels, or leave the given {part} texts out, and a part of the training "
                "texts is held back instead."
            )


def describe_labelled_texts(
    train: LabelledTexts, validation: LabelledTexts, test: LabelledTexts, names: Sequence[str]
) -> str:
    """A description of the data before training: numbers of texts and labels, repeats, conflicts and leaks."""
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


def _read_labelled(path: Path, options: ReadOptions, *, text_column: str, label_column: str) -> Iterator[Record]:
    """A file's records, also of a file of lines `label<TAB>text` without a header, recognised by its first line."""
    suffix = format_of(path)
    if suffix not in ("", ".tsv", *TEXT):
        return read_file(path, options)
    if problem := refusal(path) or decoding_problem(path):
        return iter([Record(str(path), problem=problem)])
    first = next((line for line in read_lines(path) if line.strip()), "").rstrip("\r\n")
    if not first:
        return iter([Record(str(path), problem="the file is empty")])
    cells = first.split("\t")
    if len(cells) == 2 and not {text_column, label_column} & set(cells):
        return _lines_without_header(path, text_column, label_column)
    if suffix == ".tsv":
        return read_file(path, options)
    if len(cells) < 2:
        problem = (
            "its first line has no tab; give a .csv, .jsonl, .json or .parquet file with columns, or lines of the form "
            "label<TAB>text"
        )
        return iter([Record(str(path), problem=problem)])
    return read_table(path, replace(options, delimiter="\t"))


def _lines_without_header(path: Path, text_column: str, label_column: str) -> Iterator[Record]:
    """Lines `label<TAB>text`. pandas' default, by which the book reads them, takes a quotation mark at the text's start
    for a quoted field, and joins lines up to the next one."""
    counts = Counter(line.partition("\t")[0] for line in read_lines(path) if line.strip())
    header = next(line for line in read_lines(path) if line.strip()).rstrip("\r\n")
    first_label, _, first_text = header.partition("\t")
    if counts[first_label] == 1 and counts.total() > 3:
        problem = (
            f"no other line begins with {first_label!r}; if this is a header, name its columns, {first_label!r} and "
            f"{first_text[:60]!r}, with text_column and label_column"
        )
        yield Record(f"{path}, line 1", problem=problem)
        return
    for number, line in enumerate(read_lines(path), start=1):
        place = f"{path}, line {number:,}"
        label, tab, text = line.rstrip("\r\n").partition("\t")
        if tab:
            yield Record(place, columns={text_column: text, label_column: label})
        elif line.strip():
            yield Record(place, problem=f"{line.strip()[:80]!r} has no tab, where label<TAB>text is expected")


def _stdlib_records() -> Iterator[Record]:
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
            yield Record(place, columns={"text": docstring, "label": package})


def _label(value: Any) -> str | None:
    """A label as a string; None if the value cannot be a label."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str | int):
        return str(value).strip() or None
    return None
