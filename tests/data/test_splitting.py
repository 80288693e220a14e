import hashlib
import json
import re

import datasets
import pytest

from hfllm.data import Corpus, load_corpus, split_documents
from hfllm.data.corpus import describe_held_out


def load(tmp_path, texts: list[str]) -> Corpus:
    path = tmp_path / f"{hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:8]}.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return load_corpus(str(path), cache_dir=tmp_path / "cache")


def texts_of(documents: datasets.Dataset) -> list[str]:
    """The documents' texts in order; consecutive rows with the same number are one document."""
    texts, last = [], None
    for row in documents:
        if row["document"] != last:
            texts.append("")
        texts[-1] += row["text"]
        last = row["document"]
    return texts


def test_every_document_is_on_exactly_one_side(tmp_path):
    texts = [f"document {n} " * 10 for n in range(1000)]
    training, validation = split_documents(load(tmp_path, texts), validation_fraction=0.05)
    assert sorted(texts_of(training) + texts_of(validation)) == sorted(texts)
    assert 45 <= len(validation) <= 50  # and never more than the fraction, if any document fits


def test_the_choice_depends_on_content_and_not_on_order(tmp_path):
    texts = [f"document {n}" for n in range(200)]
    sides = [
        sorted(texts_of(split_documents(load(tmp_path, order), validation_fraction=0.1)[1]))
        for order in (texts, texts[::-1], [*texts[50:], *texts[:50]])
    ]
    assert sides[0] == sides[1] == sides[2]


def test_equal_documents_never_straddle_the_split(tmp_path):
    texts = [f"document {n % 20}" for n in range(200)]
    training, validation = split_documents(load(tmp_path, texts), validation_fraction=0.2)
    assert len(validation) > 0
    assert not set(texts_of(training)) & set(texts_of(validation))


def test_training_documents_come_in_a_fixed_shuffled_order_with_their_parts_together(tmp_path):
    texts = ["".join(f"{n} {m}\n" for m in range(20_000)) for n in range(10)]  # each has several parts
    corpus = load(tmp_path, texts)
    assert len(corpus.documents) > 20
    training, validation = split_documents(corpus, validation_fraction=0)
    again, _ = split_documents(corpus, validation_fraction=0)
    assert len(validation) == 0
    assert texts_of(training) != texts and sorted(texts_of(training)) == sorted(texts)
    assert texts_of(training) == texts_of(again)


def test_a_document_larger_than_the_validation_share_is_left_to_training(tmp_path):
    texts = ["x" * 50_000, *(f"document {n:5}" * 10 for n in range(1000))]
    for fraction in (0.01, 0.02, 0.1):
        training, validation = split_documents(load(tmp_path, texts), validation_fraction=fraction)
        assert texts[0] in texts_of(training)
        assert sum(map(len, validation["text"])) <= fraction * sum(map(len, texts))


def test_of_few_documents_the_smallest_validates(tmp_path, caplog):
    training, validation = split_documents(load(tmp_path, ["aaaa", "bb", "ccc"]), validation_fraction=0.01)
    assert texts_of(validation) == ["bb"]
    assert sorted(texts_of(training)) == ["aaaa", "ccc"]
    assert "Validation takes 22 % of the bytes" in caplog.text


def novel(letter: str, num_bytes: int) -> str:
    """A text of paragraphs of some 500 bytes, each with its number."""
    paragraphs = [f"{letter} {number:06} " + f"{letter}word " * 70 for number in range(num_bytes // 500)]
    return "\n\n".join(paragraphs) + "\n"


def test_of_a_few_long_documents_each_is_learned_and_each_validates(tmp_path):
    for language, size in (("fr", 300_000), ("uk", 200_000), ("zh", 200_000)):
        (tmp_path / f"{language}.txt").write_text(novel(language, size))
    names = [str(tmp_path / f"{language}.txt") for language in ("fr", "uk", "zh")]
    corpus = load_corpus(",".join(names), cache_dir=tmp_path / "cache")
    for fraction in (0.05, 0.3):
        training, validation = split_documents(corpus, validation_fraction=fraction)
        heads = {text[:2]: text for text in texts_of(training)}
        tails = {text[:2]: text for text in texts_of(validation)}
        assert set(heads) == set(tails) == {"fr", "uk", "zh"}
        for language in tails:
            whole = (tmp_path / f"{language}.txt").read_text()
            assert heads[language] + tails[language] == whole
            assert heads[language].endswith("\n\n")  # between two paragraphs
            assert len(tails[language]) / len(whole) == pytest.approx(fraction, rel=0.1)
        assert training.features == validation.features
    described = describe_held_out(corpus, split_documents(corpus, validation_fraction=0.05)[1])
    assert described.startswith("3 documents, ")
    assert all(re.search(rf"(4\.[5-9]|5\.0)% of {re.escape(name)}", described) for name in names)


def test_beside_long_documents_short_ones_are_held_out_whole(tmp_path):
    short = [f"short {number:4} " * 30 for number in range(200)]
    corpus = load(tmp_path, [novel("a", 400_000), novel("b", 300_000), *short])
    training, validation = split_documents(corpus, validation_fraction=0.05)
    on_sides = [[text for text in texts_of(side) if text.startswith("short")] for side in (training, validation)]
    assert sorted(on_sides[0] + on_sides[1]) == sorted(short) and 5 <= len(on_sides[1]) <= 10
    assert {text[0] for text in texts_of(training)} == {text[0] for text in texts_of(validation)} == {"a", "b", "s"}


def test_a_long_document_without_paragraphs_is_cut_at_a_line_or_a_word_or_anywhere(tmp_path):
    lines, words, letters = "a line\n" * 20_000, "bword " * 20_000, "c" * 140_000
    training, _ = split_documents(load(tmp_path, [lines, words, letters]), validation_fraction=0.1)
    heads = {text[0]: text for text in texts_of(training)}
    assert heads["a"].endswith("\n") and heads["b"].endswith("d ") and len(heads["c"]) == 126_000


def test_equal_long_documents_are_cut_at_the_same_place(tmp_path):
    training, validation = split_documents(load(tmp_path, [novel("a", 40_000)] * 2), validation_fraction=0.1)
    (head, _), (tail, _) = texts_of(training), texts_of(validation)
    assert texts_of(training) == [head] * 2 and texts_of(validation) == [tail] * 2
    assert head + tail == novel("a", 40_000)


@pytest.mark.parametrize("size", [10, 40_000, 65_536, 65_537, 300_000])
@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.999, 1e-20])
def test_a_single_document_is_cut_as_in_the_book(tmp_path, size, fraction):
    text = ("é→\n" * size)[:size]
    training, validation = split_documents(load(tmp_path, [text]), validation_fraction=fraction)
    cut = min(max(int(len(text) * (1 - fraction)), 1), len(text) - 1)  # neither side is ever empty
    assert texts_of(training) == [text[:cut]]
    assert texts_of(validation) == [text[cut:]]
    assert training.features == validation.features


def test_what_cannot_be_split_says_so(tmp_path):
    with pytest.raises(ValueError, match="same text"):
        split_documents(load(tmp_path, ["a", "a"]), validation_fraction=0.1)
    with pytest.raises(ValueError, match="single character"):
        split_documents(load(tmp_path, ["a"]), validation_fraction=0.1)
    for fraction in (-0.1, 1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="at least 0 and less than 1"):
            split_documents(load(tmp_path, ["a", "b"]), validation_fraction=fraction)
