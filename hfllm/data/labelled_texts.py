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
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

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


# What a model learns of a text, in the words of transformers' `config.problem_type`: one label, several, or a number.
ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
SINGLE_LABEL, MULTI_LABEL, REGRESSION = PROBLEM_TYPES = get_args(ProblemType)
Label = str | list[str] | float

NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# What float32 can learn: a number's square is finite, and the numbers differ by more than their last digits.
LARGEST_NUMBER, SMALLEST_SPREAD, SMALLEST_SHARE = 1e18, 1e-15, 1e-6


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and their labels, in the order in which they were read; `account` says what was left out.

    A label is a word; with `multi_label_classification` a list of words, which may be empty; with `regression` a float.
    """

    texts: list[str]
    labels: list[Any]
    problem_type: ProblemType = "single_label_classification"
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
        texts, labels = [self.texts[row] for row in rows], [self.labels[row] for row in rows]
        return LabelledTexts(texts, labels, self.problem_type)


def load_labelled_texts(
    dataset: str,
    *,
    dataset_config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    label_column: str = "label",
    problem_type: ProblemType | None = None,
    label_separator: str | None = None,
    on_bad_record: str = "error",
    delimiter: str | None = None,
    exclude: Iterable[str | os.PathLike] = (),
) -> LabelledTexts:
    """The labelled texts of files or folders, several separated by commas, a dataset on the Hub, or `stdlib`.

    Files are .csv, .tsv, .jsonl, .json, .parquet and .arrow. A file of lines `label<TAB>text` without a header, as the
    SMS Spam Collection comes, is recognised by its first line; in it a quotation mark is a character like any other.
    `stdlib` asks which package of the standard library a docstring comes from.

    Labels are words or whole numbers; a `ClassLabel` is read by its names. With `multi_label_classification` they are
    lists of these, or texts that `label_separator` cuts; an empty one says that no label holds. With `regression` they
    are finite numbers. Without a `problem_type`, lists or a `label_separator` mean several labels, all else means one.
    A record without a text or label is an error with its place, or left out and counted with `on_bad_record="skip"`.
    Empty texts are left out and counted.
    """
    check_on_bad_record(on_bad_record)
    check_label_options(problem_type, label_separator)
    problem_type = problem_type or (MULTI_LABEL if label_separator is not None else None)
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
        read = partial(
            _read_labelled, text_column=text_column, label_column=label_column, label_separator=label_separator
        )
        source = find_source(dataset, **where, options=options, read=read)
        records, found = source.records, source.account
    texts, labels = [], []
    account = {**found, **new_account()}
    for record in records:
        given = record.columns[label_column] if record.columns is not None else None
        if problem_type is None and given is not None:  # the first label decides
            problem_type = MULTI_LABEL if isinstance(given, list) else SINGLE_LABEL
        label, problem = _read_label(given, label_column, problem_type or SINGLE_LABEL, label_separator)
        record = _checked(record, text_column, label_column, label_problem=problem)
        if not is_good(record, account, on_bad_record=on_bad_record):
            continue
        assert record.columns is not None
        note_unused((name for name in record.columns if name not in required), account)
        text = record.columns[text_column]
        if text.strip():
            texts.append(text)
            labels.append(label)
        else:
            account["empty_documents"] += 1
    num_empty, num_bad = account["empty_documents"], account["bad_records"]
    if not texts:
        first = f" The first: {account['bad_record_examples'][0]}." if num_bad else ""
        counts = f"{num_empty:,} records have an empty text, {num_bad:,} are bad"
        what = counts if num_empty or num_bad else "nothing is in it"
        raise ValueError(f"{dataset!r} has no labelled text: {what}.{first}")
    tell_account(dataset, account)
    return LabelledTexts(texts, labels, problem_type or SINGLE_LABEL, num_empty, num_bad, account)


def check_label_options(problem_type: str | None, label_separator: str | None) -> None:
    """Raise a ValueError if these do not go together."""
    if problem_type not in (None, *PROBLEM_TYPES):
        raise ValueError(f"problem_type={problem_type!r}: choose from {', '.join(PROBLEM_TYPES)}.")
    if label_separator is None:
        return
    if not label_separator.strip() and label_separator not in (" ", "\t"):
        raise ValueError(f"label_separator={label_separator!r}: give what stands between two labels, such as ';'.")
    if problem_type not in (None, MULTI_LABEL):
        raise ValueError(
            f"label_separator={label_separator!r} is for several labels of a text, and problem_type is "
            f"{problem_type!r}. Leave one of them out."
        )


def _checked(record: Record, text_column: str, label_column: str, *, label_problem: str | None) -> Record:
    """The record, or what is wrong with its text or label."""
    columns = record.columns
    if columns is None:
        problem = record.problem or f"plain text, which has no columns {text_column!r} and {label_column!r}"
        return replace(record, problem=problem)
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
        problem_type=next(iter(parts.values())).problem_type,
        num_empty=sum(part.num_empty for part in parts.values()),
        num_bad=sum(part.num_bad for part in parts.values()),
        named_rows=named_rows,
    )


def output_names(data: LabelledTexts, *, label_column: str) -> list[str]:
    """The names of a model's outputs for these labels: `label_names`, or of numbers the column's name."""
    if data.problem_type != REGRESSION:
        return label_names(data.labels)
    if min(data.labels) == max(data.labels):
        raise ValueError(
            f"All {len(data):,} texts have the number {data.labels[0]:g}: there is nothing to learn. Is it the right "
            "label_column?"
        )
    spread, largest = max(data.labels) - min(data.labels), max(map(abs, data.labels))
    if spread < max(SMALLEST_SPREAD, SMALLEST_SHARE * largest):
        raise ValueError(
            f"The numbers are from {min(data.labels)} to {max(data.labels)}, which float32 can hardly tell apart. "
            "Subtract a constant from them, or give them in another unit."
        )
    return [label_column]


def label_names(labels: Iterable[str | Sequence[str]]) -> list[str]:
    """The distinct labels in the order of their ids: numbers by value, texts alphabetically.

    The same label for every text, or about as many labels as texts, is an error: there would be nothing to learn.
    """
    labels = list(labels)
    counts = Counter(word for label in labels for word in words_of(label))
    sets = {frozenset(words_of(label)) for label in labels}
    if len(sets) == 1:
        same = f"the label {labels[0]!r}" if isinstance(labels[0], str) else f"the labels {list(labels[0])}"
        raise ValueError(
            f"All {len(labels):,} texts have {same}: there is nothing to tell apart. Is it the right label_column?"
        )
    is_number = all(re.fullmatch(r"-?\d+", word) for word in counts)
    if len(counts) > max(10, len(labels) // 2):
        some = ", ".join(repr(f"{word:.20}") for word in list(counts)[:3])
        numbers = " Numbers are learned with problem_type='regression'." if is_number else ""
        raise ValueError(
            f"There are {len(counts):,} different labels for {len(labels):,} texts ({some}, ...), so they cannot be "
            f"learned from examples. Is it the right label_column?{numbers}"
        )
    return sorted(counts, key=(lambda word: int(word)) if is_number else None)


def words_of(label: str | Sequence[str]) -> Sequence[str]:
    """The labels of a text: the one that it has, or those."""
    return [label] if isinstance(label, str) else label


def label_targets(data: LabelledTexts, names: Sequence[str]) -> np.ndarray:
    """What the loss compares with: ids (N,); of several labels at once 0.0 and 1.0 (N, labels); or numbers (N,)."""
    if data.problem_type == REGRESSION:
        return np.array(data.labels, dtype=np.float64)
    ids = {name: index for index, name in enumerate(names)}
    if data.problem_type == SINGLE_LABEL:
        return np.array([ids[label] for label in data.labels], dtype=np.int64)
    targets = np.zeros((len(data), len(names)))
    for row, words in enumerate(data.labels):
        targets[row, [ids[word] for word in words]] = 1
    return targets


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

    Of several labels at once the rarest counts; of numbers, each part has its share of every tenth of them, by size.
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

    # Each group gets a place between 0 and 1 within its stratum. In the order of these places every stretch holds each
    # stratum in its share.
    strata = _strata([data.labels[group[0]] for group in shuffled], data.problem_type)
    totals = Counter(strata)
    seen: Counter[Any] = Counter()
    places = []
    for stratum in strata:
        places.append((seen[stratum] + 0.5) / totals[stratum])
        seen[stratum] += 1
    parts: list[list[int]] = [[] for _ in fractions]
    sizes = [int(fraction * len(data)) for fraction in fractions]
    last = max(part for part, fraction in enumerate(fractions) if fraction > 0)
    part = 0
    for index in np.argsort(places, kind="stable"):
        while part < last and len(parts[part]) >= sizes[part]:
            part += 1
        parts[part] += shuffled[index]
    return [data.select(rows) for rows in parts]


def _strata(labels: Sequence[Any], problem_type: ProblemType) -> list[Any]:
    """What each part of a split has its share of: a label, the rarest of several, or a tenth of the numbers' range."""
    if problem_type == SINGLE_LABEL:
        return list(labels)
    if problem_type == REGRESSION:
        ranks = np.argsort(np.argsort(labels, kind="stable"), kind="stable")
        return (10 * ranks // len(labels)).tolist()
    counts = Counter(word for words in labels for word in words)
    return [min(words, key=lambda word: (counts[word], word), default=None) for words in labels]


def check_labels_known(names: Sequence[str], **parts: LabelledTexts) -> None:
    """Raise a ValueError if a part (`validation=...`, `test=...`) has labels that the training texts lack."""
    known = set(names)
    for part, data in parts.items():
        if data.problem_type == REGRESSION:
            continue
        if unknown := Counter(word for label in data.labels for word in words_of(label) if word not in known):
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
    parts, is_number = (train, validation, test), train.problem_type == REGRESSION
    by_text: dict[str, set[Any]] = {}
    for part in parts:
        for text, label in zip(part.texts, part.labels):
            key = frozenset(label) if train.problem_type == MULTI_LABEL else label
            by_text.setdefault(normalized(text), set()).add(key)
    num_texts = sum(map(len, parts))
    lines = [
        f"Texts: {len(train):,} to train on, {len(validation):,} to validate on, {len(test):,} to test on.",
        _describe_labels(train, names),
    ]
    if num_repeated := num_texts - len(by_text):
        lines.append(f"Repeated texts: {num_repeated:,} occur elsewhere but for case and white space.")
    if num_conflicts := sum(len(labels) > 1 for labels in by_text.values()):
        others = {SINGLE_LABEL: "more than one label", MULTI_LABEL: "other labels", REGRESSION: "another number"}
        lines.append(f"Conflicts: {num_conflicts:,} texts occur with {others[train.problem_type]}.")
    trained_on = {normalized(text) for text in train.texts}
    for name, part in (("validation", validation), ("test", test)):
        if num_leaks := sum(normalized(text) in trained_on for text in part.texts):
            lines.append(f"Warning: {num_leaks:,} {name} texts are training texts too, so their numbers flatter.")
    counts = Counter(word for label in train.labels for word in words_of(label)) if not is_number else Counter()
    if rare := [name for name in names if counts[name] < 5 and not is_number]:
        lines.append(f"Warning: fewer than five training texts of {', '.join(rare[:10])}.")
    for number, what in ((train.num_empty, "empty texts"), (train.num_bad, "bad records")):
        if number:
            lines.append(f"Left out: {number:,} {what}.")
    return "\n".join(lines)


def _describe_labels(train: LabelledTexts, names: Sequence[str]) -> str:
    """The labels of the training texts, and how far one gets by always saying the same."""
    if train.problem_type == REGRESSION:
        numbers = np.array(train.labels)
        error = np.abs(numbers - numbers.mean()).mean()
        return (
            f"Numbers: in training from {numbers.min():g} to {numbers.max():g}, mean {numbers.mean():.6g}, standard "
            f"deviation {numbers.std():.6g}. Always saying the mean is {error:.6g} off, on average."
        )
    counts = Counter(word for label in train.labels for word in words_of(label))
    listing = ", ".join(f"{name} {counts[name]:,}" for name in names[:12])
    more = f" and {len(names) - 12:,} more" if len(names) > 12 else ""
    common, most = counts.most_common(1)[0]
    share = f"is right on {most / len(train):.1%} of them"
    if train.problem_type == SINGLE_LABEL:
        return f"Labels: {len(names):,}; in training {listing}{more}. Always saying {common!r} {share}."
    num_none = sum(not words for words in train.labels)
    return (
        f"Labels: {len(names):,}, several at once (multi_label_classification); in training {listing}{more}. "
        f"{counts.total() / len(train):.2f} labels a text; {num_none:,} texts have none."
    )


def _read_labelled(
    path: Path, options: ReadOptions, *, text_column: str, label_column: str, label_separator: str | None
) -> Iterator[Record]:
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
        return _lines_without_header(path, text_column, label_column, label_separator)
    if suffix == ".tsv":
        return read_file(path, options)
    if len(cells) < 2:
        problem = (
            "its first line has no tab; give a .csv, .jsonl, .json or .parquet file with columns, or lines of the form "
            "label<TAB>text"
        )
        return iter([Record(str(path), problem=problem)])
    return read_table(path, replace(options, delimiter="\t"))


def _lines_without_header(
    path: Path, text_column: str, label_column: str, label_separator: str | None
) -> Iterator[Record]:
    """Lines `label<TAB>text`. pandas' default, by which the book reads them, takes a quotation mark at the text's start
    for a quoted field, and joins lines up to the next one."""
    cells = [line.partition("\t")[0] for line in read_lines(path) if line.strip()]
    counts = Counter(word for cell in cells for word in _separated(cell, label_separator))
    header = next(line for line in read_lines(path) if line.strip()).rstrip("\r\n")
    first_label, _, first_text = header.partition("\t")
    occurs_once = all(counts[word] == 1 for word in _separated(first_label, label_separator))
    if first_label.strip() and occurs_once and not NUMBER.fullmatch(first_label.strip()) and len(cells) > 3:
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


def _read_label(
    value: Any, name: str, problem_type: ProblemType, separator: str | None
) -> tuple[Label | None, str | None]:
    """The label in a column's value, or what is wrong with it."""
    shown = repr(value)[:60] if isinstance(value, str | float | list) else json_type(value)
    if problem_type == REGRESSION:
        number = _number(value)
        if number is None:
            return None, f"its {name!r} is {shown}, not a number"
        if not abs(number) <= LARGEST_NUMBER:
            return None, f"its {name!r} is {shown}, not a number that float32 can learn"
        return number, None
    if problem_type == SINGLE_LABEL:
        if (word := _word(value)) is not None:
            return word, text_problem(word, name)
        hint = ""
        if isinstance(value, list):
            shown, hint = "a list", f"; several labels at once are problem_type={MULTI_LABEL!r}"
        elif isinstance(value, float) and math.isfinite(value):
            hint = f"; numbers are problem_type={REGRESSION!r}"
        return None, f"its {name!r} is {shown}, not a text or a whole number{hint}"
    if isinstance(value, str) and separator is not None:
        value = _separated(value, separator)
    if not isinstance(value, list):
        hint = "; say with label_separator what stands between two labels" if isinstance(value, str) else ""
        return None, f"its {name!r} is {shown}, not a list of labels{hint}"
    words = [_word(each) for each in value]
    if None in words:
        return None, f"its {name!r} is {shown}, in which something is not a text or a whole number"
    if len(set(words)) < len(words):
        # As in a row of 0 and 1 for all labels, whose places say which label each one is.
        return None, f"its {name!r} is {shown}, with a label twice; list the labels that the text has"
    return words, next((problem for word in words if (problem := text_problem(word, name))), None)  # type: ignore


def _separated(cell: str, separator: str | None) -> list[str]:
    """The labels of a table's cell."""
    if separator is None:
        return [cell]
    return [word.strip() for word in cell.split(separator)] if cell.strip() else []


def _word(value: Any) -> str | None:
    """A label as a string; None if the value cannot be a label."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str | int):
        return str(value).strip() or None
    return None


def _number(value: Any) -> float | None:
    """A number as a float, of a table's cell too; None if the value is none. What is too large is infinite."""
    if isinstance(value, str):
        return float(value) if NUMBER.fullmatch(value.strip()) else None
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
