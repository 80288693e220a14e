"""Labelled texts: all forms of files, errors in them, and a split without leaks."""

import json
from collections import Counter

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfllm.data import sources
from hfllm.data.labelled_texts import (
    STDLIB_PACKAGES,
    LabelledTexts,
    balance_labels,
    check_labels_known,
    describe_labelled_texts,
    label_names,
    load_labelled_texts,
    normalized,
    split_by_text,
)


ROWS = [{"text": "one, two", "label": "ham"}, {"text": 'say "x"', "label": "spam"}, {"text": "é", "label": "ham"}]

# Lines of the form of the SMS Spam Collection: no header, quotation marks that close nowhere, a repeated message.
SMS = (
    "ham\tGo until jurong point, crazy.. Available only in bugis n great world\n"
    "spam\tFree entry in 2 a wkly comp to win FA Cup final tkts\n"
    "ham\t\"Oh k...i'm watching here:)\n"
    "ham\tFine if that's the way u feel.\"\n"
    "spam\tWINNER!! You have been selected to receive a £900 prize\n"
    "ham\tSorry, I'll call later\n"
    "ham\tSorry, I'll call later\n"
)


def write(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        separator = "\t" if path.suffix == ".tsv" else ","
        quoted = [['"' + str(v).replace('"', '""') + '"' for v in row.values()] for row in rows]
        path.write_text("\n".join(separator.join(line) for line in [list(rows[0]), *quoted]) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_every_form_of_a_table_gives_the_same_texts_and_labels(suffix, tmp_path):
    data = load_labelled_texts(write(tmp_path / f"rows{suffix}", ROWS))
    assert data.texts == [row["text"] for row in ROWS]
    assert data.labels == ["ham", "spam", "ham"]


@pytest.mark.parametrize("name", ["SMSSpamCollection", "SMSSpamCollection.tsv", "sms.txt"])
def test_the_spam_collections_own_file_is_read_line_by_line(name, tmp_path):
    (tmp_path / name).write_bytes(SMS.replace("\n", "\r\n" if name == "sms.txt" else "\n").encode())
    data = load_labelled_texts(str(tmp_path / name))
    assert data.labels == ["ham", "spam", "ham", "ham", "spam", "ham", "ham"]
    assert data.texts[2] == "\"Oh k...i'm watching here:)" and data.texts[3] == "Fine if that's the way u feel.\""


def test_the_spam_collection_on_the_hub_is_read_by_its_label_names(monkeypatch):
    """Its columns are `sms` and `label`, a ClassLabel; the same shape as on the Hub, made here."""
    features = datasets.Features({"sms": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "spam"])})
    table = datasets.Dataset.from_dict({"sms": ["Sorry", "WINNER"], "label": [0, 1]}, features=features)
    asked = []
    monkeypatch.setattr(sources, "hub_table", lambda *args: asked.append(args) or table)
    data = load_labelled_texts("ucirvine/sms_spam", text_column="sms")
    assert asked == [("ucirvine/sms_spam", None, "train")]
    assert (data.texts, data.labels) == (["Sorry", "WINNER"], ["ham", "spam"])


def test_labels_that_are_numbers_are_sorted_as_numbers(tmp_path):
    path = tmp_path / "stars.jsonl"
    path.write_text("".join(json.dumps({"text": f"t{n}", "label": n}) + "\n" for n in [10, 2, 1.0, 2]))
    labels = load_labelled_texts(str(path)).labels
    assert labels == ["10", "2", "1", "2"]
    assert label_names(labels) == ["1", "2", "10"]
    assert label_names(["b", "10", "a"]) == ["10", "a", "b"]


def test_the_standard_library_asks_which_package_a_docstring_comes_from():
    data = load_labelled_texts("stdlib")
    assert set(data.labels) <= set(STDLIB_PACKAGES) and len(set(data.labels)) > 5
    assert len(set(data.texts)) == len(data.texts) > 1000
    index = next(i for i, text in enumerate(data.texts) if "mbox mailbox" in text)
    assert data.labels[index] == "mailbox"


@pytest.mark.parametrize(
    "name, content, options, message",
    [
        ("a.csv", "txt,label\na,b\n", {}, r"no column 'text' but \['txt', 'label'\]; did you mean text_column='txt'"),
        ("a.csv", "text,kind\na,b\n", {}, r"no column 'label' but \['text', 'kind'\]"),
        ("a.csv", "text,label\na,b,c\n", {}, "line 2: 3 cells where the header has 2"),
        ("a.csv", "text,label\na,\n", {}, "line 2: its 'label' is '', not a text or a whole number"),
        ("a.jsonl", '{"text": "a", "label": 0.5}\n', {}, "line 1: its 'label' is 0.5"),
        (
            "a.jsonl",
            '{"text": "a", "label": 1}\n{"text": 3, "label": 1}\n',
            {},
            "line 2: its 'text' is a number, not a string",
        ),
        ("a.jsonl", "{oops\n", {}, "line 1: not valid JSON"),
        ("a.json", '["a"]', {}, "line 1: a string, not an object"),
        ("a.tsv", "kind\tsms\nham\tx\nspam\ty\nham\tz\n", {}, "line 1: no other line begins with 'kind'"),
        ("a.tsv", "ham\tx\nham\ty\nbroken\nspam\tz", {}, "line 3: 'broken' has no tab"),
        ("a.txt", "just a text", {}, "its first line has no tab"),
        ("a.parquet", "no parquet", {}, "not a readable Parquet file"),
        ("a.csv", "", {}, "nothing is in it"),
        ("a.csv", "text,label\n  ,x\n", {}, "no labelled text: 1 records have an empty text"),
        ("a.csv", "text,label\na,x\n", {"split": "test"}, "only datasets on the Hub have these"),
    ],
)
def test_errors_name_their_place(name, content, options, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_labelled_texts(str(tmp_path / name), **options)


def test_bytes_that_are_not_utf8_and_files_that_are_not_there_are_reported(tmp_path):
    (tmp_path / "latin.csv").write_bytes("text,label\ncaf\xe9,x\n".encode("latin1"))
    with pytest.raises(ValueError, match=r"line 2: its 'text' holds bytes that are not UTF-8 \(at character 3\)"):
        load_labelled_texts(str(tmp_path / "latin.csv"))
    with pytest.raises(FileNotFoundError, match=r"Nearest: .*latin.csv"):
        load_labelled_texts(str(tmp_path / "latim.csv"))


def test_empty_texts_and_skipped_records_are_counted(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("text,label\na,x\n ,x\nb,\nc,y\n")
    data = load_labelled_texts(str(path), on_bad_record="skip")
    assert (data.texts, data.num_empty, data.num_bad) == (["a", "c"], 1, 1)


def test_one_label_alone_and_a_label_for_every_text_are_refused():
    with pytest.raises(ValueError, match="All 3 texts have the label 'a'"):
        label_names(["a", "a", "a"])
    with pytest.raises(ValueError, match="There are 20 different labels for 20 texts"):
        label_names([f"text {n}" for n in range(20)])


def test_no_text_straddles_the_split_and_every_part_has_each_label_in_its_share():
    texts = [f"text {n % 400}" if n % 3 else f"  TEXT {n % 400}" for n in range(600)]  # 200 of them occur twice
    data = LabelledTexts(texts, ["spam" if n % 400 % 4 == 0 else "ham" for n in range(600)])
    parts = split_by_text(data, seed=3)
    assert sum(map(len, parts)) == 600
    seen = [{normalized(text) for text in part.texts} for part in parts]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]
    for part, share in zip(parts, (0.7, 0.1, 0.2)):
        assert len(part) == pytest.approx(600 * share, abs=2)
        assert Counter(part.labels)["spam"] / len(part) == pytest.approx(0.25, abs=0.06)
    assert split_by_text(data, seed=3)[2].texts == parts[2].texts != split_by_text(data, seed=4)[2].texts


def test_the_books_protocol_has_the_books_sizes():
    data = LabelledTexts([f"message {n}" for n in range(5572)], ["spam" if n < 747 else "ham" for n in range(5572)])
    balanced = balance_labels(data, seed=0)
    assert Counter(balanced.labels) == {"spam": 747, "ham": 747}
    assert [len(part) for part in split_by_text(balanced)] == [1045, 149, 300]


def test_a_label_that_occurs_once_is_trained_on():
    data = LabelledTexts([f"text {n}" for n in range(31)], ["a", "b", "c"] * 10 + ["rare"])
    assert "rare" in split_by_text(data)[0].labels


def test_labels_that_training_lacks_are_refused():
    with pytest.raises(ValueError, match=r"validation texts have labels that no training text has: 'c' \(2 texts\)"):
        check_labels_known(["a", "b"], validation=LabelledTexts(["x", "y", "z"], ["c", "c", "a"]))


def test_the_description_says_what_is_odd():
    train = LabelledTexts(["A b", "a  B", "c", "d"], ["x", "y", "x", "x"], num_empty=2)
    text = describe_labelled_texts(train, LabelledTexts(["c"], ["x"]), LabelledTexts(["e"], ["y"]), ["x", "y"])
    for words in (
        "4 to train on, 1 to validate on, 1 to test on",
        "in training x 3, y 1. Always saying 'x' is right on 75.0%",
        "Repeated texts: 2",
        "Conflicts: 1 texts",
        "1 validation texts are training texts too",
        "Left out: 2 empty texts",
    ):
        assert words in text
