"""A record of a file or a dataset, its possible problems, and the account of what was read and left out."""

import difflib
import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any


logger = logging.getLogger(__name__)

NUM_EXAMPLES = 10  # bad records, and remarks, whose place is kept in an account
NUM_TOLD = 3  # of the remarks
MOST_UNUSED = 1000  # names of columns: JSON objects may have any


@dataclass(slots=True)  # not frozen: creating a frozen one takes five times as long, and a corpus has millions
class Record:
    """A document, its text in pieces of any size; or the columns of a row; or, with `problem`, nothing of use."""

    place: str  # "books.jsonl, line 3"
    text: Iterable[str] = ()
    columns: Mapping[str, Any] | None = None  # of a table's row or a JSON object
    problem: str | None = None
    lacks_column: bool = False
    num_lost: int = 1  # records that a problem concerns: a quotation mark that never closes affects many
    remark: str | None = None  # what is odd about a record that is used
    unread: tuple[str, ...] = ()  # columns of the file that were not asked for
    source: str = ""  # the file that it is from


@dataclass(frozen=True)
class ReadOptions:
    """How files are read: what a table needs, and what cuts a text.

    Attributes:
        required: Columns without which a file is refused, and the name of the parameter that names each.
        only: Columns to read of Parquet and Arrow; default: all of them.
        delimiter: What separates the cells of .csv and .tsv; default: what the header shows.
        document_separator: A line that ends a document of a text file; default: a file is a document.
    """

    required: Mapping[str, str] = field(default_factory=dict)
    only: Collection[str] | None = None
    delimiter: str | None = None
    document_separator: str | None = None

    def __post_init__(self):
        if self.delimiter == r"\t":  # as a shell passes it on
            object.__setattr__(self, "delimiter", "\t")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise ValueError(f"delimiter={self.delimiter!r}: it is one character, such as ';' or a tab.")
        separator = self.document_separator
        if separator is not None and (not separator.strip() or "\n" in separator or "\r" in separator):
            raise ValueError(f"document_separator={separator!r}: it is a line of text, such as '%' or '<|endoftext|>'.")


def as_document(record: Record, text_column: str, *, source: str = "") -> Record:
    """The document in a record's text column."""
    columns = record.columns
    if columns is None:
        return replace(record, source=source)
    if problem := text_problem(columns[text_column], text_column):
        return Record(record.place, problem=problem)
    unread = (*record.unread, *(name for name in columns if name != text_column))
    return Record(record.place, (columns[text_column],), remark=record.remark, unread=unread, source=source)


def text_problem(value: Any, name: str) -> str | None:
    """Why the value of a column is not a valid text, or None."""
    if not isinstance(value, str):
        return f"its {name!r} is {json_type(value)}, not a string"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # `open_text` makes these surrogates of bytes that are not UTF-8.
        is_byte = "\udc80" <= value[error.start] <= "\udcff"
        what = "bytes that are not UTF-8" if is_byte else "half a surrogate pair"
        return f"its {name!r} holds {what} (at character {error.start:,})"
    return None


def json_type(value: Any) -> str:
    """What JSON calls a value, with an article: "a list", "null"."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    names |= {bytes: "bytes"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def lacking(column: str, columns: Iterable[str], option: str = "text_column") -> str:
    """The message about a table or an object that lacks a column, with the nearest name and all names."""
    columns = list(columns)
    nearest = difflib.get_close_matches(column, columns, n=1, cutoff=0.5)
    hint = f"did you mean {option}={nearest[0]!r}?" if nearest else f"name the right one with {option}"
    return f"there is no column {column!r} but {columns}; {hint}"


def lacks_required(columns: Collection[str], options: ReadOptions) -> str | None:
    """The message about a missing required column, or None."""
    for name, option in options.required.items():
        if name not in columns:
            return lacking(name, columns, option)
    return None


def repeated(header: Iterable[str]) -> str | None:
    """The message about a table that has a column's name twice; None if each name is there once."""
    counts = Counter(name for name in header if name)  # columns without a name mean nothing
    names = [repr(name) for name, count in counts.items() if count > 1]
    return f"the header has {', '.join(names)} more than once; give each column a name of its own" if names else None


def header_problem(place: str, header: Collection[str], options: ReadOptions) -> Record | None:
    """A record with the problem of a table's columns, or None."""
    if problem := repeated(header):
        return Record(place, problem=problem)
    if problem := lacks_required(header, options):
        return Record(place, problem=problem, lacks_column=True)
    return None


def new_account() -> dict[str, Any]:
    """An empty account for `is_good`."""
    counts = dict.fromkeys(("empty_documents", "bad_records", "records_without_column"), 0)
    return {**counts, "bad_record_examples": [], "remarks": [], "num_remarks": 0, "unused_columns": []}


def is_good(record: Record, account: dict[str, Any], *, on_bad_record: str) -> bool:
    """Whether a record can be used; a bad one raises an error or is counted in the account."""
    if record.problem is None:
        note_unused(record.unread, account)
        if record.remark is not None:
            account["num_remarks"] += 1
            if len(account["remarks"]) < NUM_EXAMPLES:
                account["remarks"].append(f"{record.place}: {record.remark}")
        return True
    message = f"{record.place}: {record.problem}"
    if on_bad_record == "error":
        message += "" if message.endswith("?") else "."
        first_step = "Or" if record.lacks_column else "Correct it, or"
        raise ValueError(f"{message} {first_step} leave such records out with on_bad_record='skip'.")
    account["bad_records"] += record.num_lost
    account["records_without_column"] += record.lacks_column
    if len(account["bad_record_examples"]) < NUM_EXAMPLES:
        account["bad_record_examples"].append(message)
    return False


def note_unused(names: Iterable[str], account: dict[str, Any]) -> None:
    unused = account["unused_columns"]
    unused.extend(name for name in names if name not in unused and len(unused) < MOST_UNUSED)


def check_on_bad_record(on_bad_record: str) -> None:
    if on_bad_record not in ("error", "skip"):
        raise ValueError(f"on_bad_record={on_bad_record!r}: it is either 'error' or 'skip'.")


def tell_account(dataset: str, account: Mapping[str, Any]) -> None:
    """Log what was skipped, what looked odd and which columns are not used, one line each."""
    if account["bad_records"]:
        first = account["bad_record_examples"][0]
        logger.warning("%s: %s bad records were skipped, first %s", dataset, f"{account['bad_records']:,}", first)
    for remark in account["remarks"][:NUM_TOLD]:
        logger.warning("%s.", remark)
    if account["num_remarks"] > NUM_TOLD:
        logger.warning("%s: %s further records are like that.", dataset, f"{account['num_remarks'] - NUM_TOLD:,}")
    if account["unused_columns"]:
        logger.warning("%s: not used: %s.", dataset, some_of(account["unused_columns"]))


def some_of(names: Sequence[str], num: int = 20) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - num:,} more" if len(names) > num else ""
    return ", ".join(names[:num]) + more
