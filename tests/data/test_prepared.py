"""Prepared rows as a folder: made in parts, killed, damaged, and used without the text."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from accelerate import Accelerator

from hfllm.data import encoding, load_corpus, packing, prepared
from hfllm.data.training_text import prepare_folder, prepare_text
from hfllm.tokenization import document_encoder, tokenizer_fingerprint, train_bpe


COMMAND = "python recipes/pretrain.py --prepare_only --prepare_part"
TEXTS = [f"text {number} " + "one two three four " * (number % 7) for number in range(200)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["one two three four text " * 20], 270, show_progress=False)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def options(tokenizer, tmp_path) -> dict:
    encoding_of = {"encode": document_encoder(tokenizer), "tokenizer_sha256": tokenizer_fingerprint(tokenizer)}
    own = {"block_size": 16, "validation_fraction": 0.1, "cache_dir": str(tmp_path / "cache")}
    return {"tokenizer": tokenizer, **encoding_of, **own, "accelerator": Accelerator(cpu=True)}


@pytest.fixture
def prepare(options, text, monkeypatch, tmp_path):
    """prepare_folder of the text, in shards of about 2,000 bytes, by this process alone."""
    monkeypatch.setattr(encoding, "LEAST_SHARD_BYTES", 2000)
    monkeypatch.setattr(encoding, "num_cores", lambda: 1)
    monkeypatch.setattr("hfllm.data.training_text.num_cores", lambda: 1)

    def prepare(name: str = "rows", dataset: object = text, **others) -> Path:
        prepare_folder(tmp_path / name, str(dataset), **{**options, "part_command": COMMAND, **others})
        return tmp_path / name

    return prepare


@pytest.fixture
def use(options):
    return lambda dataset, **others: prepare_text(str(dataset), **{**options, **others})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_rows(first, second):
    assert first.account == second.account and first.num_bytes == second.num_bytes
    every = np.arange(len(first))
    for count_once in (False, True):
        left, right = first.batch(every, count_once=count_once), second.batch(every, count_once=count_once)
        assert all(left[name].equal(right[name]) for name in left)
    assert first.num_targets.tolist() == second.num_targets.tolist()


@pytest.mark.parametrize("stride", [None, 4])
def test_the_rows_of_a_folder_are_those_of_the_text(prepare, use, text, stride):
    folder = prepare(stride=stride)
    from_text = use(text, stride=stride)
    text.unlink()
    from_folder = use(folder, stride=stride)
    assert_same_rows(from_folder.train, from_text.train)
    assert_same_rows(from_folder.validation, from_text.validation)
    assert from_folder.identity == from_text.identity and from_folder.fingerprint == from_text.fingerprint
    assert "text, as prepared rows: 200 documents, " in from_folder.summary
    assert from_text.train.summary() in from_folder.summary


def test_the_rows_do_not_depend_on_the_size_of_shards_files_and_record_batches(prepare, use, text, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK_TOKENS", 200)  # a batch has 11 rows
    monkeypatch.setattr(prepared, "FILE_BATCHES", 3)
    monkeypatch.setattr(encoding, "LEAST_SHARD_BYTES", 1000)
    monkeypatch.setattr(encoding, "BATCH_BYTES", 100)
    folder = prepare()
    assert len(list(folder.glob("train/*.arrow"))) > 3
    rows, whole = use(folder).train, use(text).train
    assert [len(view) for view in rows._input_ids[:4]] == [11] * 4
    assert_same_rows(rows, whole)


def test_the_folder_opens_by_load_from_disk_and_a_row_decodes_to_its_text(prepare, tokenizer):
    opened = datasets.load_from_disk(str(prepare()))
    assert set(opened) == {"train", "validation"}
    ids = datasets.List(datasets.Value("uint16"), length=17)
    number = datasets.Value("int32")
    assert opened["train"].features == datasets.Features(
        {"input_ids": ids, "position_ids": ids, "num_targets": number, "overlap": number}
    )
    ids = [id for row in opened["train"]["input_ids"] for id in row[:-1]]
    decoded = tokenizer.decode(ids).split(tokenizer.bos_token)[1:]
    assert {text.removesuffix(tokenizer.eos_token) for text in decoded[:-1]} < set(TEXTS)
    assert len(decoded) > 150


def test_load_dataset_finds_both_sides_by_the_card(prepare, tmp_path):
    opened = datasets.load_dataset(str(prepare()), cache_dir=str(tmp_path / "datasets"))
    assert {name: len(side) for name, side in opened.items()} == {
        name: len(side) for name, side in datasets.load_from_disk(str(tmp_path / "rows")).items()
    }


def test_several_validation_texts_travel_by_their_names(prepare, use, tmp_path):
    (tmp_path / "fr.txt").write_text("un deux trois " * 10)
    (tmp_path / "uk.txt").write_text("a text of another kind " * 10)
    given = f"{tmp_path}/fr.txt,{tmp_path}/uk.txt"
    folder = prepare(validation_dataset=given)
    for name in ("fr.txt", "uk.txt", "text.jsonl"):
        (tmp_path / name).unlink()
    for again in (None, given):
        rows = use(folder, validation_dataset=again)
        assert {name: part.num_bytes for name, part in rows.validation_parts.items()} == {"fr": 140, "uk": 230}
    assert set(datasets.load_from_disk(str(folder))) == {"train", "validation_fr", "validation_uk"}
    with pytest.raises(ValueError, match=r"with validation_dataset=fr,uk, and validation_dataset=fr is asked for"):
        use(folder, validation_dataset=f"{tmp_path}/fr.txt")


@pytest.mark.parametrize("num_parts", [2, 9])  # fewer than shards, and more
def test_parts_encoded_on_several_machines_make_the_very_same_files(prepare, num_parts):
    whole = contents(prepare("whole"))
    for part in reversed(range(num_parts)):
        folder = prepare("parts", part=(part, num_parts))
        assert not (folder / "rows.json").exists()
    prepare("parts")
    assert contents(folder) == whole


def test_several_processes_make_the_very_same_files(prepare, monkeypatch, capsys):
    whole = contents(prepare("whole"))
    monkeypatch.setattr("hfllm.data.training_text.num_cores", lambda: 2)
    assert contents(prepare("two")) == whole
    assert re.search(
        r"Encoded \d+ shards: [\d,]+ bytes in .* s on 2 cores, .* MB/s \(.* each\)\.", capsys.readouterr().out
    )


def test_a_missing_shard_is_named_with_the_command_that_makes_it(prepare, use, capsys):
    folder = prepare(part=(0, 2))
    missing = capsys.readouterr().out
    with pytest.raises(ValueError, match=r"are half prepared\. \d+ of \d+ shards are not encoded") as raised:
        use(folder)
    for message in (missing, str(raised.value)):
        found = re.search(r"train-00001: " + re.escape(COMMAND) + r" (\d+)/(\d+)\n", message)
        assert found[1] == "1"
    shutil.rmtree(folder / "encoded" / "train-00000")
    prepare(part=(0, int(found[2])))  # as the command for shard 0 says
    assert (folder / "encoded" / "train-00000").is_dir() and not (folder / "encoded" / "train-00001").exists()
    prepare(part=(1, 2))
    assert "All shards are encoded" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"All shards are encoded; this command makes the rows .*\n.*--prepare_only$"):
        use(folder)
    prepare()
    assert len(use(folder).train)


def in_a_killed_process(function):
    """Call a function that kills the process it runs in."""
    child = os.fork()
    if child == 0:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads are not in the fork
        try:
            function()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_killed_preparation_continues_and_encodes_no_shard_again(prepare, options):
    def counting(texts):
        counting.num_calls += 1
        return options["encode"](texts)

    def until_killed(texts):
        if counting.num_calls == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return counting(texts)

    counting.num_calls = 0
    whole = contents(prepare("whole", encode=counting))
    num_shards, counting.num_calls = counting.num_calls, 0
    assert num_shards > 5
    in_a_killed_process(lambda: prepare("killed", encode=until_killed))
    assert contents(prepare("killed", encode=counting)) == whole
    assert counting.num_calls == num_shards - 3


def test_a_preparation_killed_while_it_cuts_the_rows_continues(prepare, options, monkeypatch):
    whole = contents(prepare("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "complete_account", lambda account: os.kill(os.getpid(), signal.SIGKILL))
        in_a_killed_process(lambda: prepare("killed"))
    assert contents(prepare("killed", encode=None)) == whole  # nothing is encoded


def test_a_damaged_shard_is_encoded_again(prepare):
    whole = contents(prepare("whole"))
    folder = prepare("rows", part=(0, 1))
    path = folder / "encoded" / "train-00002" / "data.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert contents(prepare("rows")) == whole


def test_rows_that_are_there_are_verified_and_not_made_again(prepare):
    before = {path: path.stat().st_mtime_ns for path in prepare().rglob("*") if path.is_file()}
    assert before == {path: path.stat().st_mtime_ns for path in prepare(encode=None).rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("others", "difference"),
    [
        ({"block_size": 8}, "block_size is 16 there and 8 here"),
        ({"stride": 4}, "stride is None there and 4 here"),
        ({"validation_fraction": 0.2}, "validation_fraction is 0.1 there and 0.2 here"),
    ],
)
def test_two_machines_with_different_options_do_not_prepare_one_folder(prepare, others, difference):
    prepare(part=(0, 2))
    with pytest.raises(ValueError, match=rf"is being prepared otherwise, by .* another machine: .*{difference}"):
        prepare(part=(1, 2), **others)
    prepare()
    with pytest.raises(ValueError, match=rf"holds rows that were prepared otherwise: .*{difference}"):
        prepare(**others)


def test_two_machines_with_different_texts_or_tokenizers_do_not_prepare_one_folder(prepare, tmp_path):
    prepare(part=(0, 2))
    with pytest.raises(ValueError, match=r"tokenizer_sha256 is '.*' there and 'ab' here"):
        prepare(part=(1, 2), tokenizer_sha256="ab")
    (tmp_path / "text.jsonl").write_text('{"text": "other"}\n{"text": "words"}\n')
    with pytest.raises(ValueError, match=r"corpus_sha256 is '.*' there and '.*' here"):
        prepare(part=(1, 2))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"tokenizer_sha256": "ab" * 32}, r"with another tokenizer .* here it is abababababababab\)\. Give tokenizer="),
        ({"block_size": 8}, r"prepared with block_size=16, and block_size=8 is asked for\. Give block_size=16"),
        ({"stride": 8}, r"prepared with no stride, and stride=8 is asked for\. Leave stride out"),
        ({"validation_fraction": 0.2}, r"validation_fraction=0\.1, and validation_fraction=0\.2 is asked for"),
        ({"validation_dataset": "other.txt"}, r"validation_fraction=0\.1, and validation_dataset=other is asked for"),
        ({"validation_split": "test"}, r"validation_fraction=0\.1, and validation_split=test is asked for"),
        ({"text_column": "content"}, r"read with text_column=text, and text_column=content is asked for"),
        ({"streaming": True}, r"holds prepared rows, and streaming reads text\. Leave streaming out"),
    ],
)
def test_options_that_the_rows_were_not_prepared_with_are_refused(prepare, use, others, message):
    folder = prepare()
    with pytest.raises(ValueError, match=message):
        use(folder, **others)


def test_options_for_the_text_may_stay_as_the_text_was_read_with_them(prepare, use):
    folder = prepare(on_bad_record="skip")
    for on_bad_record in ("skip", "error"):
        assert len(use(folder, on_bad_record=on_bad_record).train)


@pytest.mark.fault(29)
@pytest.mark.parametrize("name", ["train/data-00000.arrow", "validation/data-00000.arrow", "rows.json"])
def test_a_damaged_or_missing_file_is_named_before_the_rows_are_used(prepare, use, name):
    path = prepare() / name
    sound = path.read_bytes()
    draw = np.random.default_rng(0)
    for position in draw.integers(len(sound), size=20):
        damaged = bytearray(sound)
        damaged[position] ^= 1 << int(draw.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(OSError, match=r"(has changed since it was written|cannot be read).*Copy") as raised:
            use(path.parents[name.count("/")])
        assert str(path) in str(raised.value)
    path.unlink()
    if name != "rows.json":
        with pytest.raises(OSError, match=rf"{name} is missing\. Copy .* again"):
            use(path.parents[1])


def test_rows_that_change_while_they_are_used_are_noticed_when_they_are_first_read(prepare, use, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK_TOKENS", 200)
    folder = prepare()
    rows = use(folder).train
    record = json.loads((folder / "rows.json").read_text())
    file = record["sides"]["train"]["files"]["data-00000.arrow"]
    with (folder / "train" / "data-00000.arrow").open("r+b") as opened:
        opened.seek(file["batches"][1][0])
        opened.write(b"\xff")
    rows.batch(np.array([0]))
    with pytest.raises(OSError, match=r"train has changed since it was written: record batch 1 of .* Copy"):
        rows.batch(np.array([11]))


def test_a_folder_with_other_files_is_not_written_to(prepare, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    with pytest.raises(ValueError, match=r"holds files that are no prepared rows: diary\.txt"):
        prepare("mine")
    assert contents(tmp_path / "mine") == {"diary.txt": b"dear"}


def test_rows_are_not_prepared_again_nor_read_as_text(prepare, tmp_path):
    folder = prepare()
    with pytest.raises(ValueError, match="holds rows that are prepared already"):
        prepare("again", dataset=folder)
    with pytest.raises(ValueError, match="holds prepared rows, and text is wanted here"):
        load_corpus(str(folder), cache_dir=tmp_path / "cache")
    (tmp_path / "below").mkdir()
    folder.rename(tmp_path / "below" / "rows")
    (tmp_path / "below" / "a.txt").write_text("some text")
    assert load_corpus(str(tmp_path / "below"), cache_dir=tmp_path / "cache").account["documents"] == 1


def fail(texts):
    raise ValueError("these texts cannot be encoded")


def be_killed(texts):
    os.kill(os.getpid(), signal.SIGKILL)


def test_an_error_of_a_process_that_encodes_is_the_error_of_the_whole(prepare, monkeypatch):
    monkeypatch.setattr("hfllm.data.training_text.num_cores", lambda: 2)
    with pytest.raises(ValueError, match="these texts cannot be encoded"):
        prepare(encode=fail)
    with pytest.raises(RuntimeError, match="A process that encoded text was killed, perhaps for lack of memory"):
        prepare(encode=be_killed)


def test_no_more_text_is_encoded_at_a_time_than_a_batch_and_a_part(prepare, options, monkeypatch):
    def watching(texts):
        watching.sizes.append(sum(len(text.encode()) for text in texts))
        return options["encode"](texts)

    watching.sizes = []
    monkeypatch.setattr(encoding, "LEAST_SHARD_BYTES", 1 << 20)  # one shard
    monkeypatch.setattr(encoding, "BATCH_BYTES", 300)
    prepare(encode=watching)
    assert len(watching.sizes) > 10
    assert max(watching.sizes) < 300 + 16 * max(map(len, TEXTS))  # parts are read 16 at a time


MEASURE_PEAK = """
import json, re, sys, threading
from pathlib import Path
import numpy as np
from accelerate import Accelerator
from hfllm.data import encoding, training_text
from hfllm.tokenization import document_encoder, tokenizer_fingerprint, train_bpe

folder, megabytes = Path(sys.argv[1]), int(sys.argv[2])
with (folder / "big.txt").open("w") as file:
    for number in range(megabytes * 20_000):
        file.write(f"line {number:10} of a long text, which goes on\\n")  # 50 bytes
tokenizer = train_bpe(["a line of text"], 262, show_progress=False)
encode = lambda texts: [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

def anonymous():  # pages of the memory map are not counted: the system takes them back when it needs them
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

def watch():
    while not done.wait(0.005):
        samples.append(anonymous())

training_text.num_cores = lambda: 1
before, samples, done = anonymous(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
training_text.prepare_folder(
    folder / "rows", str(folder / "big.txt"), tokenizer, encode=encode, tokenizer_sha256="ab", block_size=256,
    accelerator=Accelerator(cpu=True), validation_fraction=0.05, cache_dir=str(folder), part_command="",
)
done.set()
watcher.join()
print(json.dumps({"peak": max(samples) - before}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of anonymous memory")
def test_memory_does_not_grow_with_the_text_that_is_prepared(tmp_path):
    peaks = []
    for megabytes in (20, 120):
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        command = [sys.executable, "-c", MEASURE_PEAK, str(folder), str(megabytes)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks.append(json.loads(re.search(r"\{.*\}", output)[0])["peak"])
    assert peaks[1] < 1.25 * peaks[0] < 400, peaks
