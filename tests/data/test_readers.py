"""The reader of files: each record is read, or refused with its place; none is lost."""

import bz2
import gzip
import json
import lzma
import tracemalloc
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfllm.data.conversations import load_conversations
from hfllm.data.labelled_texts import load_labelled_texts
from hfllm.data.prompts import load_prompts
from hfllm.data.readers import read_documents, read_file
from hfllm.data.records import ReadOptions
from hfllm.data.sources import files_below, is_local, local_paths, named_datasets


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def texts_of(path: Path, **options) -> list[str]:
    """The texts of a file without a problem."""
    records = list(read_documents(path, "text", ReadOptions(**options)))
    assert [record.problem for record in records if record.problem] == []
    return ["".join(record.text) for record in records]


def problems_of(path: Path, **options) -> list[str]:
    return [
        f"{record.place}: {record.problem}"
        for record in read_documents(path, "text", ReadOptions(**options))
        if record.problem
    ]


# Compression, encodings, and what is no text


COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda content: pa.Codec("zstd").compress(content).to_pybytes(),
}


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_every_format_is_read_compressed_by_its_ending(name, ending, tmp_path):
    table = pa.table({"text": ["one\n", "two"]})
    file = pa.BufferOutputStream()
    if name == "a.parquet":
        pq.write_table(table, file)
    elif name == "a.arrow":
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    content = {
        "a.txt": b"one\ntwo",
        "a.jsonl": b'{"text": "one\\n"}\n{"text": "two"}\n',
        "a.json": b'[{"text": "one\\n"}, {"text": "two"}]',
        "a.csv": b'text\n"one\n"\ntwo\n',
    }.get(name) or file.getvalue().to_pybytes()
    path = write(tmp_path / f"{name}.{ending}", COMPRESS[ending](content))
    assert texts_of(path) == (["one\ntwo"] if name == "a.txt" else ["one\n", "two"])
    assert files_below([tmp_path])[0] == [path]


@pytest.mark.parametrize("ending", COMPRESS)
def test_compressed_text_that_is_cut_short_is_refused(ending, tmp_path):
    path = write(tmp_path / f"a.jsonl.{ending}", COMPRESS[ending](b'{"text": "one"}\n' * 1000)[:-12])
    assert len(problems_of(path)) == 1 and "the file cannot be read" in problems_of(path)[0]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_text_is_read_by_its_byte_order_mark(name, encoding, tmp_path):
    content = {"a.txt": "é→文", "a.jsonl": '{"text": "é→文"}', "a.json": '[{"text": "é→文"}]', "a.csv": "text\né→文\n"}
    assert texts_of(write(tmp_path / name, content[name].encode(encoding))) == ["é→文"]


@pytest.mark.parametrize("encoding, name", [("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")])
def test_utf16_without_a_mark_is_refused_and_not_trained_on_as_nul(encoding, name, tmp_path):
    for file in ("a.txt", "a.csv", "a.jsonl"):
        [problem] = problems_of(write(tmp_path / file, "text\nplain\n".encode(encoding)))
        assert "half of its bytes are NUL" in problem and f"iconv -f {name} -t UTF-8 {file}" in problem


def test_bytes_that_are_not_utf16_are_named_with_their_line(tmp_path):
    [problem] = problems_of(write(tmp_path / "a.txt", "one\ntwo".encode("utf-16") + b"\x00\xd8\n\x00"))
    assert "line 2 holds bytes that are not UTF-16" in problem


@pytest.mark.parametrize(
    "name, content, what",
    [
        ("a.xlsx", "zip", "an Excel workbook; save its sheet as .csv"),
        ("a.docx", "zip", "a document with markup"),
        ("a.zip", "zip", "a Zip archive; unpack it"),
        ("a.txt", "zip", "a Zip archive; unpack it"),
        ("a.pdf", b"%PDF-1.7\n", "a PDF"),
        ("a.csv", gzip.compress(b"text\na\n", mtime=0), "compressed by gzip; let its name end in .gz"),
        ("a.tar.gz", gzip.compress(b"\0" * 257 + b"ustar", mtime=0), "a tar archive; unpack it"),
        ("a.sqlite", b"SQLite format 3\x00", "an SQLite database"),
    ],
)
def test_files_that_are_not_text_are_refused_by_their_kind(name, content, what, tmp_path):
    path = tmp_path / name
    if content == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "text")
    else:
        path.write_bytes(content)
    for load in (load_conversations, load_labelled_texts):
        with pytest.raises(ValueError, match=what):
            load(str(path))


def test_a_text_that_only_begins_like_another_format_is_text(tmp_path):
    for text in ("GGUF is a format", "BZh, or bzip2", "PAR1 and PAR2", "PK", "\x00 begins with a NUL"):
        assert texts_of(write(tmp_path / "a.txt", text)) == [text]


# Tables


def test_form_feeds_and_line_separators_are_text_in_every_cell(tmp_path):
    text = "one\x0ctwo\x85three\u2028four\x1cfive"
    path = write(tmp_path / "a.csv", f"text,label\r\n{text},a\r\n{text},b\r\n")
    assert texts_of(path) == [text, text]
    assert load_labelled_texts(str(path)).texts == [text, text]
    path = write(tmp_path / "b.csv", f"prompt,response\n{text},{text}\n")
    assert [message["content"] for message in load_conversations(str(path)).rows[0].messages] == [text, text]


def test_a_cell_of_any_length_is_read(tmp_path):
    text = "x" * 200_000
    path = write(tmp_path / "a.csv", f"prompt,response\n{text},short\n")
    assert load_conversations(str(path)).rows[0].messages[0]["content"] == text


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_surplus_cells_are_refused_with_file_and_line_by_every_loader(end, tmp_path):
    """`Count to three.,1, 2, 3` is not the answer `1`."""
    path = write(tmp_path / "a.csv", end.join(["instruction,output", "Say hi.,hi", "Count to three.,1, 2, 3", ""]))
    with pytest.raises(ValueError, match=r"a\.csv, line 3: 4 cells where the header has 2.*on_bad_record='skip'"):
        load_conversations(str(path))
    skipped = load_conversations(str(path), on_bad_record="skip")
    assert len(skipped.rows) == 1 and skipped.account["bad_records"] == 1
    path = write(tmp_path / "b.csv", end.join(["text,label", "a,b,c", "d,e", ""]))
    assert load_labelled_texts(str(path), on_bad_record="skip").num_bad == 1
    assert problems_of(path) == [f"{path}, line 2: 3 cells where the header has 2"]


@pytest.mark.parametrize("name, cell", [("a.csv", ","), ("a.tsv", "\t")])
def test_a_cell_that_swallows_rows_of_the_table_is_reported_with_its_lines(name, cell, tmp_path, caplog):
    lines = [f"text{cell}label", f"fine{cell}ham", f'"Oh k... watching here:){cell}ham']
    lines += [f"message {number}{cell}ham" for number in range(24)] + [f'he said{cell}no"{cell}spam', f"last{cell}ham"]
    path = write(tmp_path / name, "\n".join(lines) + "\n")
    data = load_labelled_texts(str(path))
    assert len(data) == 3  # as csv has it
    assert f"{path}, line 3: the lines 3 to 28 are one row, and look like 25 rows" in caplog.text


def test_a_text_of_several_lines_is_nothing_to_remark(tmp_path, caplog):
    write(tmp_path / "a.csv", 'text,label\n"first line\nsecond, with a comma\n\nthird",a\n"one\ntwo",b\n')
    assert len(load_labelled_texts(str(tmp_path / "a.csv"))) == 2
    assert caplog.text == ""


def test_a_quotation_mark_that_never_closes_loses_its_line_and_no_other_row(tmp_path):
    rows = "".join(f"message {number},a\n" for number in range(30))
    path = write(tmp_path / "a.csv", f'text,label\nfirst,b\n"open,b\n{rows}')
    with pytest.raises(ValueError, match=r"line 3: not valid CSV: a quotation mark .* never closes it \(lines 3 to 33"):
        load_labelled_texts(str(path))
    data = load_labelled_texts(str(path), on_bad_record="skip")
    assert (len(data), data.num_bad) == (31, 1)
    assert len([record for record in read_documents(path, "text") if not record.problem]) == 31


def test_lines_that_may_be_a_torn_text_are_lost_together_and_counted(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\n"a poem\nwith, a, line\nof its own,x\n')
    data = load_labelled_texts(str(write(tmp_path / "b.csv", "text,label\nok,x\n")))
    assert len(data) == 1
    with pytest.raises(ValueError, match="0 records have an empty text, 3 are bad"):
        load_labelled_texts(str(path), on_bad_record="skip")


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_the_delimiter_of_a_table_is_recognised_by_its_header(delimiter, tmp_path):
    path = write(tmp_path / "a.csv", f"id{delimiter}text\n1{delimiter}plain, with a comma\n")
    assert texts_of(path) == ["plain, with a comma"]
    assert next(read_file(path, ReadOptions())).columns == {"id": "1", "text": "plain, with a comma"}


def test_the_formats_own_delimiter_comes_first_and_an_unclear_one_is_asked_for(tmp_path):
    assert texts_of(write(tmp_path / "a.csv", "text,a;b\nx;y,z\n")) == ["x;y"]
    assert texts_of(write(tmp_path / "b.csv", "text\nx;y\n")) == ["x;y"]
    path = write(tmp_path / "c.csv", "a;text|b\n1;x|y\n")
    assert (
        "may be separated by ';' or '|'" in problems_of(path)[0] and "name one with delimiter" in problems_of(path)[0]
    )
    assert problems_of(path, delimiter=";")[0].endswith(
        "no column 'text' but ['a', 'text|b']; did you mean text_column='text|b'?"
    )
    with pytest.raises(ValueError, match="delimiter=';;': it is one character"):
        ReadOptions(delimiter=";;")


# JSON


def test_objects_one_after_another_are_read_however_they_are_laid_out(tmp_path):
    values = [{"text": "one", "n": {"a": [1]}}, {"text": "two }\n{", "n": 2}]
    for number, content in enumerate(
        [
            "\n".join(json.dumps(value, indent=2) for value in values),
            "".join(map(json.dumps, values)),
            "\n\n".join(map(json.dumps, values)),
            json.dumps(values, indent=1),
            json.dumps({"version": 1, "data": values}, indent=1),
        ]
    ):
        assert texts_of(write(tmp_path / f"{number}.json", content)) == ["one", "two }\n{"]
    [record] = read_file(write(tmp_path / "one.json", json.dumps(values[0], indent=2)), ReadOptions())
    assert record.columns == values[0]


def test_after_a_broken_object_reading_continues_with_the_next(tmp_path):
    path = write(tmp_path / "a.json", '{\n "text": "one"\n}\n{\n "text": \n}\n{\n "text": "three"\n}\n')
    records = list(read_documents(path, "text"))
    assert ["".join(record.text) for record in records] == ["one", "", "three"]
    assert records[1].place == f"{path}, line 4" and "Expecting value in line 6" in records[1].problem
    assert records[2].place == f"{path}, line 7"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "list.json"])
def test_deeply_nested_json_is_refused_with_its_line(name, tmp_path):
    deep = '{"text": "x", "prompt": "x", "response": ' + "[" * 100_000 + "]" * 100_000 + "}"
    good = '{"text": "x", "prompt": "Q", "response": "A"}'
    content = f"[{good},\n{deep}]" if name == "list.json" else f"{good}\n{deep}\n{good}\n"
    path = write(tmp_path / name, content)
    assert [f"{path}, line 2: not valid JSON: objects and lists are nested too deeply"] == [
        problem.split(";")[0].split(" (")[0] for problem in problems_of(path)
    ]
    with pytest.raises(ValueError, match=r"line 2: not valid JSON: objects and lists are nested too deeply"):
        load_conversations(str(path))
    assert len(load_conversations(str(path), on_bad_record="skip").rows) == (1 if name == "list.json" else 2)


def test_a_large_list_is_read_without_having_all_of_it_in_memory(tmp_path):
    row = json.dumps({"text": "x" * 1000})
    path = write(tmp_path / "a.json", "[" + ",\n".join([row] * 20_000) + "]")
    tracemalloc.start()
    assert sum(1 for _ in read_documents(path, "text")) == 20_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < path.stat().st_size / 2


# Arrow


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream"])
def test_a_class_labels_numbers_are_read_by_their_names(kind, tmp_path):
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "spam"])}
    )
    table = datasets.Dataset.from_dict({"text": ["Sorry", "WINNER", "?"], "label": [0, 1, -1]}, features=features)
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        table.to_parquet(path)
    else:
        new = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        with new(str(path), table.data.schema) as writer:
            writer.write_table(table.data.table)
    data = load_labelled_texts(str(path), on_bad_record="skip")
    assert (data.texts, data.labels, data.num_bad) == (["Sorry", "WINNER"], ["ham", "spam"], 1)


def test_a_folder_of_save_to_disk_is_read_and_its_parts_are_asked_for(tmp_path):
    table = datasets.Dataset.from_dict({"text": ["one", "two"], "label": ["a", "b"]})
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "saved")
    assert load_labelled_texts(str(tmp_path / "saved" / "train")).texts == ["one", "two"]
    with pytest.raises(ValueError, match=r"DatasetDict.save_to_disk: name one of \['test', 'train'\]"):
        load_labelled_texts(str(tmp_path / "saved"))


# Texts with several documents


def test_a_separator_line_cuts_a_text_into_documents(tmp_path):
    path = write(tmp_path / "fortunes", "One %\nline two\n%\n\r\nTwo\r\n%\r\n%\nlast")
    records = list(read_documents(path, "text", ReadOptions(document_separator="%")))
    assert ["".join(record.text) for record in records] == ["One %\nline two\n", "\r\nTwo\r\n", "", "last"]
    assert records[1].place == f"{path}, line 4"
    [whole] = read_documents(path, "text", ReadOptions(document_separator="---"))
    assert whole.remark == "no line is '---', so the whole file is one document"
    for wrong in ("", "  ", "a\nb"):
        with pytest.raises(ValueError, match=r"document_separator=.*it is a line of text"):
            ReadOptions(document_separator=wrong)


# Folders, links, names


def test_links_are_followed_once_and_what_is_not_read_is_reported(tmp_path, caplog):
    folder, elsewhere = tmp_path / "texts", tmp_path / "elsewhere"
    write(folder / "a.txt", "a")
    write(folder / "sub" / "b.py", "b")
    write(elsewhere / "c.md", "c")
    (folder / "outside").symlink_to(elsewhere)
    (folder / "again").symlink_to(folder / "sub")
    (folder / "sub" / "loop").symlink_to(folder)
    (elsewhere / "up").symlink_to(tmp_path)
    (folder / "broken").symlink_to(tmp_path / "nowhere")
    (folder / "same.txt").symlink_to(folder / "a.txt")
    files, ignored = files_below([folder])
    assert files == [folder / "a.txt", folder / "outside" / "c.md", folder / "sub" / "b.py"]
    assert ignored == {
        "links to nothing": 1,
        "links to folders that are read already": 3,
        "links to files that are read already": 1,
    }
    assert "1 links to nothing" in caplog.text


def test_a_link_to_a_folder_of_texts_is_a_folder_of_texts(tmp_path):
    write(tmp_path / "real" / "a.txt", "a")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert files_below([tmp_path / "link"])[0] == [tmp_path / "link" / "a.txt"]
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"gone'. It is a link to .*nowhere', which is not there"):
        local_paths(str(tmp_path / "gone"), dataset_config=None, split="train")


def test_folders_that_runs_write_are_left_out_and_reported(tmp_path, caplog):
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "out" / "mine" / "samples.txt", "written by the run")
    write(tmp_path / "out" / "tokenizer" / "arguments.yaml", "vocab_size: 300")
    write(tmp_path / "out" / "tokenizer" / "tokenizer.json", "{}")
    files, _ = files_below([tmp_path], exclude=[str(tmp_path / "out" / "mine")])
    assert files == [tmp_path / "a.txt"]
    assert "mine', which a run writes" in caplog.text and "tokenizer', which a run writes" in caplog.text
    with pytest.raises(ValueError, match="is the folder that is written to"):
        files_below([tmp_path], exclude=[tmp_path])


def test_names_may_be_patterns_and_a_file_that_is_there_comes_before_commas(tmp_path, caplog):
    for name in ("a.txt", "b.txt", "c.bin", "a, b.txt"):
        write(tmp_path / name, name)

    def names(dataset: str) -> list[str]:
        return [path.name for path in local_paths(dataset, dataset_config=None, split="train")]

    assert names(f"{tmp_path}/[ab].txt") == ["a.txt", "b.txt"]
    assert names(f"{tmp_path}/*") == ["a, b.txt", "a.txt", "b.txt"] and "1 .bin" in caplog.text
    assert names(f"{tmp_path}/a, b.txt") == ["a, b.txt"]
    assert names(f"{tmp_path}/a.txt, {tmp_path}/b.txt") == ["a.txt", "b.txt"]
    with pytest.raises(FileNotFoundError, match="matches no file that can be read, but nothing"):
        names(f"{tmp_path}/*.csv")
    assert is_local(f"{tmp_path}/a, b.txt") and is_local("stdlib") and not is_local("owner/name")


def test_a_file_without_an_ending_is_text_and_an_unknown_ending_is_refused(tmp_path):
    assert texts_of(write(tmp_path / "LICENSE", "free")) == ["free"]
    assert files_below([tmp_path / "LICENSE"])[0] == [tmp_path / "LICENSE"]
    with pytest.raises(ValueError, match=r"data\.cvs' ends in \.cvs; read are .*\.csv"):
        files_below([write(tmp_path / "data.cvs", "text\na\n")])


def test_several_datasets_are_told_apart_by_short_names(tmp_path):
    assert named_datasets("texts/fr.txt, uk.txt.gz,zh/") == {"fr": "texts/fr.txt", "uk": "uk.txt.gz", "zh": "zh/"}
    assert list(named_datasets("a/test.txt,b/test.txt,owner/my-set")) == ["test", "test_2", "my_set"]
    there = str(write(tmp_path / "a, b.txt", "x"))
    assert named_datasets(there) == {"a_b": there}


# One account


def test_columns_that_are_not_used_are_named_in_one_line(tmp_path, caplog):
    rows = [{"prompt": "Q", "response": "A", "id": n, "note": None, "topic": "x"} for n in range(3)]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_conversations(str(path))
    assert loaded.account["unused_columns"] == ["id", "topic"]
    assert caplog.messages == [f"{path}: not used: id, topic."]


def test_prompts_are_read_as_everything_else(tmp_path):
    assert load_prompts(str(write(tmp_path / "a.txt", b"\xef\xbb\xbfOne\r\n\n Two "))) == ["One", " Two "]
    assert load_prompts(str(write(tmp_path / "b.txt", "One\nTwo".encode("utf-16")))) == ["One", "Two"]
    assert load_prompts(str(write(tmp_path / "a.jsonl", '{"prompt": "One\\nTwo"}\n'))) == ["One\nTwo"]
    assert load_prompts(str(write(tmp_path / "a.csv", "prompt,n\nOne,1\n"))) == ["One"]
    for name, content, message in (
        ("c.txt", b"caf\xe9", "line 1 holds bytes that are not UTF-8"),
        ("c.jsonl", b'{"prompt": 5}', "line 1: its 'prompt' is a number, not a string"),
        ("d.jsonl", b'{"prompts": "x"}', "no column 'prompt' but"),
        ("e.txt", b"\n", "holds no prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            load_prompts(str(write(tmp_path / name, content)))
