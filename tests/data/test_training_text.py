"""The training and validation rows of a run, and the names of validation texts."""

import json

import pytest
from accelerate import Accelerator

from hfllm.data.training_text import prepare_text
from hfllm.tokenization import document_encoder, tokenizer_fingerprint, train_bpe


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["one two three four " * 20], 262, show_progress=False)


@pytest.fixture
def prepare(tokenizer, tmp_path):
    encoding = {"encode": document_encoder(tokenizer), "tokenizer_sha256": tokenizer_fingerprint(tokenizer)}
    options = {**encoding, "block_size": 16, "accelerator": Accelerator(cpu=True), "cache_dir": str(tmp_path / "cache")}
    return lambda *args, **others: prepare_text(*args, tokenizer, **options, **others)


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"text {n} one two"}) + "\n" for n in range(400)))
    (tmp_path / "fr.txt").write_text("un deux trois " * 10)
    (tmp_path / "uk.txt").write_text("a text of another kind " * 10)
    return tmp_path


@pytest.mark.parametrize("streaming", [False, True])
def test_validation_texts_of_ones_own_are_told_apart_by_their_names(prepare, texts, streaming):
    names = ",".join(str(texts / name) for name in ("fr.txt", "uk.txt"))
    text = prepare(str(texts / "train.jsonl"), validation_dataset=names, streaming=streaming)
    assert {name: rows.num_bytes for name, rows in text.validation_parts.items()} == {"fr": 140, "uk": 230}
    assert text.validation.num_bytes == 370
    assert "validation fr: 1 document, 140 bytes" in text.summary
    if not streaming:
        assert text.train.account["documents"] == 400  # nothing is held back
    text.close()


def test_one_validation_text_has_no_name_of_its_own(prepare, texts):
    text = prepare(str(texts / "train.jsonl"), validation_dataset=str(texts / "fr.txt"))
    assert text.validation.num_bytes == 140 and text.validation_parts == {}


def test_validation_documents_that_are_trained_on_are_reported_and_a_stream_leaves_them_out(prepare, texts, caplog):
    (texts / "seen.jsonl").write_text(json.dumps({"text": "text 7 one two"}) + "\n" + json.dumps({"text": "new"}))
    prepare(str(texts / "train.jsonl"), validation_dataset=str(texts / "seen.jsonl"))
    assert "1 of the 2 documents to evaluate on" in caplog.text
    text = prepare(str(texts / "train.jsonl"), validation_dataset=str(texts / "seen.jsonl"), streaming=True)
    while text.train.epoch == 0:
        text.train.take(1)
    assert text.train.account["held_out_documents"] >= 1
    text.close()


def test_the_summary_says_of_which_files_text_is_held_out(prepare, texts):
    (texts / "a.txt").write_text("one two three\n" * 2000)
    (texts / "b.txt").write_text("four five six\n" * 2000)
    text = prepare(f"{texts}/a.txt,{texts}/b.txt", validation_fraction=0.1)
    assert {name: rows.num_bytes for name, rows in text.validation_parts.items()} == {"a": 2800, "b": 2800}
    assert f"held out: 2 documents, 5,600 bytes: 10.0% of {texts}/a.txt, 10.0% of {texts}/b.txt" in text.summary


def test_options_that_exclude_each_other_are_refused(prepare, texts):
    for options, message in (
        ({}, "There is nothing to evaluate on"),
        ({"validation_dataset": "x.txt", "validation_split": "test"}, "both say what to evaluate on"),
        ({"validation_fraction": 0.1, "streaming": True, "stride": 4}, "stride cuts prepared documents"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(str(texts / "train.jsonl"), **options)
