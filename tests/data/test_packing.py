import json
import math
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import GPT2Tokenizer

from hfllm.data import Rows, load_corpus, packing, prepare_rows, split_documents
from hfllm.tokenization import document_encoder, train_bpe


FEATURES = datasets.Features({"text": datasets.Value("large_string"), "document": datasets.Value("int64")})
BOS, EOS, PAD = 256, 257, 258  # after the 256 bytes, each of which is its own token
OPTIONS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "vocab_size": 300, "progress": False}


def encode(texts: list[str]) -> list[np.ndarray]:
    """One token per byte."""
    return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]


def documents_of(*texts: str | list[str]) -> datasets.Dataset:
    """One document per argument; a list gives its parts."""
    rows = [
        {"text": part, "document": number}
        for number, parts in enumerate(texts)
        for part in ([parts] if isinstance(parts, str) else parts)
    ]
    return datasets.Dataset.from_list(rows, features=FEATURES)


@pytest.fixture
def rows_of(tmp_path):
    """prepare_rows of texts, one token per byte, in a cache of its own."""

    def rows_of(*texts: str | list[str], key: str | None = None, encoder=encode, **options) -> Rows:
        options = {"block_size": 4, "token_bytes": lambda token: 1, "allow_short": True, **OPTIONS, **options}
        return prepare_rows(documents_of(*texts), encoder, key=key or repr(texts), cache_dir=tmp_path, **options)

    return rows_of


def test_joined_rows_are_those_of_each_text_in_turn(rows_of):
    parts = {"a": rows_of("abcdefgh", "ij"), "b": rows_of("klmnop")}
    joined = packing.JoinedRows(parts)
    assert len(joined) == len(parts["a"]) + len(parts["b"]) and joined.num_bytes == 16
    order = np.array([len(joined) - 1, 0, 1])
    batch = joined.batch(order, count_once=True)
    alone = [parts["b"].batch(np.array([len(parts["b"]) - 1])), parts["a"].batch(np.array([0, 1]))]
    for name, tensor in batch.items():
        assert tensor.tolist() == torch.cat([each[name] for each in alone]).tolist()


def tokens_of(text: str | list[str]) -> list[int]:
    return list("".join(text).encode())


def expected_packed(texts: list[str | list[str]], block_size: int) -> list[tuple[list[int], list[int]]]:
    """The rows and their positions, token by token."""
    stream = [(token, n) for text in texts for n, token in enumerate([BOS, *tokens_of(text), EOS])]
    rows = []
    for start in range(0, len(stream) - 1, block_size):
        row, positions = [], []
        for index in range(start, start + block_size + 1):
            token, place = stream[index] if index < len(stream) else (PAD, 0)
            restarts = index == start or place == 0
            positions.append(0 if restarts else positions[-1] + 1)
            row.append(token)
        rows.append((row, positions))
    return rows


def expected_windows(texts: list[str | list[str]], block_size: int, stride: int) -> list[tuple[list[int], int]]:
    """The rows and how many of their targets were seen before, token by token."""
    rows = []
    for text in texts:
        tokens, seen = tokens_of(text), {0}
        for start in range(0, len(tokens), stride):
            window = range(start, min(start + block_size + 1, len(tokens)))
            if set(window) <= seen:
                continue
            overlap = len(set(window[1:]) & seen)
            seen |= set(window)
            rows.append(([tokens[i] for i in window] + [PAD] * (block_size + 1 - len(window)), overlap))
    return rows


def test_documents_are_packed_into_rows_that_share_one_token(rows_of):
    rows = rows_of("abc", "de", block_size=4)
    # The stream: BOS a b c | EOS BOS d e | EOS
    a, b, c, d, e = b"abcde"
    assert rows.dataset["input_ids"][:] == [[BOS, a, b, c, EOS], [EOS, BOS, d, e, EOS]]
    assert rows.dataset["position_ids"][:] == [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]]
    assert rows.num_targets.tolist() == [4, 3]
    assert rows.overlap.tolist() == [0, 0]
    batch = rows.batch(np.array([1, 0]))
    assert batch["input_ids"].tolist() == [[EOS, BOS, d, e], [BOS, a, b, c]]
    assert batch["position_ids"].tolist() == [[0, 0, 1, 2], [0, 1, 2, 3]]
    assert batch["shift_labels"].tolist() == [[-100, d, e, EOS], [a, b, c, EOS]]
    assert all(tensor.dtype == torch.int64 and tensor.is_contiguous() for tensor in batch.values())


def test_the_last_row_is_padded_and_padding_is_not_a_target(rows_of):
    rows = rows_of("abcd", block_size=4)  # BOS a b c | d EOS
    assert rows.dataset["input_ids"][1] == [ord("d"), EOS, PAD, PAD, PAD]
    assert rows.dataset["position_ids"][1] == [0, 1, 0, 0, 0]
    assert rows.batch(np.array([1]))["shift_labels"].tolist() == [[EOS, -100, -100, -100]]
    assert rows.account["padding_tokens"] == 3


def test_padding_that_is_also_the_eos_is_still_no_target(rows_of):
    rows = rows_of("abcd", block_size=4, pad_token_id=EOS)
    assert rows.batch(np.array([1]))["shift_labels"].tolist() == [[EOS, -100, -100, -100]]


def test_no_row_is_added_when_the_last_token_is_already_a_target(rows_of):
    rows = rows_of("abc", block_size=4)  # BOS a b c EOS: exactly one row
    assert len(rows) == 1 and rows.account["padding_tokens"] == 0


def test_eos_replaces_a_missing_bos(rows_of):
    assert rows_of("ab", block_size=3, bos_token_id=None).dataset["input_ids"][:] == [[EOS, *b"ab", EOS]]


def test_the_parts_of_a_document_are_joined(rows_of):
    parts = rows_of(["ab", "c", "def"], ["x", "y"])
    whole = rows_of("abcdef", "xy")
    assert parts.dataset[:] == whole.dataset[:]
    assert parts.account == whole.account


@pytest.mark.parametrize("block_size", [2, 3, 7, 16, 1000])
@pytest.mark.parametrize("encode_parts", [1, 3, 4096])
@pytest.mark.parametrize("chunk_tokens", [1, 64, 1 << 21])
def test_packing_equals_packing_token_by_token(rows_of, monkeypatch, block_size, encode_parts, chunk_tokens):
    monkeypatch.setattr(packing, "ENCODE_PARTS", encode_parts)
    monkeypatch.setattr(packing, "CHUNK_TOKENS", chunk_tokens)
    generator = np.random.default_rng(block_size)
    texts = [["x" * n for n in generator.integers(1, 9, size=k)] for k in generator.integers(1, 5, size=30)]
    rows = rows_of(*texts, block_size=block_size)
    expected = expected_packed(texts, block_size)
    assert rows.dataset["input_ids"][:] == [row for row, _ in expected]
    assert rows.dataset["position_ids"][:] == [positions for _, positions in expected]

    num_tokens = sum(len(tokens_of(text)) for text in texts)
    assert rows.account == {
        "documents": 30,
        "text_bytes": num_tokens,
        "text_tokens": num_tokens,
        "special_tokens": 60,
        "boundary_tokens": 30,
        "cropped_tokens": 0,
        "rows": len(expected),
        "row_tokens": len(expected) * (block_size + 1),
        "padding_tokens": sum(row.count(PAD) for row, _ in expected),
        "row_targets": num_tokens + 60 - 30,
        "targets": num_tokens + 60 - 30,
        "target_bytes": num_tokens,
    }
    assert rows.account["row_tokens"] == num_tokens + 60 + rows.account["padding_tokens"] + len(rows) - 1


def test_the_summary_says_what_became_of_the_documents(rows_of):
    assert rows_of("abc", "defg", block_size=4).summary() == (
        "2 documents, 7 bytes -> 7 tokens (1.00 bytes each) and 4 separators -> 3 rows of 4 + 1, 2 padding, 0 cropped"
    )


def test_every_token_is_a_target_once_except_the_first_ones(rows_of):
    texts = ["", "a", "longer text", "ü"] * 5 + ["z" * 50]
    rows = rows_of(*texts, block_size=5)
    batch = rows.batch(np.arange(len(rows)))
    targets = batch["shift_labels"][batch["shift_labels"] != -100].tolist()
    assert targets == [token for text in texts for token in [*text.encode(), EOS]]
    assert rows.num_targets.sum() == len(targets)
    assert rows.num_bytes == len("".join(texts).encode())


def test_a_document_does_not_see_its_neighbours_positions(rows_of):
    """Changing one document changes neither the tokens nor the positions of the others."""
    positions = rows_of("aaaa", "bbb", "cc", block_size=100).dataset["position_ids"][0][:15]
    assert positions == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 0, 1, 2, 3]


def test_windows_slide_over_each_document_by_itself(rows_of):
    rows = rows_of("abcdefgh", "xy", "z", block_size=4, stride=2)
    assert [
        bytes(row).rstrip(b"\0") for row in rows_of("abcdefgh", "xy", stride=2, pad_token_id=0).dataset["input_ids"]
    ] == [
        b"abcde",
        b"cdefg",
        b"efgh",
        b"xy",
    ]
    assert rows.dataset["position_ids"][2:] == [[0, 1, 2, 3, 0], [0, 1, 0, 0, 0]]
    assert rows.num_targets.tolist() == [4, 4, 3, 1]
    assert rows.overlap.tolist() == [0, 2, 2, 0]
    assert rows.account["targets"] == 11 - 3 and rows.account["row_targets"] == 12  # "z" alone has nothing to predict
    assert rows.num_bytes == 11 - 3


@pytest.mark.parametrize(("block_size", "stride"), [(4, 4), (4, 1), (4, 3), (7, 2), (100, 50)])
@pytest.mark.parametrize("chunk_tokens", [1, 1 << 21])
def test_windows_equal_windows_token_by_token(rows_of, monkeypatch, block_size, stride, chunk_tokens):
    monkeypatch.setattr(packing, "CHUNK_TOKENS", chunk_tokens)
    monkeypatch.setattr(packing, "ENCODE_PARTS", 3)
    generator = np.random.default_rng(stride)
    texts = [["x" * n for n in generator.integers(0, 9, size=k)] for k in generator.integers(1, 5, size=30)]
    rows = rows_of(*texts, block_size=block_size, stride=stride)
    expected = expected_windows(texts, block_size, stride)
    assert rows.dataset["input_ids"][:] == [row for row, _ in expected]
    assert rows.overlap.tolist() == [overlap for _, overlap in expected]
    lengths = [len(tokens_of(text)) for text in texts]
    assert rows.account["targets"] == sum(lengths) - sum(length > 0 for length in lengths)


def test_evaluation_counts_each_token_once(rows_of):
    text = "".join(chr(33 + n) for n in range(50))
    rows = rows_of(text, block_size=8, stride=3)
    for count_once, expected in ((True, rows.account["targets"]), (False, rows.account["row_targets"])):
        labels = rows.batch(np.arange(len(rows)), count_once=count_once)["shift_labels"]
        assert (labels != -100).sum() == expected
        assert set(labels[labels != -100].tolist()) == set(text[1:].encode())
    assert rows.account["targets"] == 49


def test_without_overlap_counting_once_changes_nothing(rows_of):
    for options in ({}, {"stride": 4}):
        rows = rows_of("some text", "more of it", **options)
        plain, once = (rows.batch(np.arange(len(rows)), count_once=flag)["shift_labels"] for flag in (False, True))
        assert plain.equal(once)


def test_the_bytes_of_a_first_token_are_left_out_where_it_is_not_a_target(rows_of):
    def two_byte_tokens(texts):
        return [np.frombuffer(text.encode(), dtype=np.uint8)[::2] for text in texts]

    rows = rows_of("abcdef", ["", "gh", "ij"], encoder=two_byte_tokens, stride=4, token_bytes=lambda token: 2)
    assert rows.num_bytes == 10 - 4


def test_ids_take_two_bytes_where_they_fit(rows_of):
    for vocab_size, expected in ((65_536, "uint16"), (65_537, "int32")):
        rows = rows_of("abc", vocab_size=vocab_size, pad_token_id=vocab_size - 1, block_size=8)
        assert rows.dataset.features["input_ids"].feature.dtype == expected
        assert rows.dataset["input_ids"][0][-1] == vocab_size - 1
    rows = rows_of("abc" * 30_000, block_size=65_536)
    assert rows.dataset.features["position_ids"].feature.dtype == "int32"
    assert rows.batch(np.array([0]))["position_ids"][0, -1] == 65_535


def test_wrong_options_say_what_would_do(rows_of):
    cases = [
        ({"block_size": 1}, "block_size=1"),
        ({"stride": 0}, "stride=0"),
        ({"stride": 5}, "at most block_size=4"),
        ({"stride": 2, "token_bytes": None}, "stride needs token_bytes"),
        ({"eos_token_id": None}, "bos_token_id=256|eos_token_id=None"),
        ({"pad_token_id": 300}, "pad_token_id=300: it must be a token id, from 0 to vocab_size - 1 = 299"),
        ({"vocab_size": 260, "encoder": lambda texts: [np.array([260])]}, "token ids from 260 to 260"),
        ({"encoder": lambda texts: [np.array([-1])]}, "token ids from -1"),
        ({"encoder": lambda texts: []}, "encode gave 0 arrays for 1 texts"),
        ({"allow_short": False, "block_size": 100}, "have 5 tokens, .* needs 101. Choose a smaller block_size"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            rows_of("abc", **options)
    with pytest.raises(ValueError, match="no documents"):
        prepare_rows(documents_of("abc").select([]), encode, block_size=4, key="key", **OPTIONS)
    with pytest.raises(ValueError, match="nothing to predict"):
        rows_of("a", "b", stride=1)


@pytest.mark.fault(16)
def test_short_text_makes_one_padded_row_where_that_is_allowed(rows_of):
    rows = rows_of("abc", block_size=100, allow_short=True)
    assert len(rows) == 1 and rows.account["targets"] == 4
    with pytest.raises(ValueError, match="Choose a smaller block_size"):  # also when the rows are in the cache already
        rows_of("abc", block_size=100, allow_short=False)


def test_rows_are_made_once_for_a_key_and_its_options(rows_of):
    num_calls = 0

    def counted(texts):
        nonlocal num_calls
        num_calls += 1
        return encode(texts)

    first = rows_of("abcdef", key="k", encoder=counted)
    again = rows_of("abcdef", key="k", encoder=counted)
    assert num_calls == 1
    assert first.dataset[:] == again.dataset[:] and first.account == again.account
    changes = [{"block_size": 5}, {"stride": 2}, {"pad_token_id": 0}, {"vocab_size": 400}, {"bos_token_id": 1}]
    for number, change in enumerate(changes, start=2):
        rows_of("abcdef", key="k", encoder=counted, **change)
        assert num_calls == number
    rows_of("abcdef", key="other tokenizer", encoder=counted)
    assert num_calls == len(changes) + 2


def test_a_batch_may_span_chunks_of_the_file(rows_of, monkeypatch):
    monkeypatch.setattr(packing, "CHUNK_TOKENS", 16)
    monkeypatch.setattr(packing, "ENCODE_PARTS", 1)
    texts = [f"document number {n}" for n in range(40)]
    rows = rows_of(*texts, block_size=4)
    assert rows.dataset.data.column("input_ids").num_chunks > 20
    expected = expected_packed(texts, 4)
    order = np.random.default_rng(0).permutation(len(rows))
    batch = rows.batch(order)
    assert batch["input_ids"].tolist() == [expected[row][0][:-1] for row in order]
    assert batch["position_ids"].tolist() == [expected[row][1][:-1] for row in order]
    for index in (-1, len(rows)):
        with pytest.raises(IndexError, match="asked for"):
            rows.batch(np.array([0, index]))


@pytest.mark.fault(29)
def test_one_flipped_bit_in_cached_rows_is_found_when_they_are_first_read(rows_of, monkeypatch, tmp_path):
    monkeypatch.setattr(packing, "CHUNK_TOKENS", 16)
    text = "abcdefghijklmnopqrstuvwxyz" * 4
    expected = rows_of(text).batch(np.arange(20))["input_ids"]
    (folder,) = tmp_path.glob("rows-*")
    content = bytearray((folder / "data.arrow").read_bytes())
    offset, _, _ = json.loads((folder / "account.json").read_text())["batches"][-1]
    content[offset] ^= 1
    (folder / "data.arrow").write_bytes(content)
    rows = rows_of(text)
    assert torch.equal(rows.batch(np.arange(20))["input_ids"], expected)  # the last batch is not read
    with pytest.raises(OSError, match="has changed since it was written") as raised:
        rows.batch(np.array([len(rows) - 1]))
    assert str(folder) in str(raised.value)


def test_rows_are_views_on_the_file(rows_of):
    rows = rows_of("x" * 500_000, block_size=256)
    for views in (rows._input_ids, rows._position_ids):
        assert not any(view.flags.owndata or view.flags.writeable for view in views)


@pytest.mark.fault(17)
def test_a_control_token_written_in_a_document_stays_text(tmp_path):
    tokenizer = train_bpe(["a few words to train on"], vocab_size=300)
    texts = ["before <|endoftext|> after", "<|startoftext|><|pad|>", "plain"]
    options = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    options |= {"vocab_size": len(tokenizer), "cache_dir": tmp_path, "progress": False}
    rows = prepare_rows(documents_of(*texts), document_encoder(tokenizer), block_size=16, key="key", **options)
    batch = rows.batch(np.arange(len(rows)))
    targets = batch["shift_labels"][batch["shift_labels"] != -100]
    assert (targets == tokenizer.eos_token_id).sum() == len(texts)
    assert not ((targets == tokenizer.bos_token_id) | (targets == tokenizer.pad_token_id)).any()
    assert tokenizer.decode(targets) == "<|endoftext|>".join([*texts, ""])


SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(not SHARED.exists(), reason="needs the vocabulary of GPT-2")
def test_the_verdict_is_packed_as_gpt2_encodes_it(tmp_path):
    tokenizer = GPT2Tokenizer(vocab=str(SHARED / "gpt2_vocab.json"), merges=str(SHARED / "gpt2_merges.txt"))
    corpus = load_corpus(str(SHARED / "the-verdict.txt"), cache_dir=tmp_path)
    training, validation = split_documents(corpus, validation_fraction=0.1)
    text = (SHARED / "the-verdict.txt").read_bytes().decode()
    options = {"block_size": 256, "bos_token_id": None, "eos_token_id": 50256, "pad_token_id": 50256, "progress": False}
    options |= {"vocab_size": 50257, "cache_dir": tmp_path, "stride": 256}
    options["token_bytes"] = lambda token: len(tokenizer.convert_ids_to_tokens(token))
    sides = {"training": (training, text[:18431]), "validation": (validation, text[18431:])}
    assert len(text) == 20479  # and 18431 is nine tenths of it, as in the book's chapter 5
    for key, (documents, expected) in sides.items():
        rows = prepare_rows(documents, document_encoder(tokenizer), key=key, **options)
        tokens = tokenizer(expected)["input_ids"]
        batch = rows.batch(np.arange(len(rows)))
        assert batch["shift_labels"][batch["shift_labels"] != -100].tolist() == tokens[1:]
        assert len(rows) == math.ceil((len(tokens) - 1) / 256)  # the last one padded; the book's loader drops it
        assert rows.num_bytes == len(expected.encode()) - len(tokenizer.decode(tokens[:1]).encode())


@pytest.mark.skipif(not SHARED.exists(), reason="needs the vocabulary of GPT-2")
def test_encoding_a_long_file_in_parts_gives_the_tokens_of_the_whole(tmp_path):
    tokenizer = GPT2Tokenizer(vocab=str(SHARED / "gpt2_vocab.json"), merges=str(SHARED / "gpt2_merges.txt"))
    text = (SHARED / "the-verdict.txt").read_bytes().decode() * 10
    (tmp_path / "long.txt").write_bytes(text.encode())
    corpus = load_corpus(str(tmp_path / "long.txt"), cache_dir=tmp_path)
    assert len(corpus.documents) > 3
    encoded = document_encoder(tokenizer)(corpus.documents["text"][:])
    assert np.concatenate(encoded).tolist() == tokenizer(text)["input_ids"]


MEASURE_PEAK = """
import json, re, sys, threading, time
from pathlib import Path
import numpy as np
from hfllm.data import load_corpus, prepare_rows, split_documents

folder, megabytes = Path(sys.argv[1]), int(sys.argv[2])
with (folder / "big.txt").open("w") as file:
    for number in range(megabytes * 20_000):
        file.write(f"line {number:10} of a long text, which goes on\\n")  # 50 bytes

def anonymous():  # pages of the memory map are not counted: the system takes them back when it needs them
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

def watch():
    while not done.wait(0.005):
        samples.append(anonymous())

before, samples, done = anonymous(), [], threading.Event()
watcher = threading.Thread(target=watch)
watcher.start()
corpus = load_corpus(str(folder / "big.txt"), cache_dir=folder)
training, validation = split_documents(corpus, validation_fraction=0.05)
rows = prepare_rows(
    training, lambda texts: [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts], block_size=256,
    bos_token_id=256, eos_token_id=257, pad_token_id=258, vocab_size=300, key="key", cache_dir=folder, progress=False,
)
done.set()
watcher.join()
print(json.dumps({"peak": max(samples) - before, "rows": len(rows)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of anonymous memory")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    results = []
    for megabytes in (20, 200):
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        command = [sys.executable, "-c", MEASURE_PEAK, str(folder), str(megabytes)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results.append(json.loads(re.search(r"\{.*\}", output)[0]))
    assert results[1]["rows"] > 9 * results[0]["rows"]
    assert results[1]["peak"] < 1.25 * results[0]["peak"] < 400, results
