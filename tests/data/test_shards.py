import gzip
import itertools
import json
import os
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hfllm.data import find_shards, hold_out, load_corpus, shards, sources


def write_lines(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(found: shards.Shards) -> list[list[str]]:
    """The texts of each shard."""
    records = [list(shard.records()) for shard in found.shards]
    assert [record.problem for some in records for record in some if record.problem] == []
    return [["".join(record.text) for record in some] for some in records]


@pytest.fixture
def as_on_the_hub(monkeypatch):
    """A folder, streamed by `datasets` as it streams from the Hub, replaces a dataset there."""
    monkeypatch.setattr(sources, "_local_paths", lambda dataset: [])


@pytest.mark.parametrize("piece_bytes", [1, 7, 30, 100, 1 << 20])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_pieces_of_a_file_of_lines_have_each_line_once(tmp_path, monkeypatch, piece_bytes, end):
    monkeypatch.setattr(shards, "MOST_PIECE_BYTES", piece_bytes)
    texts = ["one", "two\n\nlines", "ü文" * 20, "", "five"]
    lines = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in texts]
    lines.insert(2, b"")  # a blank line is no record
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + end.join(lines))  # a byte-order mark, and no line end at the end
    found = find_shards(str(path))
    assert len(found.shards) == max(1, round(path.stat().st_size / piece_bytes))
    assert list(itertools.chain(*texts_of(found))) == texts
    assert sum(shard.num_bytes for shard in found.shards) == found.num_bytes == path.stat().st_size


def test_a_large_file_is_cut_into_256_shards_or_more_and_a_small_one_is_not(tmp_path, monkeypatch):
    path = write_lines(tmp_path / "a.jsonl", ["x" * 10_000] * 500)
    assert len(find_shards(str(path)).shards) == round(path.stat().st_size / 2**16) == 76
    monkeypatch.setattr(shards, "LEAST_PIECE_BYTES", 1)
    sizes = [shard.num_bytes for shard in find_shards(str(path)).shards]
    assert len(sizes) == 256 and max(sizes) - min(sizes) <= 1
    monkeypatch.setattr(shards, "MOST_PIECE_BYTES", 10_000)
    assert len(find_shards(str(path)).shards) == 501


def test_a_bad_line_of_a_piece_is_named_by_its_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_PIECE_BYTES", 20)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the first"}\n{"text": "the second"}\n{"text": 3}\n')
    problems = [record for shard in find_shards(str(path)).shards for record in shard.records() if record.problem]
    assert [(record.place, record.problem) for record in problems] == [
        (f"{path}, the line at byte 45", "its 'text' is a number, not a string")
    ]
    assert path.read_bytes()[45:].startswith(b'{"text": 3}')


@pytest.mark.parametrize(("piece_bytes", "num_shards"), [(1, 4), (1 << 20, 1)])
def test_a_parquet_file_is_cut_between_row_groups(tmp_path, monkeypatch, piece_bytes, num_shards):
    monkeypatch.setattr(shards, "MOST_PIECE_BYTES", piece_bytes)
    texts = [f"text {number}" for number in range(35)]
    pq.write_table(pa.table({"text": [*texts, None], "id": range(36)}), tmp_path / "a.parquet", row_group_size=10)
    found = find_shards(str(tmp_path / "a.parquet"))
    assert len(found.shards) == num_shards
    records = [record for shard in found.shards for record in shard.records()]
    assert ["".join(record.text) for record in records if record.problem is None] == texts
    assert records[-1].place == f"{tmp_path / 'a.parquet'}, row 36"


def test_other_files_are_a_shard_each_and_empty_ones_none(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_PIECE_BYTES", 4)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a longer text\nof two lines")
    (tmp_path / "texts" / "b.txt").write_text("")
    (tmp_path / "texts" / "c.csv").write_text("text\nthird\nfourth\n")
    (tmp_path / "texts" / "d.json").write_text('[{"text": "fifth"}, {"text": "sixth"}]')
    found = find_shards(str(tmp_path / "texts"))
    assert [shard.name for shard in found.shards] == ["a.txt", "c.csv", "d.json"]
    assert texts_of(found) == [["a longer text\nof two lines"], ["third", "fourth"], ["fifth", "sixth"]]
    for path in (tmp_path / "texts").iterdir():
        path.write_text("")
    with pytest.raises(ValueError, match="has no text: 4 files, all of them empty"):
        find_shards(str(tmp_path / "texts"))


def test_files_that_cannot_be_cut_are_a_shard_and_a_separator_cuts_within_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MOST_PIECE_BYTES", 4)
    (tmp_path / "a.jsonl").write_bytes('{"text": "first"}\n{"text": "second"}'.encode("utf-16"))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "third"}\n{"text": "fourth"}\n'))
    (tmp_path / "c.txt").write_text("fifth\n%\nsixth")
    found = find_shards(str(tmp_path), document_separator="%")
    assert texts_of(found) == [["first", "second"], ["third", "fourth"], ["fifth\n", "sixth"]]
    assert found.reading == {"document_separator": "%"} and find_shards(str(tmp_path)).reading == {}


def test_the_standard_library_is_streamed_as_it_is_loaded(tmp_path):
    found = find_shards("stdlib")
    loaded = load_corpus("stdlib", cache_dir=tmp_path).documents.with_format("arrow")
    lengths: dict[int, int] = {}
    for batch in loaded.iter(1000):
        for text, document in zip(batch["text"], batch["document"].to_pylist()):
            lengths[document] = lengths.get(document, 0) + text.as_buffer().size
    assert [len(text.encode()) for texts in texts_of(found) for text in texts if text] == list(lengths.values())


def test_what_identifies_the_files_goes_with_them_and_notices_changes(tmp_path):
    folder = tmp_path / "here"
    path = write_lines(folder / "a.jsonl", ["one", "two"])
    write_lines(folder / "deep" / "b.jsonl", ["x" * 300_000 + "middle" + "x" * 300_000])
    contents = find_shards(str(folder)).contents
    assert [name for name, _ in contents] == ["a.jsonl", "deep/b.jsonl"]
    folder.rename(tmp_path / "there")
    os.utime(tmp_path / "there" / "a.jsonl", (0, 0))  # as copied to another machine
    assert find_shards(str(tmp_path / "there")).contents == contents
    for old, new in (("two", "owt"), ("two", "too many"), ("middle", "muddle")):
        for path in (tmp_path / "there").rglob("*.jsonl"):
            before = path.read_text()
            path.write_text(before.replace(old, new))
            assert (find_shards(str(tmp_path / "there")).contents == contents) == (old not in before)
            path.write_text(before)


def test_wrong_names_and_options_are_the_errors_of_load_corpus(tmp_path, monkeypatch):
    write_lines(tmp_path / "verdict.jsonl", ["x"])
    with pytest.raises(FileNotFoundError, match=r"Nearest: .*verdict\.jsonl"):
        find_shards(str(tmp_path / "verdikt.jsonl"))
    with pytest.raises(ValueError, match="only datasets on the Hub"):
        find_shards("stdlib", split="test")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="'nobody/nothing' is neither a file or folder here nor"):
        find_shards("nobody/nothing")


def test_a_dataset_of_the_hub_has_a_shard_for_each_file(tmp_path, as_on_the_hub):
    for split in ("train", "test"):
        for number in range(3):
            texts = [f"{split} {number} {row}" for row in range(100)]
            write_lines(tmp_path / "hub" / f"{split}-{number}.jsonl", texts)
    found = find_shards(str(tmp_path / "hub"), split="test")
    assert texts_of(found) == [[f"test {number} {row}" for row in range(100)] for number in range(3)]
    assert [Path(shard.name).name for shard in found.shards] == ["test-0.jsonl", "test-1.jsonl", "test-2.jsonl"]
    sizes = [(tmp_path / "hub" / f"test-{number}.jsonl").stat().st_size for number in range(3)]
    assert [shard.num_bytes for shard in found.shards] == sizes and found.num_bytes == sum(sizes)
    with pytest.raises(ValueError, match=r"no column 'content' but \['text'\].*text_column"):
        find_shards(str(tmp_path / "hub"), text_column="content")
    with pytest.raises(ValueError, match=r"split='dev'.*Bad split: dev"):
        find_shards(str(tmp_path / "hub"), split="dev")
    with pytest.raises(ValueError, match="dataset_config='english'"):
        find_shards(str(tmp_path / "hub"), dataset_config="english")

    contents = found.contents
    write_lines(tmp_path / "hub" / "test-1.jsonl", ["changed"])
    changed = find_shards(str(tmp_path / "hub"), split="test").contents
    assert [before == after for before, after in zip(contents, changed)] == [True, False, True]


def test_few_parquet_files_of_the_hub_are_cut_between_row_groups(tmp_path, as_on_the_hub):
    (tmp_path / "hub").mkdir()
    for number in range(2):
        table = pa.table({"id": range(10), "text": [f"{number} {row}" for row in range(10)]})
        pq.write_table(table, tmp_path / "hub" / f"train-{number}.parquet", row_group_size=4)
    found = find_shards(str(tmp_path / "hub"))
    assert texts_of(found) == [
        [f"{number} {row}" for row in rows] for number in range(2) for rows in (range(4), range(4, 8), range(8, 10))
    ]
    assert len(found.contents) == 2


def test_a_file_of_the_hub_that_cannot_be_read_to_its_end_says_how_far(tmp_path, as_on_the_hub):
    write_lines(tmp_path / "hub" / "train-0.jsonl", ["good"])
    (tmp_path / "hub" / "train-1.jsonl").write_text('{"text": "good"}\n{"text": \n')
    write_lines(tmp_path / "hub" / "train-2.jsonl", ["good"])
    records = [list(shard.records()) for shard in find_shards(str(tmp_path / "hub")).shards]
    assert [len(some) for some in records] == [1, 1, 1]
    assert records[1][0].problem.startswith("cannot be read after row 0: ")


def test_documents_are_held_out_of_shards_from_everywhere_up_to_a_share_of_the_bytes(tmp_path):
    for number in range(100):
        write_lines(
            tmp_path / "texts" / f"{number:02}.jsonl", [f"{number:02} {row:02} " + "x" * 94 for row in range(50)]
        )
    found = find_shards(str(tmp_path / "texts"))  # 5,000 documents of 100 bytes
    held_out = hold_out(found, fraction=0.05, cache_dir=tmp_path)
    texts = held_out.documents["text"][:]
    assert abs(len(texts) - 0.05 * found.num_bytes / 100) < 2
    by_shard = [text[:2] for text in texts]
    assert len(set(by_shard)) == shards.HELD_OUT_SHARDS
    assert all(3 <= by_shard.count(shard) <= 6 for shard in set(by_shard))
    again = hold_out(found, fraction=0.05, cache_dir=tmp_path / "other")
    assert again.documents["text"][:] == texts and again.fingerprint == held_out.fingerprint


def test_where_shards_are_small_more_of_them_are_read_for_what_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "HELD_OUT_SHARDS", 2)
    for number in range(10):
        write_lines(tmp_path / "texts" / f"{number}.jsonl", [f"{number} " + "x" * 98])
    found = find_shards(str(tmp_path / "texts"))
    assert len(hold_out(found, fraction=0.5, cache_dir=tmp_path).documents) == 6
    assert len(hold_out(found, cache_dir=tmp_path).documents) == 10  # no share is given: all of them are wanted


def test_a_document_too_large_to_hold_out_is_passed_over(tmp_path):
    write_lines(tmp_path / "a.jsonl", ["x" * 2000, "small", "y" * 2000])
    found = find_shards(str(tmp_path / "a.jsonl"))
    assert hold_out(found, fraction=0.1, cache_dir=tmp_path).documents["text"][:] == ["small"]
    with pytest.raises(ValueError, match=r"40 bytes .* each of its 2 documents is larger. Hold back a larger fraction"):
        hold_out(
            find_shards(str(write_lines(tmp_path / "b.jsonl", ["x" * 2000, "y" * 2000]))),
            fraction=0.01,
            cache_dir=tmp_path,
        )
    for fraction in (0, 1, 1.5):
        with pytest.raises(ValueError, match=f"fraction={fraction}: it is more than 0 and less than 1"):
            hold_out(found, fraction=fraction)


def test_bad_records_among_the_held_out_stop_or_are_skipped(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": 1}\n' + '{"text": "good"}\n' * 20)
    found = find_shards(str(path))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: its 'text' is a number.*on_bad_record='skip'"):
        hold_out(found, fraction=0.1, cache_dir=tmp_path)
    held_out = hold_out(found, fraction=0.1, on_bad_record="skip", cache_dir=tmp_path)
    assert held_out.account["bad_records"] == 1 and held_out.documents["text"][0] == "good"


def test_a_dataset_of_the_hub_that_cannot_be_streamed_says_so(tmp_path, as_on_the_hub, monkeypatch):
    write_lines(tmp_path / "hub" / "train.jsonl", ["x"])

    def refuse(self, split):
        raise NotImplementedError("TAR archives cannot be streamed.")

    monkeypatch.setattr(datasets.ArrowBasedBuilder, "as_streaming_dataset", refuse)
    with pytest.raises(ValueError, match=r"cannot be streamed.*without streaming"):
        find_shards(str(tmp_path / "hub"))
