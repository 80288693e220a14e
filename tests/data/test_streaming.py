import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
import torch

from hfllm.data import RowStream, corpus, find_shards, hold_out, lanes, merge_states, prepare_rows, sources


# Every character of the texts below is another one and a token of its own, so that a pair of neighbours says where it
# comes from.
FIRST = 0x20000
BOS, EOS, PAD = 0, 1, 2
OPTIONS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "vocab_size": 0x110000, "key": "key"}


def encode(texts: list[str]) -> list[np.ndarray]:
    return [np.array([ord(character) for character in text], dtype=np.int32) for text in texts]


def write_lines(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return path


def write_shards(folder: Path, num_shards: int, *, lengths: range = range(1, 30), num_documents: int = 12) -> list[str]:
    """Shards of documents of random lengths; returns the documents."""
    generator, character, texts = random.Random(0), FIRST, []
    for number in range(num_shards):
        some = [generator.choice(lengths) for _ in range(num_documents)]
        texts.append(["".join(chr(character + sum(some[:n]) + i) for i in range(k)) for n, k in enumerate(some)])
        character += sum(some)
        write_lines(folder / f"{number:02}.jsonl", texts[-1])
    return list(itertools.chain(*texts))


def pairs_of(texts: list[str]) -> list[tuple[int, int]]:
    """Each token of the documents with the one before it: what there is to learn."""
    documents = [[BOS, *map(ord, text), EOS] for text in texts]
    return sorted(pair for document in documents for pair in itertools.pairwise(document))


def targets_of(batch: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    is_target = batch["shift_labels"] != -100
    return list(zip(batch["input_ids"][is_target].tolist(), batch["shift_labels"][is_target].tolist()))


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


@pytest.fixture
def stream_of():
    """Streams of a folder's files, closed at the end."""
    streams = []

    def stream_of(folder: Path | str, **options) -> RowStream:
        found = find_shards(str(folder))
        streams.append(
            RowStream(found, encode, **{**OPTIONS, "seed": 0, "block_size": 8, "chunk_bytes": 300, **options})
        )
        return streams[-1]

    yield stream_of
    for stream in streams:
        stream.close()


def rows_of_epochs(stream: RowStream, num_epochs: int) -> list[list[dict[str, torch.Tensor]]]:
    """The rows of each of the first epochs of a stream whose process reads a single lane."""
    epochs: list[list[dict[str, torch.Tensor]]] = [[] for _ in range(num_epochs)]
    while True:
        batch = stream.take(stream.num_processes)
        if stream.epoch == num_epochs:
            return epochs
        epochs[stream.epoch].append(batch)


@pytest.mark.parametrize("block_size", [2, 5, 64])
@pytest.mark.parametrize("chunk_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize("part_characters", [2, 10, 1 << 16])
def test_an_epoch_has_every_token_after_the_one_before_it_exactly_once(
    tmp_path, stream_of, monkeypatch, block_size, chunk_bytes, part_characters
):
    monkeypatch.setattr(corpus, "PART_CHARACTERS", part_characters)  # so that chunks end inside documents
    texts = write_shards(tmp_path / "texts", 6)
    targets, accounts = [], Counter()
    for process in range(3):  # each reads one lane
        split = {"num_lanes": 3, "num_processes": 3, "process_index": process}
        stream = stream_of(tmp_path / "texts", block_size=block_size, chunk_bytes=chunk_bytes, **split)
        for batch in rows_of_epochs(stream, 1)[0]:
            targets += targets_of(batch)
            assert batch["position_ids"][:, 0].tolist() == [0]
        [lane] = stream._lanes.values()
        accounts.update(lane.account)
    assert sorted(targets) == pairs_of(texts)
    num_tokens = sum(map(len, texts))
    assert accounts["documents"] == 72 and accounts["text_tokens"] == num_tokens
    assert accounts["targets"] == num_tokens + 72 and accounts["text_bytes"] == 4 * num_tokens


def test_without_shuffling_a_chunk_is_packed_as_prepare_rows_packs_a_corpus(tmp_path, stream_of, monkeypatch):
    monkeypatch.setattr(lanes, "permutation", lambda num, *key: np.arange(num))
    texts = write_shards(tmp_path / "texts", 1, num_documents=50)
    documents = datasets.Dataset.from_dict({"text": texts, "document": range(50)})
    rows = prepare_rows(documents, encode, block_size=8, cache_dir=tmp_path, **OPTIONS, progress=False)
    assert len(rows) > 80
    batch = stream_of(tmp_path / "texts", chunk_bytes=1 << 20).take(len(rows))
    assert_same(batch, rows.batch(np.arange(len(rows))))


def test_epochs_and_seeds_differ_in_their_order_and_nothing_else(tmp_path, stream_of):
    texts = write_shards(tmp_path / "texts", 4)
    orders = []
    for seed in (0, 1):
        for epoch in rows_of_epochs(stream_of(tmp_path / "texts", seed=seed, num_lanes=1), 3):
            orders.append([pair for batch in epoch for pair in targets_of(batch)])
    assert all(sorted(order) == pairs_of(texts) for order in orders)
    assert len(set(map(tuple, orders))) == 6
    again = rows_of_epochs(stream_of(tmp_path / "texts", seed=1, num_lanes=1), 3)[2]
    assert [pair for batch in again for pair in targets_of(batch)] == orders[5]


@pytest.mark.parametrize("what", [lanes.DOCUMENTS, lanes.ROWS])
def test_documents_and_rows_are_each_shuffled_again_in_each_epoch_and_with_each_seed(
    tmp_path, stream_of, monkeypatch, what
):
    shuffled = lanes.permutation
    only_these = lambda num, *key: shuffled(num, *key) if key[1] == what else np.arange(num)  # noqa: E731
    monkeypatch.setattr(lanes, "permutation", only_these)
    write_shards(tmp_path / "texts", 1)
    orders = []
    for seed in (0, 1):
        for epoch in rows_of_epochs(stream_of(tmp_path / "texts", seed=seed, chunk_bytes=1 << 20), 2):
            orders.append([pair for batch in epoch for pair in targets_of(batch)])
    assert len(set(map(tuple, orders))) == 4 and len(set(map(tuple, map(sorted, orders)))) == 1


def test_rows_of_a_long_document_and_neighbours_of_a_shard_are_spread(tmp_path, stream_of):
    texts = write_shards(tmp_path / "texts", 4, lengths=range(200, 201))
    stream = stream_of(tmp_path / "texts", chunk_bytes=1 << 20, num_lanes=4)
    document_of = {ord(character): number for number, text in enumerate(texts) for character in text}
    batch = stream.take(400)
    documents = [document_of.get(token) for token in batch["input_ids"][:, 3].tolist()]
    assert sum(one == other for one, other in zip(documents, documents[4:])) < 80  # of 396; in order it would be 380
    assert {document // 12 for document in documents[:4] if document is not None} == {0, 1, 2, 3}


@pytest.mark.parametrize("seed", range(6))
def test_a_stream_cut_anywhere_resumes_bitwise(tmp_path, stream_of, monkeypatch, seed):
    generator = random.Random(seed)
    monkeypatch.setattr(corpus, "PART_CHARACTERS", generator.choice([3, 16, 1 << 16]))
    write_shards(tmp_path / "texts", 5, lengths=range(1, generator.choice([3, 60])), num_documents=5)
    options = {"num_lanes": generator.randint(1, 5), "chunk_bytes": generator.choice([1, 50, 400, 1 << 20])}
    options |= {"block_size": generator.choice([2, 7, 20]), "prefetch": generator.random() < 0.5, "seed": seed}
    whole = stream_of(tmp_path / "texts", **options)
    sizes, batches = [], []
    while whole.epoch < 2 or len(sizes) < 10:
        sizes.append(generator.randint(1, 40))
        batches.append(whole.take(sizes[-1]))
    for cut in sorted(generator.sample(range(len(sizes)), 5)):
        first = stream_of(tmp_path / "texts", **options)
        for size in sizes[:cut]:
            first.take(size)
        state = json.loads(json.dumps(first.state_dict()))
        second = stream_of(tmp_path / "texts", **options)
        second.take(3)  # what it did before is forgotten
        second.load_state_dict(state)
        assert second.state_dict() == state
        for size, expected in zip(sizes[cut:], batches[cut:]):
            assert_same(second.take(size), expected)
        assert second.state_dict() == whole.state_dict()


def test_any_number_of_processes_reads_the_same_rows_in_the_same_order(tmp_path, stream_of, caplog):
    write_shards(tmp_path / "texts", 8)
    alone = stream_of(tmp_path / "texts")
    assert alone.num_lanes == 8
    expected = [alone.take(24) for _ in range(12)]
    whole = alone.state_dict()
    for numbers in ([2], [1, 4, 8, 2], [3, 1, 6]):  # of processes, from one start to the next
        state, step = None, 0
        for num_processes in numbers:
            streams = []
            for process in range(num_processes):
                split = {"num_processes": num_processes, "process_index": process, "num_lanes": 8}
                streams.append(stream_of(tmp_path / "texts", **split))
                if state is not None:
                    streams[-1].load_state_dict(state)
            for _ in range(12 // len(numbers)):
                shares = [stream.take(24) for stream in streams]
                for name, rows in expected[step].items():
                    assert torch.equal(torch.stack([share[name] for share in shares], dim=1).flatten(0, 1), rows)
                step += 1
            state = json.loads(json.dumps(merge_states([stream.state_dict() for stream in streams])))
        assert state == whole
    assert "6 processes cannot share 8 lanes evenly, so each lane is read and encoded by 3 of them" in caplog.text
    assert "4 processes" not in caplog.text


def test_a_step_has_the_same_rows_however_it_is_cut_into_micro_batches(tmp_path, stream_of):
    write_shards(tmp_path / "texts", 4)
    split = {"num_processes": 2, "process_index": 1}
    at_once, in_parts = stream_of(tmp_path / "texts", **split), stream_of(tmp_path / "texts", **split)
    for _ in range(5):
        parts = [in_parts.take(6) for _ in range(4)]
        assert_same(at_once.take(24), {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    with pytest.raises(ValueError, match="7 rows cannot be cut evenly among 2 processes: choose a multiple of 2"):
        at_once.take(7)


def test_the_number_of_lanes_does_not_depend_on_the_processes_where_it_can(tmp_path, stream_of):
    write_shards(tmp_path / "texts", 40, num_documents=1)
    numbers = [
        stream_of(tmp_path / "texts", num_processes=count).num_lanes for count in (1, 2, 4, 8, 16, 3, 12, 17, 40)
    ]
    assert numbers == [16, 16, 16, 16, 16, 12, 12, 17, 40]
    write_shards(tmp_path / "few", 5, num_documents=1)
    assert [stream_of(tmp_path / "few", num_processes=count).num_lanes for count in (1, 2, 3, 5)] == [4, 4, 3, 5]
    for num_lanes in (0, 6):
        with pytest.raises(ValueError, match=f"num_lanes={num_lanes}: from 1 to the number of shards, 5"):
            stream_of(tmp_path / "few", num_lanes=num_lanes)


def test_fewer_shards_than_processes_are_refused_with_both_numbers_and_a_way_out(tmp_path, stream_of):
    write_shards(tmp_path / "texts", 3)
    with pytest.raises(ValueError, match=r"has 3 shards, and 4 processes are to read it.*Start at most 3.*to_parquet"):
        stream_of(tmp_path / "texts", num_processes=4)
    stream_of(tmp_path / "texts", num_processes=3, process_index=2)
    with pytest.raises(ValueError, match="process_index=3, but num_processes=3"):
        stream_of(tmp_path / "texts", num_processes=3, process_index=3)


def test_processes_read_different_shards_and_one_of_each_lane_at_a_time(tmp_path, stream_of):
    write_shards(tmp_path / "texts", 40, num_documents=3)
    names = [{shard.name for shard in lane} for lane in stream_of(tmp_path / "texts", num_lanes=8)._deal(8, 0)]
    assert sum(map(len, names)) == len(set.union(*names)) == 40 and {len(lane) for lane in names} <= {4, 5, 6}
    streams = [stream_of(tmp_path / "texts", num_lanes=8, num_processes=4, process_index=n) for n in range(4)]
    assert [sorted(stream._lanes) for stream in streams] == [[0, 4], [1, 5], [2, 6], [3, 7]]
    for _ in range(30):
        streams[0].take(8)
        open_files = [file.path for file in psutil.Process().open_files() if file.path.startswith(str(tmp_path))]
        assert len(open_files) <= 2


def test_lanes_are_dealt_about_as_much_text_each(tmp_path, stream_of):
    generator = random.Random(1)
    for number in range(60):
        write_lines(tmp_path / "texts" / f"{number}.jsonl", ["x" * generator.randint(1, 2000)])
    stream = stream_of(tmp_path / "texts")
    for epoch in range(5):
        sizes = [sum(shard.num_bytes for shard in lane) for lane in stream._deal(8, epoch)]
        assert sum(sizes) == stream.shards.num_bytes and max(sizes) - min(sizes) <= 2020
    orders = [stream._deal(8, 0), stream._deal(8, 1), stream_of(tmp_path / "texts", seed=1)._deal(8, 0)]
    assert len({tuple(shard.name for lane in order for shard in lane) for order in orders}) == 3


def test_the_state_is_small_and_plain(tmp_path, stream_of):
    write_shards(tmp_path / "texts", 16, lengths=range(1000, 1001))
    stream = stream_of(tmp_path / "texts")
    stream.take(16)
    state = stream.state_dict()
    assert json.loads(json.dumps(state)) == state and len(state["lanes"]) == 16
    assert len(json.dumps({**state, "identity": None})) < 16 * 400


def test_the_state_of_another_stream_is_refused_with_the_difference_shown(tmp_path, stream_of):
    write_shards(tmp_path / "texts", 4)
    state = stream_of(tmp_path / "texts").state_dict()
    changes = [{"seed": 1}, {"block_size": 9}, {"chunk_bytes": 301}, {"key": "other"}, {"bos_token_id": 3}]
    for change in changes:
        [(name, value)] = change.items()
        pattern = rf"state of another stream:\n    stream.{name}: .* then, {value!r} now\n.*start again"
        with pytest.raises(ValueError, match=pattern):
            stream_of(tmp_path / "texts", **change).load_state_dict(state)
    held_out = datasets.Dataset.from_dict({"text": ["x"], "document": [0]})
    with pytest.raises(ValueError, match=r"stream.held_out: "):
        stream_of(tmp_path / "texts", held_out=[held_out]).load_state_dict(state)
    stream_of(tmp_path / "texts", on_bad_record="skip").load_state_dict(state)  # may change

    write_lines(tmp_path / "texts" / "01.jsonl", ["changed"])
    with pytest.raises(ValueError, match=r"stream.file.01.jsonl: '.* bytes, sha256 .*' then, '20 bytes, sha256"):
        stream_of(tmp_path / "texts").load_state_dict(state)
    (tmp_path / "texts" / "01.jsonl").unlink()
    with pytest.raises(
        ValueError, match=r"stream.files: 4 then, 3 now\n(.*\n)*.*stream.file.01.jsonl: '.*' then, None"
    ):
        stream_of(tmp_path / "texts").load_state_dict(state)


def test_states_of_several_processes_have_to_be_merged_and_of_the_same_step(tmp_path, stream_of):
    write_shards(tmp_path / "texts", 4)
    one, other = (stream_of(tmp_path / "texts", num_processes=2, process_index=n) for n in (0, 1))
    with pytest.raises(ValueError, match=r"has no lane 1, 3 of 4.*merge_states"):
        stream_of(tmp_path / "texts").load_state_dict(one.state_dict())
    one.take(8)
    with pytest.raises(ValueError, match=r"at different rows: \[8, 0\]"):
        merge_states([one.state_dict(), other.state_dict()])


def test_held_out_documents_never_come_and_neither_do_their_copies(tmp_path, stream_of):
    texts = write_shards(tmp_path / "texts", 6)
    write_lines(tmp_path / "texts" / "copies.jsonl", texts)
    held_out = hold_out(find_shards(str(tmp_path / "texts")), fraction=0.1, cache_dir=tmp_path)
    held_out_texts = held_out.documents["text"][:]
    assert 5 < len(held_out_texts) < 30
    stream = stream_of(tmp_path / "texts", num_lanes=1, held_out=[held_out.documents])
    [batches] = rows_of_epochs(stream, 1)
    kept = [text for text in texts if text not in held_out_texts]
    assert sorted(pair for batch in batches for pair in targets_of(batch)) == sorted(2 * pairs_of(kept))
    assert stream._lanes[0].account["held_out_documents"] == 2 * len(set(held_out_texts))
    rows = prepare_rows(held_out.documents, encode, block_size=8, cache_dir=tmp_path, **OPTIONS, progress=False)
    assert sorted(targets_of(rows.batch(np.arange(len(rows))))) == pairs_of(held_out_texts)


def test_a_held_out_document_of_many_parts_is_known_by_its_first(tmp_path, stream_of, monkeypatch):
    monkeypatch.setattr(corpus, "PART_CHARACTERS", 4)
    texts = write_shards(tmp_path / "texts", 1, lengths=range(20, 21))
    held_out = hold_out(find_shards(str(tmp_path / "texts")), fraction=0.3, cache_dir=tmp_path)
    assert held_out.account["parts"] > 2 * held_out.account["documents"] > 0
    stream = stream_of(tmp_path / "texts", held_out=[held_out.documents])
    assert len(stream.options.held_out) == held_out.account["documents"]
    [batches] = rows_of_epochs(stream, 1)
    kept = texts[held_out.account["documents"] :]
    assert sorted(pair for batch in batches for pair in targets_of(batch)) == pairs_of(kept)


def test_a_bad_record_stops_the_stream_with_its_place_and_skipping_continues_from_there(tmp_path, stream_of, caplog):
    good = [chr(FIRST + 10 * n) + chr(FIRST + 10 * n + 1) for n in range(40)]
    write_lines(tmp_path / "texts" / "a.jsonl", good[:20])
    with (tmp_path / "texts" / "a.jsonl").open("ab") as file:
        file.write(b'{"text": 7}\n{"text": ""}\n{"text": "a\xff"}\n')
        file.write("".join(json.dumps({"text": text}) + "\n" for text in good[20:]).encode())
    options = {"chunk_bytes": 40, "block_size": 2}
    stream = stream_of(tmp_path / "texts", **options)
    with pytest.raises(ValueError, match=r"a\.jsonl, line 21: its 'text' is a number.*on_bad_record='skip'"):
        while True:
            state = stream.state_dict()
            stream.take(1)
    skipping = stream_of(tmp_path / "texts", on_bad_record="skip", **options)
    skipping.load_state_dict(state)
    whole = stream_of(tmp_path / "texts", on_bad_record="skip", **options)
    [batches] = rows_of_epochs(whole, 1)
    assert sorted(pair for batch in batches for pair in targets_of(batch)) == pairs_of(good)
    for batch in batches[state["position"] :]:
        assert_same(skipping.take(1), batch)
    for stream in (whole, skipping):
        counts = {name: stream.account[name] for name in ("bad_records", "empty_documents", "records_without_column")}
        assert counts == {"bad_records": 2, "empty_documents": 1, "records_without_column": 0}
    assert "line 21: its 'text' is a number" in caplog.text
    assert "line 23: its 'text' holds bytes that are not UTF-8" in caplog.text


def test_shards_without_text_are_passed_over(tmp_path, stream_of):
    texts = write_shards(tmp_path / "texts", 2)
    (tmp_path / "texts" / "blank.jsonl").write_text("\n\n")
    (tmp_path / "texts" / "mark.txt").write_bytes(b"\xef\xbb\xbf")
    stream = stream_of(tmp_path / "texts", num_lanes=4)  # in each epoch, two of the lanes have nothing to read
    targets = Counter(pair for _ in range(100) for pair in targets_of(stream.take(4)))
    assert sorted(targets) == pairs_of(texts)


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_stream_without_any_text_says_why(tmp_path, stream_of, prefetch):
    (tmp_path / "texts").mkdir()
    for number in range(3):
        (tmp_path / "texts" / f"{number}.jsonl").write_text('{"text": ""}\n{"content": "x"}\n')
    stream = stream_of(tmp_path / "texts", on_bad_record="skip", prefetch=prefetch)
    message = r"no text to train on: 3 documents are empty, 0 are held back for validation, and 3 records are bad"
    with pytest.raises(ValueError, match=rf"{message}.* line 2: there is no column 'text' but \['content'\]"):
        stream.take(1)
    texts = write_shards(tmp_path / "other", 1)
    held_out = datasets.Dataset.from_dict({"text": texts, "document": range(12)})
    with pytest.raises(ValueError, match="0 documents are empty, 12 are held back"):
        stream_of(tmp_path / "other", held_out=[held_out], prefetch=prefetch).take(1)


def test_a_file_that_is_gone_stops_the_stream_and_the_step_can_be_taken_once_it_is_back(tmp_path, stream_of):
    write_shards(tmp_path / "texts", 3)
    undisturbed = stream_of(tmp_path / "texts", num_lanes=1)
    expected = undisturbed.take(70)
    stream = stream_of(tmp_path / "texts", num_lanes=1)
    last = stream._deal(1, 0)[0][-1].name  # so that two others are read before it is missed
    (tmp_path / "texts" / last).rename(tmp_path / "away")
    with pytest.raises(OSError, match=rf"{last} cannot be read: .*No such file.*Put it back.*resumes"):
        stream.take(70)
    (tmp_path / "away").rename(tmp_path / "texts" / last)
    assert_same(stream.take(70), expected)
    assert stream.state_dict() == undisturbed.state_dict() and stream.account["documents"] > 24


def test_reading_ahead_changes_nothing_and_ends_when_told(tmp_path, stream_of):
    write_shards(tmp_path / "texts", 4)
    ahead, not_ahead = stream_of(tmp_path / "texts"), stream_of(tmp_path / "texts", prefetch=False)
    for _ in range(20):
        assert_same(ahead.take(16), not_ahead.take(16))
    assert ahead.state_dict() == not_ahead.state_dict() and ahead.account == not_ahead.account
    ahead.close()


def test_a_dataset_of_the_hub_streams_as_its_files_do(tmp_path, stream_of, monkeypatch):
    texts = write_shards(tmp_path / "train", 3)
    local = stream_of(tmp_path / "train", num_lanes=3)
    monkeypatch.setattr(sources, "_local_paths", lambda dataset: [])
    hub = stream_of(tmp_path / "train", num_lanes=3)
    for _ in range(30):
        assert_same(hub.take(6), local.take(6))
    state = hub.state_dict()
    again = stream_of(tmp_path / "train")
    again.load_state_dict(state)
    assert_same(again.take(6), hub.take(6))
    assert set(targets_of(hub.take(300))) == set(pairs_of(texts))


def test_wrong_options_say_what_would_do(tmp_path, stream_of):
    write_shards(tmp_path / "texts", 1)
    cases = [
        ({"block_size": 1}, "block_size=1"),
        ({"chunk_bytes": 0}, "chunk_bytes=0: give at least 1"),
        ({"eos_token_id": None}, "eos_token_id=None"),
        ({"on_bad_record": "ignore"}, "on_bad_record='ignore'"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            stream_of(tmp_path / "texts", **options)
    with pytest.raises(ValueError, match=r"encode gave token ids from .* and vocab_size is 300"):
        stream_of(tmp_path / "texts", vocab_size=300).take(1)


def test_ids_take_two_bytes_where_they_fit(tmp_path, stream_of):
    write_lines(tmp_path / "a.jsonl", ["abc"] * 100)
    for vocab_size, expected in ((65_536, np.uint16), (65_537, np.int32)):
        stream = stream_of(tmp_path / "a.jsonl", vocab_size=vocab_size, pad_token_id=vocab_size - 1)
        batch = stream.take(1)
        assert stream._lanes[0].chunk.token_ids.dtype == expected and batch["input_ids"].dtype == torch.int64


MEASURE_GROWTH = """
import json, re, sys, threading
from pathlib import Path
import numpy as np
from hfllm.data import RowStream, find_shards

folder, megabytes = Path(sys.argv[1]), int(sys.argv[2])
for shard in range(16):
    with (folder / f"{shard}.jsonl").open("w") as file:
        for number in range(megabytes * 50):  # a kilobyte and a quarter each
            file.write(json.dumps({"text": f"line {number:10} of a long text, which goes on\\n" * 25}) + "\\n")

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

def watch():
    while not done.wait(0.005):
        samples.append(anonymous())

before, samples, done = anonymous(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
stream = RowStream(
    find_shards(str(folder)), lambda texts: [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts], seed=0,
    block_size=256, bos_token_id=256, eos_token_id=257, pad_token_id=258, vocab_size=300, key="key",
)
while stream.epoch < 1:
    stream.take(64)
done.set()
watcher.join()
stream.close()
print(json.dumps({"peak": max(samples) - before, "rows": stream.position}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of anonymous memory")
def test_memory_does_not_grow_with_the_text(tmp_path):
    results = []
    for megabytes in (20, 200):
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        command = [sys.executable, "-c", MEASURE_GROWTH, str(folder), str(megabytes)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results.append(json.loads(re.search(r"\{.*\}", output)[0]))
    assert results[1]["rows"] > 9 * results[0]["rows"]
    assert results[1]["peak"] < 1.25 * results[0]["peak"] < 250, results
