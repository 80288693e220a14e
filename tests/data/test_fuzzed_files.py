"""Damaged files: each is read to exactly what an independent reader gives, or refused with its place."""

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfllm.data.conversations import load_conversations, load_preferences
from hfllm.data.labelled_texts import load_labelled_texts
from hfllm.data.readers import read_file
from hfllm.data.records import ReadOptions


@pytest.fixture(autouse=True)
def _no_warnings(caplog):
    """The texts of damaged files would be in the report, which pytest-xdist cannot send if they are not UTF-8."""
    caplog.set_level(logging.CRITICAL, logger="hfllm")


WORDS = ["one", "two, three", 'say "x"', "é→文", "four\nlines", "a;b", "tab\there", "", "5", "null", "\x0c\u2028", "{}"]
VALUES = ["null", "5", "-0.5", "true", "[]", "{}", '"x"', "[[1]]", "NaN", '"\\ud800"', "1e999", "{", "]"]


def rows(draw: random.Random) -> list[dict]:
    return [
        {"text": " ".join(draw.choices(WORDS, k=draw.randint(0, 4))), "label": draw.choice(["a", "b"]), "id": number}
        for number in range(draw.randint(1, 6))
    ]


def as_table(delimiter: str, draw: random.Random) -> bytes:
    file = io.StringIO(newline="")
    table = rows(draw)
    writer = csv.DictWriter(file, list(table[0]), delimiter=delimiter, lineterminator=draw.choice(["\n", "\r\n"]))
    writer.writeheader()
    writer.writerows(table)
    return file.getvalue().encode()


def as_json(draw: random.Random) -> bytes:
    table, indent = rows(draw), draw.choice([None, 1])
    if draw.random() < 0.5:
        return json.dumps(table, indent=indent, ensure_ascii=draw.random() < 0.5).encode()
    return "\n".join(json.dumps(row, indent=indent) for row in table).encode()


def as_parquet(draw: random.Random) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows(draw)), file, compression="none")
    return file.getvalue()


def as_arrow(draw: random.Random) -> bytes:
    table, file = pa.Table.from_pylist(rows(draw)), io.BytesIO()
    with draw.choice([pa.ipc.new_file, pa.ipc.new_stream])(file, table.schema) as writer:
        writer.write_table(table)
    return file.getvalue()


def as_lines(draw: random.Random) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=draw.random() < 0.5) + "\n" for row in rows(draw)).encode()


MAKE = {
    "a.txt": lambda draw: "\n".join(row["text"] for row in rows(draw)).encode(),
    "a.jsonl": as_lines,
    "a.json": as_json,
    "a.csv": lambda draw: as_table(",", draw),
    "b.csv": lambda draw: as_table(";", draw),
    "a.tsv": lambda draw: as_table("\t", draw),
    "a.parquet": as_parquet,
    "a.arrow": as_arrow,
    "a.jsonl.gz": lambda draw: gzip.compress(as_lines(draw)),
    "a.jsonl.bz2": lambda draw: bz2.compress(as_lines(draw)),
    "a.jsonl.xz": lambda draw: lzma.compress(as_lines(draw)),
    "a.jsonl.zst": lambda draw: pa.Codec("zstd").compress(as_lines(draw)).to_pybytes(),
}


def damage(content: bytes, draw: random.Random) -> bytes:
    """Flip bytes, cut, double or drop a line, cut the end, or swap a value's type."""
    kind = draw.choice(["flip", "flip", "line", "end", "type", "none"])
    if not content or kind == "none":
        return content
    if kind == "flip":
        flipped = bytearray(content)
        for _ in range(draw.randint(1, 3)):
            flipped[draw.randrange(len(flipped))] = draw.choice([draw.randrange(256), *b'"\n\r,;{}[]\\\x00\xff'])
        return bytes(flipped)
    if kind == "end":
        return content[: draw.randrange(len(content))]
    if kind == "line":
        lines = content.split(b"\n")
        number = draw.randrange(len(lines))
        line = lines[number]
        lines[number : number + 1] = draw.choice([[], [line, line], [line[: draw.randint(0, len(line))]]])
        return b"\n".join(lines)
    start = draw.randrange(len(content))
    end = min(len(content), start + draw.randint(0, 8))
    return content[:start] + draw.choice(VALUES).encode() + content[end:]


def expected(path: Path, content: bytes) -> list:
    """The rows, or the text, by an independent reader; an exception if it cannot read the file."""
    name = path.name
    if name.endswith(".parquet"):
        return pq.read_table(io.BytesIO(content)).to_pylist()
    if name.endswith(".arrow"):
        is_file = content.startswith(b"ARROW1")
        open_arrow = pa.ipc.open_file if is_file else pa.ipc.open_stream
        table = open_arrow(io.BytesIO(content)).read_all()
        table.validate(full=True)  # without it, damaged offsets end the process
        return table.to_pylist()
    for suffix, decompress in ((".gz", gzip.decompress), (".bz2", bz2.decompress), (".xz", lzma.decompress)):
        content = decompress(content) if name.endswith(suffix) else content
    if name.endswith(".zst"):
        content = pa.CompressedInputStream(pa.BufferReader(content), "zstd").read()
    if name.endswith(".txt"):
        return [content.decode("utf-8-sig")]
    text = content.decode("utf-8-sig", errors="surrogateescape")  # bad bytes matter in the columns that are used
    if ".jsonl" in name:
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if name.endswith(".json"):
        return json_values(text)
    own = {"a.csv": ",", "b.csv": ";", "a.tsv": "\t"}[name]
    usual = "\t" if name == "a.tsv" else ","
    header = next((line for line in text.split("\n") if line.strip()), "")
    delimiter = own if len(cells(header, own)) > 1 else usual  # a damaged header may show none
    table = [row for row in csv.reader(io.StringIO(text, newline="\n"), delimiter=delimiter, strict=True) if row]
    return [dict(zip(table[0], row, strict=True)) for row in table[1:]]


def cells(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except (csv.Error, StopIteration):
        return []


def json_values(text: str) -> list:
    if text.strip(" \t\r\n").startswith("["):
        return json.loads(text)
    values, place = [], 0
    while text[place:].strip(" \t\r\n"):
        place += len(text[place:]) - len(text[place:].lstrip(" \t\r\n"))
        value, place = json.JSONDecoder().raw_decode(text, place)
        values.append(value)
    return values


def check(path: Path, seed: int) -> bool:
    """Whether the file of this seed was read; what is read or said of it is checked."""
    draw = random.Random(f"{path.name} {seed}")
    content = damage(MAKE[path.name](draw), draw)
    path.write_bytes(content)
    records = list(read_file(path, ReadOptions()))
    problems = [record for record in records if record.problem is not None]
    assert all(record.place.startswith(str(path)) and record.problem for record in problems)
    if not problems:
        found = [record.columns if record.columns is not None else "".join(record.text) for record in records]
        assert repr(found) == repr(expected(path, content))  # repr: NaN is NaN
    for load in (load_conversations, load_labelled_texts, load_preferences):
        options = {"validation_fraction": 0.5, "seed": 0} if load is load_preferences else {}
        try:
            load(str(path), on_bad_record="skip", **options)
        except ValueError as error:
            assert "a." in str(error) or "b." in str(error) or "too few to split" in str(error)
    return not problems


@pytest.mark.parametrize("name", MAKE)
def test_a_damaged_file_is_read_as_others_read_it_or_refused_with_its_place(name, tmp_path):
    was_read = [check(tmp_path / name, seed) for seed in range(100)]
    assert 0.1 < sum(was_read) / len(was_read) < 0.95  # both happen


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKE)
def test_two_thousand_damaged_files_are_read_as_others_read_them_or_refused(name, tmp_path):
    was_read = [check(tmp_path / name, seed) for seed in range(1000, 3000)]
    assert 0.1 < sum(was_read) / len(was_read) < 0.95
