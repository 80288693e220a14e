import hashlib
import json
import random
import re
import sysconfig
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Regex, pre_tokenizers

from hfllm.data import load_corpus, sources
from hfllm.data.conversations import load_conversations
from hfllm.data.corpus import CUTS, PART_CHARACTERS, cut_into_parts
from hfllm.data.labelled_texts import load_labelled_texts


GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+" + CONTRACTIONS + "?"
PATTERNS = {
    "llama3": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + OTHERS,
    "qwen": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + OTHERS,
    "gpt4o": CASED + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def texts_of(corpus) -> list[str]:
    """The documents' texts, their parts joined."""
    texts: dict[int, str] = {}
    for row in corpus.documents:
        texts[row["document"]] = texts.get(row["document"], "") + row["text"]
    return list(texts.values())


@pytest.fixture
def load(tmp_path):
    """load_corpus with a cache of its own, in tmp_path/cache."""
    return lambda dataset, **options: load_corpus(str(dataset), cache_dir=tmp_path / "cache", **options)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_every_format_gives_the_same_documents(tmp_path, load):
    texts = ["One.\nTwo.", 'Quotes " and, commas', "Ünï → 文"]
    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write(tmp_path / "list.json", json.dumps(rows, indent=2))
    write(tmp_path / "lines.json", "\n".join(json.dumps(row) for row in rows))
    write(
        tmp_path / "a.csv",
        "id,text\n" + "".join('{},"{}"\n'.format(i, t.replace('"', '""')) for i, t in enumerate(texts)),
    )
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "b.csv")

    corpora = [load(path) for path in sorted(tmp_path.iterdir())]
    assert len(corpora) == 6
    assert all(texts_of(corpus) == texts for corpus in corpora)
    assert len({corpus.fingerprint for corpus in corpora}) == 1


def test_a_text_file_is_one_document_with_its_line_ends_untouched(tmp_path, load):
    text = "one\r\ntwo\rthree\n\n four\x00\x0b\u2028five"  # NUL is text as well
    corpus = load(write(tmp_path / "a.txt", text))
    assert texts_of(corpus) == [text]
    assert corpus.account["documents"] == 1 and corpus.account["bytes"] == len(text.encode())


def test_a_folder_is_read_in_sorted_order_and_other_files_are_counted(tmp_path, load):
    folder = tmp_path / "texts"
    write(folder / "b.txt", "second")
    write(folder / "a" / "z.JSONL", '{"text": "first"}\n\n')
    write(folder / "c.csv", "text\nthird\n")
    write(folder / "d.md", "fourth")
    write(folder / "notes.docx", "no")
    write(folder / "Makefile", "no")
    write(folder / ".git" / "x.txt", "no")
    corpus = load(folder)
    assert texts_of(corpus) == ["first", "second", "third", "fourth"]
    assert corpus.account["ignored_files"] == {"hidden": 1, "no suffix": 1, ".docx": 1}
    assert corpus.account["files"] == 4


def test_several_paths_are_separated_by_commas(tmp_path, load):
    paths = [write(tmp_path / name, name) for name in ("b.txt", "a.txt")]
    assert texts_of(load(f"{paths[0]}, {paths[1]}")) == ["b.txt", "a.txt"]


@pytest.mark.fault(15)
def test_byte_order_marks_at_the_start_are_dropped_and_elsewhere_kept(tmp_path, load):
    bom = b"\xef\xbb\xbf"
    assert texts_of(load(write(tmp_path / "a.txt", bom + "a\ufeffb".encode()))) == ["a\ufeffb"]
    assert texts_of(load(write(tmp_path / "a.jsonl", bom + b'{"text": "x"}'))) == ["x"]
    assert texts_of(load(write(tmp_path / "a.json", bom + b'[{"text": "x"}]'))) == ["x"]
    assert texts_of(load(write(tmp_path / "a.csv", bom + b"text\nx\n"))) == ["x"]


@pytest.mark.fault(14, 15)
@pytest.mark.parametrize(
    ("name", "content", "line", "problem"),
    [
        ("a.jsonl", b'{"text": "good"}\n{"text": \n', "line 2", "not valid JSON"),
        ("a.jsonl", b'{"text": "good"}\n["a"]\n', "line 2", "a list, not an object"),
        ("a.jsonl", b'{"text": "good"}\n\n{"texts": "a"}\n', "line 3", "did you mean text_column='texts'"),
        ("a.jsonl", b'{"text": "good"}\n{"text": null}\n', "line 2", "'text' is null, not a string"),
        ("a.jsonl", b'{"text": "good"}\n{"text": 7}\n', "line 2", "'text' is a number, not a string"),
        ("a.jsonl", b'{"text": "good"}\n{"text": "\\ud800"}\n', "line 2", "half a surrogate pair"),
        ("a.jsonl", b'{"text": "good"}\n{"text": "a\xff"}\n', "line 2", "not UTF-8"),
        ("a.json", b'[{"text": "good"},\n{"text": "a\xff"}]', "line 2", "not UTF-8"),
        ("a.json", b'[{"text": "good"},\n {"text": 1}]', "line 2", "number, not a string"),
        ("a.json", b'[{"text": "good"},\n {"text": "a"', "line 2", "delimiter in line 2; the rest of the file"),
        ("a.json", b'[{"text": "good"}\n {"text": "a"}]', "line 2", "a comma or a closing bracket is missing"),
        ("a.json", b'[{"text": "good"},\n]', "line 2", "not valid JSON: Expecting value"),
        ("a.json", b'[{"text": "good"}]\n[]', "line 2", "there is something after the list"),
        ("a.json", b'{"text": "good"}\n{"text": \n}', "line 2", "not valid JSON: Expecting value in line 3"),
        ("a.jsonl", b'{"text": "good"}\n{"text": "a", "text": "b"}', "line 2", "the key 'text' more than once"),
        ("a.csv", b'text,id\ngood,1\n"a\xff",2\n', "line 3", "not UTF-8"),
        ("a.csv", b'text,id\n"go\nod",1\nshort\n', "line 4", "1 cells where the header has 2"),
        ("a.csv", b'text,id\ngood,1\n"open,2\n', "line 3", "not valid CSV"),
    ],
)
def test_a_bad_record_stops_with_its_place_or_is_skipped_and_counted(tmp_path, load, name, content, line, problem):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match="on_bad_record='skip'") as raised:
        load(path)
    assert name in str(raised.value) and line in str(raised.value) and problem in str(raised.value)
    corpus = load(path, on_bad_record="skip")
    assert [text.replace("\n", "") for text in texts_of(corpus)] == ["good"]
    assert corpus.account["bad_records"] == 1
    assert problem in corpus.account["bad_record_examples"][0]


@pytest.mark.fault(15)
def test_a_text_file_that_is_not_utf8_is_named_with_line_and_byte_and_skipped_whole(tmp_path, load):
    write(tmp_path / "texts" / "a.txt", "ä" * 600_000 + "\n\n" + "x" * 600_000 + "\nab")  # more than one piece
    bad = write(tmp_path / "texts" / "b.txt", ("ä" * 600_000 + "\n\n" + "x" * 600_000 + "\nab").encode() + b"\xc3")
    with pytest.raises(ValueError, match=r"b\.txt: line 4 .* byte 1,800,005\)"):
        load(tmp_path / "texts")
    corpus = load(tmp_path / "texts", on_bad_record="skip")
    assert corpus.account["documents"] == 1 and corpus.account["bytes"] == bad.stat().st_size - 1


def test_a_parquet_file_says_the_row_of_a_bad_record(tmp_path, load):
    rows = pa.table({"text": ["a"] * 70 + [None, "b"]})
    pq.write_table(rows, tmp_path / "a.parquet", row_group_size=50)
    with pytest.raises(ValueError, match=r"a\.parquet, row 71: its 'text' is null"):
        load(tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet", on_bad_record="skip").account["documents"] == 71
    broken = write(tmp_path / "b.parquet", (tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"b\.parquet: not a readable Parquet file"):
        load(broken)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_a_column_that_every_record_lacks_is_an_error_even_when_skipping(tmp_path, load, name):
    table = datasets.Dataset.from_dict({"content": ["a", "b"], "id": [1, 2]})
    getattr(table, {".jsonl": "to_json", ".csv": "to_csv", ".parquet": "to_parquet"}[Path(name).suffix])(
        tmp_path / name
    )
    with pytest.raises(ValueError, match=r"no column 'text' but \['content', 'id'\].*text_column"):
        load(tmp_path / name)
    with pytest.raises(ValueError, match=r"No record of .* has the column asked for.*\['content', 'id'\]"):
        load(tmp_path / name, on_bad_record="skip")
    assert texts_of(load(tmp_path / name, text_column="content")) == ["a", "b"]


@pytest.mark.fault(16)
def test_empty_documents_and_files_are_dropped_and_counted(tmp_path, load):
    write(tmp_path / "texts" / "a.txt", "")
    write(tmp_path / "texts" / "b.jsonl", '{"text": ""}\n{"text": "x"}\n')
    write(tmp_path / "texts" / "c.txt", b"\xef\xbb\xbf")
    corpus = load(tmp_path / "texts")
    assert texts_of(corpus) == ["x"]
    assert corpus.account["empty_documents"] == 3
    assert set(corpus.documents["document"]) == {0}


@pytest.mark.fault(16)
def test_a_corpus_with_nothing_in_it_says_so(tmp_path, load):
    with pytest.raises(ValueError, match="has no text: 1 document, and nothing in any of them"):
        load(write(tmp_path / "a.txt", ""))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="what is there: nothing"):
        load(tmp_path / "folder")
    write(tmp_path / "folder" / "a.docx", "x")
    with pytest.raises(ValueError, match=r"what is there: 1 \.docx"):
        load(tmp_path / "folder")
    with pytest.raises(ValueError, match="Nothing is left of"):
        load(write(tmp_path / "a.jsonl", '{"text": ""}\n{"text": 1}\n'), on_bad_record="skip")


def test_a_wrong_path_names_the_nearest_ones(tmp_path, load):
    write(tmp_path / "verdict.txt", "x")
    with pytest.raises(FileNotFoundError, match=r"Nearest: .*verdict\.txt"):
        load(tmp_path / "verdikt.txt")
    with pytest.raises(ValueError, match="Rename plain text to"):
        load(write(tmp_path / "book.cvs", "x"))


def test_options_that_do_not_apply_are_errors(tmp_path, load):
    path = write(tmp_path / "a.txt", "x")
    with pytest.raises(ValueError, match="only datasets on the Hub"):
        load(path, split="validation")
    with pytest.raises(ValueError, match="only datasets on the Hub"):
        load("stdlib", dataset_config="en")
    with pytest.raises(ValueError, match="on_bad_record='ignore'"):
        load(path, on_bad_record="ignore")


def test_an_unreachable_dataset_says_what_would_do(load, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"'nobody/nothing' is neither a file or folder here nor .* 'stdlib'"):
        load("nobody/nothing")


def test_a_dataset_of_the_hub_is_read_by_split_and_column(tmp_path, load, monkeypatch, caplog):
    # A folder, loaded by `datasets` as it loads from the Hub, replaces one.
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "downloads")
    monkeypatch.setattr(sources, "_local_paths", lambda dataset: [])
    for split in ("train", "test"):
        rows = "".join(json.dumps({"content": f"{split} {n}" if n else None}) + "\n" for n in range(100))
        write(tmp_path / "hub" / f"{split}.jsonl", rows)
    with pytest.raises(ValueError, match="row 1: its 'content' is null"):
        load(tmp_path / "hub", split="test", text_column="content")
    announced = [message for message in caplog.messages if message.startswith("Downloading the dataset")]
    assert len(announced) == 1 and re.search(r"hub' from the Hub, revision \w+\.", announced[0])
    corpus = load(tmp_path / "hub", split="test", text_column="content", on_bad_record="skip")
    assert texts_of(corpus) == [f"test {n}" for n in range(1, 100)]
    assert [message for message in caplog.messages if message.startswith("Downloading the dataset")] == announced
    assert load(tmp_path / "hub", text_column="content", on_bad_record="skip").fingerprint != corpus.fingerprint
    with pytest.raises(ValueError, match=r"no column 'text' but \['content'\]"):
        load(tmp_path / "hub")
    with pytest.raises(ValueError, match="Unknown split"):
        load(tmp_path / "hub", split="dev", text_column="content")
    with pytest.raises(ValueError, match="dataset_config='english'"):
        load(tmp_path / "hub", dataset_config="english", text_column="content")


def test_stdlib_is_the_library_without_its_tests(load):
    corpus = load("stdlib")
    assert corpus.account["bytes"] > 8_000_000 and corpus.account["bad_records"] == 0
    texts = texts_of(corpus)
    root = Path(sysconfig.get_path("stdlib"))
    for name in ("json/decoder.py", "ast.py"):
        assert (root / name).read_bytes().decode() in texts
    for name in ("sqlite3/__init__.py", "_sysconfigdata__linux_x86_64-linux-gnu.py"):
        if (root / name).exists():
            assert ((root / name).read_bytes().decode() in texts) == (name == "sqlite3/__init__.py")
    assert not any("import pytest" in text or "site-packages/torch" in text for text in texts)


def test_the_fingerprint_covers_texts_boundaries_and_order(tmp_path, load):
    def fingerprint(*texts: str) -> str:
        return load(write(tmp_path / "a.jsonl", "".join(json.dumps({"text": t}) + "\n" for t in texts))).fingerprint

    digests = [hashlib.sha256(text).digest() for text in (b"ab", b"c")]
    assert fingerprint("ab", "c") == hashlib.sha256(b"".join(digests)).hexdigest()
    assert len({fingerprint("ab", "c"), fingerprint("a", "bc"), fingerprint("c", "ab"), fingerprint("abc")}) == 4


def test_a_long_text_file_is_cut_into_parts_that_give_the_file_when_joined(tmp_path, load):
    text = "".join(f"def f{n}():\r\n    return {n}\n\n\n" for n in range(50_000))  # 1.5 MB
    path = write(tmp_path / "long.txt", text)
    corpus = load(path)
    parts = corpus.documents["text"][:]
    assert len(parts) >= 20 and max(map(len, parts)) <= PART_CHARACTERS
    assert "".join(parts).encode() == path.read_bytes()
    assert set(corpus.documents["document"]) == {0}
    assert corpus.fingerprint == hashlib.sha256(hashlib.sha256(path.read_bytes()).digest()).hexdigest()


def test_parts_do_not_depend_on_how_the_text_was_read():
    text = "word " * 30_000 + "x" * 100_000 + "\n" * 100_000
    whole = list(cut_into_parts([text]))
    assert whole == list(cut_into_parts(text[start : start + 777] for start in range(0, len(text), 777)))
    assert "".join(whole) == text and max(map(len, whole)) <= PART_CHARACTERS


@pytest.mark.parametrize("name", ["gpt2", *PATTERNS])
def test_pre_tokenizers_do_not_notice_the_cuts(name):
    pre_tokenizer = GPT2 if name == "gpt2" else pre_tokenizers.Split(Regex(PATTERNS[name]), "isolated")

    def words(text: str) -> list[str]:
        return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]

    alphabet = [
        "a",
        "B",
        "1",
        "23",
        " ",
        " ",
        "\n",
        "\n",
        "\r\n",
        "\t",
        "'",
        "s",
        ".",
        "/",
        "é",
        "文",
        "\u0301",
        "\u00a0",
    ]
    generator = random.Random(0)
    num_cuts = 0
    for _ in range(300):
        text = "".join(generator.choices(alphabet, k=40))
        ends = {match.end() for cut in CUTS[:2] for end in range(len(text)) if (match := cut.match(text, 0, end))}
        num_cuts += len(ends)
        for end in ends:
            assert words(text[:end]) + words(text[end:]) == words(text), (text, end)
    assert num_cuts > 800


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    """A reader of dictionaries would silently take the last one."""
    (tmp_path / "twice.csv").write_text("text,label,text\na b,1,c d\n")
    with pytest.raises(ValueError, match=r"twice.csv, line 1: the header has 'text' more than once"):
        load_corpus(str(tmp_path / "twice.csv"), cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"twice.csv, line 1: the header has 'text' more than once"):
        load_labelled_texts(str(tmp_path / "twice.csv"))
    with pytest.raises(ValueError, match=r"twice.csv, line 1: the header has 'text' more than once"):
        load_conversations(str(tmp_path / "twice.csv"))


def test_the_files_of_a_folder_that_are_not_read_are_reported(tmp_path, caplog):
    for name in ("a.txt", "b.log", "c.log", "d.bin", ".hidden"):
        (tmp_path / name).write_text("a text")
    load_corpus(str(tmp_path), cache_dir=tmp_path / "cache")
    assert f"Not read of {tmp_path}: 2 .log, 1 .bin; read are .txt" in caplog.text


def test_a_separator_cuts_a_text_into_documents_and_is_part_of_what_is_cached(tmp_path, load, caplog):
    path = write(tmp_path / "fortunes", "One.\n%\nTwo.\n%\n")
    assert texts_of(load(path)) == ["One.\n%\nTwo.\n%\n"]
    assert texts_of(load(path, document_separator="%")) == ["One.\n", "Two.\n"]
    load(path, document_separator="---")
    assert "no line is '---', so the whole file is one document" in caplog.text


def test_the_account_says_how_much_is_from_each_file(tmp_path, load):
    write(tmp_path / "texts" / "a.txt", "four")
    write(tmp_path / "texts" / "b.jsonl", '{"text": "x", "id": 1}\n{"text": ""}\n{"text": "yz", "url": ""}\n')
    account = load(tmp_path / "texts").account
    assert account["sources"] == [
        {"name": str(tmp_path / "texts" / "a.txt"), "documents": 1, "bytes": 4},
        {"name": str(tmp_path / "texts" / "b.jsonl"), "documents": 2, "bytes": 3},
    ]
    assert account["unused_columns"] == ["id", "url"]


def test_a_run_below_the_folder_of_its_text_reads_the_same_text_again(tmp_path, load):
    write(tmp_path / "texts" / "a.txt", "text")
    first = load(tmp_path / "texts", exclude=[tmp_path / "texts" / "run"])
    write(tmp_path / "texts" / "run" / "samples.txt", "written by the run")
    assert load(tmp_path / "texts", exclude=[tmp_path / "texts" / "run"]).fingerprint == first.fingerprint
    assert load(tmp_path / "texts").fingerprint != first.fingerprint
