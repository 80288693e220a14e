"""Description of a packed row for people: its documents, their targets, and where each ends."""

from collections.abc import Callable, Mapping

import torch


def describe_row(batch: Mapping[str, torch.Tensor], index: int, decode: Callable[[list[int]], str]) -> str:
    """Row `index` of a batch of `Rows`, one line per document: its places in the row, its targets, and its text.

    `decode` turns token ids into text, special tokens included, so that the documents' start and end tokens show.
    """
    input_ids, position_ids, shift_labels = (
        batch[name][index].tolist() for name in ("input_ids", "position_ids", "shift_labels")
    )
    starts = [place for place, position in enumerate(position_ids) if place == 0 or position == 0]
    lines = []
    for start, end in zip(starts, [*starts[1:], len(input_ids)], strict=True):
        targets = [label for label in shift_labels[start:end] if label != -100]
        lines.append(
            f"  tokens {start:,} to {end - 1:,}, positions {position_ids[start]:,} to {position_ids[end - 1]:,}, "
            f"{len(targets):,} targets: {shorten(decode(input_ids[start:end]))!r}"
        )
        if targets:
            lines.append(f"    the first target is {decode(targets[:1])!r}, the last {decode(targets[-1:])!r}")
    return "\n".join(lines)


def shorten(text: str, num_characters: int = 90) -> str:
    """The text's beginning and end, if it is longer than `num_characters`."""
    half = (num_characters - 5) // 2
    return text if len(text) <= num_characters else f"{text[:half]} ... {text[-half:]}"
