import errno
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pyarrow as pa
import pytest

from hfllm.data import load_corpus
from hfllm.data.cache import batch_verifier, cached_dataset


SCHEMA = pa.schema([("number", pa.int64())])


def write_numbers(path: Path) -> dict:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        writer.write_batch(pa.record_batch([pa.array(range(1000))], schema=SCHEMA))
    return {"rows": 1000}


@pytest.fixture
def make(tmp_path):
    """cached_dataset in tmp_path/cache, which counts how often the file was written."""

    def make(made_from=None, write=write_numbers, folder=tmp_path / "cache", **options):
        def counted(path: Path) -> dict:
            make.num_written += 1
            return write(path)

        return cached_dataset("numbers", made_from or {"version": 1}, counted, cache_dir=folder, **options)

    make.num_written = 0
    return make


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_the_same_sources_are_read_once(make, tmp_path):
    first, account = make()
    second, again = make()
    assert make.num_written == 1
    assert first["number"][:] == second["number"][:] == list(range(1000))
    assert account == again == {"rows": 1000}
    make({"version": 2})
    assert make.num_written == 2 and len(entries(tmp_path / "cache")) == 2


@pytest.mark.parametrize(
    "damage", ["truncated", "emptied", "no data", "no account", "half an account", "other account"]
)
def test_a_broken_folder_is_noticed_and_made_again(make, tmp_path, caplog, damage):
    make()
    (name,) = entries(tmp_path / "cache")
    data, account = (tmp_path / "cache" / name / file for file in ("data.arrow", "account.json"))
    if damage == "truncated":
        os.truncate(data, data.stat().st_size - 100)
    elif damage == "emptied":
        os.truncate(data, 0)
    elif damage in ("no data", "no account"):
        (data if damage == "no data" else account).unlink()
    else:
        account.write_text('{"file_bytes": 1' if damage == "half an account" else "[]")
    rows, _ = make()
    assert make.num_written == 2 and len(rows) == 1000
    assert "is not whole, or has changed since it was written: it is made again" in caplog.text
    make()
    assert make.num_written == 2 and entries(tmp_path / "cache") == [name]


def test_a_build_that_fails_leaves_nothing(make, tmp_path):
    def fail(path: Path) -> dict:
        path.write_bytes(b"half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        make(write=fail)
    assert entries(tmp_path / "cache") == []


def test_a_killed_build_is_neither_taken_for_whole_nor_left_lying(make, tmp_path):
    def be_killed(path: Path) -> dict:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
        return {}

    child = os.fork()
    if child == 0:
        make(write=be_killed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(entries(tmp_path / "cache")) == 1  # the temporary folder
    rows, _ = make()
    assert len(rows) == 1000
    (name,) = entries(tmp_path / "cache")
    assert not name.startswith(".")


def test_builders_at_the_same_time_build_once(make):
    def slowly(path: Path) -> dict:
        time.sleep(0.3)
        return write_numbers(path)

    results = []
    threads = [threading.Thread(target=lambda: results.append(make(write=slowly))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert make.num_written == 1
    assert [len(rows) for rows, _ in results] == [1000] * 4


def test_a_builder_without_our_lock_may_finish_first(make, tmp_path):
    """As on another machine that shares the file system, where the lock does not reach."""

    def by_the_other(path: Path) -> dict:
        return write_numbers(path) | {"by": "the other"}

    def overtaken(path: Path) -> dict:
        cached_dataset("numbers", {"version": 1}, by_the_other, cache_dir=tmp_path / "elsewhere")
        (name,) = entries(tmp_path / "elsewhere")
        (tmp_path / "elsewhere" / name).rename(tmp_path / "cache" / name)
        return write_numbers(path)

    rows, account = make(write=overtaken)
    assert account == {"rows": 1000, "by": "the other"} and len(rows) == 1000
    assert len(entries(tmp_path / "cache")) == 1


def write_three_batches(path: Path) -> dict:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for first in (0, 1000, 2000):
            writer.write_batch(pa.record_batch([pa.array(range(first, first + 7))], schema=SCHEMA))
    return {"rows": 21}


def flip_bit(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


@pytest.mark.fault(29)
@pytest.mark.parametrize("name", ["data.arrow", "account.json"])
def test_one_flipped_bit_anywhere_is_found_and_the_file_made_again(make, tmp_path, name):
    rows, _ = make(write=write_three_batches)
    expected = rows["number"][:]
    path = tmp_path / "cache" / entries(tmp_path / "cache")[0] / name
    positions = random.Random(0).sample(range(path.stat().st_size), 40)
    for count, position in enumerate(positions, start=1):
        flip_bit(path, position, bit=position % 8)
        rows, account = make(write=write_three_batches)
        assert make.num_written == count + 1
        assert rows["number"][:] == expected and account == {"rows": 21}


@pytest.mark.fault(29)
def test_a_batch_that_changed_is_found_when_it_is_first_read_and_its_folder_named(make, tmp_path):
    make(write=write_three_batches)
    (folder,) = (tmp_path / "cache").glob("numbers-*")
    offset, num_bytes, _ = json.loads((folder / "account.json").read_text())["batches"][1]
    flip_bit(folder / "data.arrow", offset + num_bytes - 8)
    verify = batch_verifier(make(write=write_three_batches, verify_now=False)[0])
    assert make.num_written == 1
    verify(0)
    verify(2)
    with pytest.raises(OSError, match=r"record batch 1 of 3 has another checksum\. Delete that folder") as raised:
        verify(1)
    assert str(folder) in str(raised.value)
    flip_bit(folder / "data.arrow", 4)  # the places of the columns are verified before any column is read
    make(write=write_three_batches, verify_now=False)
    assert make.num_written == 2


def test_a_cache_of_an_earlier_version_is_made_again(make, tmp_path, caplog):
    make()
    (folder,) = (tmp_path / "cache").glob("numbers-*")
    sidecar = json.loads((folder / "account.json").read_text())
    earlier = {"file_bytes": sidecar["file_bytes"], "account": {"rows": 999}}
    (folder / "account.json").write_text(json.dumps(earlier))
    _, account = make()
    assert make.num_written == 2 and account == {"rows": 1000}
    assert caplog.text.count("was made by an earlier version: it is made again") == 1


def test_two_processes_that_build_the_same_at_once_build_it_once_and_both_read_it(tmp_path):
    def slowly(path: Path) -> dict:
        with (tmp_path / "builds").open("a") as file:
            file.write("built\n")
        time.sleep(0.3)
        return write_three_batches(path)

    children = []
    for _ in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            rows, account = cached_dataset("numbers", {"version": 1}, slowly, cache_dir=tmp_path / "cache")
            verify = batch_verifier(rows)
            for number in range(3):
                verify(number)
            os._exit(0 if sum(rows["number"]) == 21063 and account == {"rows": 21} else 1)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert (tmp_path / "builds").read_text() == "built\n"


def test_a_full_disk_is_named_and_nothing_is_left(make, tmp_path):
    def write_to_full_disk(path: Path) -> dict:
        path.symlink_to("/dev/full")
        return write_numbers(path)

    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match=r"The disk is full .* HF_DATASETS_CACHE") as raised:
        make(write=write_to_full_disk)
    assert raised.value.errno == errno.ENOSPC and str(tmp_path / "cache") in str(raised.value)
    assert entries(tmp_path / "cache") == []


def test_a_cache_folder_that_cannot_be_written_is_named(make, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"Cannot write to the cache folder .* HF_DATASETS_CACHE") as raised:
        make(folder=tmp_path / "file")
    assert str(tmp_path / "file") in str(raised.value)


def test_a_changed_file_or_option_is_read_again(tmp_path):
    cache = tmp_path / "cache"
    path = tmp_path / "a.jsonl"

    def load(**options) -> tuple[str, int]:
        corpus = load_corpus(str(path), cache_dir=cache, **options)
        return "|".join(corpus.documents["text"]), len(entries(cache))

    path.write_text('{"text": "one", "title": "1"}\n')
    assert load() == ("one", 1)
    assert load() == ("one", 1)
    stat = path.stat()
    path.write_text('{"text": "two", "title": "2"}\n')
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size and time: only the content tells
    assert load() == ("two", 2)
    assert load(text_column="title") == ("2", 3)
    assert load(on_bad_record="skip") == ("two", 4)
