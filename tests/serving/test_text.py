import random

import pytest
import torch

from hfllm.serving.text import FollowTexts, TextStream


def stream(tokenizer, text: str, **options) -> tuple[list[str], TextStream]:
    """The pieces of a text that arrives token by token."""
    texts = TextStream(tokenizer, **options)
    pieces = [texts.put(token_id) for token_id in tokenizer(text, add_special_tokens=False).input_ids]
    return [piece for piece in [*pieces, texts.end()] if piece], texts


def test_a_character_is_written_when_its_last_byte_is_there(tokenizer):
    assert len(tokenizer("é😀", add_special_tokens=False).input_ids) == 6, "these characters are several tokens each"
    assert stream(tokenizer, "aé😀b")[0] == ["a", "é", "😀", "b"]


def test_a_last_character_that_lacks_bytes_is_left_out(tokenizer):
    texts = TextStream(tokenizer)
    for token_id in tokenizer("a😀", add_special_tokens=False).input_ids[:-1]:
        texts.put(token_id)
    assert texts.end() == ""
    assert texts.text == "a"


def test_bytes_that_are_not_a_character_are_written_as_the_tokenizer_decodes_them(tokenizer):
    lone = tokenizer("é", add_special_tokens=False).input_ids[1]
    ids = [
        *tokenizer("a", add_special_tokens=False).input_ids,
        *[lone] * 40,
        *tokenizer("b", add_special_tokens=False).input_ids,
    ]
    texts = TextStream(tokenizer)
    pieces = [texts.put(token_id) for token_id in ids]
    assert texts.text + texts.end() == tokenizer.decode(ids) == "a" + 40 * "\ufffd" + "b"
    assert sum(piece != "" for piece in pieces) > 30, "it does not wait for the end"


def test_special_tokens_are_not_text(tokenizer):
    ids = [*tokenizer("a", add_special_tokens=False).input_ids, tokenizer.eos_token_id, tokenizer.pad_token_id]
    texts = TextStream(tokenizer)
    assert [texts.put(token_id) for token_id in ids] == ["a", "", ""]
    assert texts.end() == ""


@pytest.mark.parametrize(
    ("stop", "without", "with_it"),
    [
        (["ab"], "x", "xab"),
        (["bcd", "bc"], "xa", "xabc"),  # the one that is complete first
        (["abcd", "bc"], "xa", "xabc"),
        (["cd", "abcd"], "x", "xabcd"),  # complete at the same place: the longer one
        (["y"], "xabcd", "xabcd"),
        (["d!"], "xabcd", "xabcd"),  # held back, and no stop after all
    ],
)
def test_the_text_is_cut_exactly_at_the_stop_that_is_complete_first(tokenizer, stop, without, with_it):
    assert "".join(stream(tokenizer, "xabcd", stop=stop)[0]) == without
    assert "".join(stream(tokenizer, "xabcd", stop=stop, keep_stop=True)[0]) == with_it


def test_every_cut_is_that_of_the_whole_text(tokenizer):
    draw = random.Random(0)
    num_stopped = 0
    for _ in range(300):
        text = "".join(draw.choices(["a", "b", "ab", " return", "é", "\n"], k=12))
        stops = ["".join(draw.choices("ab n\né", k=draw.randint(1, 4))) for _ in range(draw.randint(1, 3))]
        ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
        expected = text
        if ends:
            longest = max((stop for stop in stops if text[: min(ends)].endswith(stop)), key=len)
            expected = text[: min(ends) - len(longest)]
        pieces, texts = stream(tokenizer, text, stop=stops)
        assert "".join(pieces) == texts.text == expected
        assert texts.is_stopped == bool(ends)
        num_stopped += bool(ends)
    assert 50 < num_stopped < 300


def test_nothing_is_written_that_may_belong_to_a_stop(tokenizer):
    assert stream(tokenizer, "x\n\ny", stop=["\n\n\n"])[0] == ["x", "\n\ny"]


def test_a_first_word_keeps_the_space_that_the_prompt_gives_it():
    class Sentencepiece:
        """Llama's first tokenizer leaves out the space before the first word that it decodes."""

        def decode(self, ids, **options):
            return "".join([" one", " two", " three"][token_id] for token_id in ids).removeprefix(" ")

    texts = TextStream(Sentencepiece(), prompt_ids=[0])
    assert [texts.put(1), texts.put(2)] == [" two", " three"]


def test_each_row_of_generate_ends_at_its_own_stop(tokenizer):
    (a,), (b,) = (tokenizer(text, add_special_tokens=False).input_ids for text in "ab")
    heard = []
    streams = [TextStream(tokenizer, stop=["b"]), TextStream(tokenizer, stop=["aa"])]
    follow = FollowTexts(streams, on_text=heard.append)
    assert follow(torch.tensor([[a], [a]]), None).tolist() == [False, False]
    assert follow(torch.tensor([[a, b], [a, b]]), None).tolist() == [True, False]
    follow.end()
    assert [texts.text for texts in streams] == ["a", "ab"]
    assert heard == ["a", "ab"]
