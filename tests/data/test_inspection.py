import torch

from hfllm.data.inspection import describe_row, shorten


def test_a_row_is_described_document_by_document():
    """A row of ten tokens: the end of one document, a whole one, and the beginning of a third."""
    batch = {
        "input_ids": torch.tensor([[11, 12, 1, 0, 13, 14, 1, 0, 15, 16]]),
        "position_ids": torch.tensor([[7, 8, 9, 0, 1, 2, 3, 0, 1, 2]]),
        "shift_labels": torch.tensor([[12, 1, -100, 13, 14, 1, -100, 15, 16, 17]]),
    }
    words = {0: "<s>", 1: "</s>", **{index: chr(ord("a") + index - 11) for index in range(11, 20)}}
    told = describe_row(batch, 0, lambda ids: "".join(words[token] for token in ids))
    assert told.splitlines() == [
        "  tokens 0 to 2, positions 7 to 9, 2 targets: 'ab</s>'",
        "    the first target is 'b', the last '</s>'",
        "  tokens 3 to 6, positions 0 to 3, 3 targets: '<s>cd</s>'",
        "    the first target is 'c', the last '</s>'",
        "  tokens 7 to 9, positions 0 to 2, 3 targets: '<s>ef'",
        "    the first target is 'e', the last 'g'",
    ]


def test_long_text_is_shortened_in_the_middle():
    assert shorten("abc") == "abc"
    assert shorten("a" * 100 + "b" * 100, 25) == "a" * 10 + " ... " + "b" * 10
