"""Instruction tuning: number of epochs and evaluations, and a description of what was learned."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..data.conversations import Conversation
from ..evaluation.replies import Reply, last_response
from ..runs.log import format_sample


FEWEST_EPOCHS, MOST_EPOCHS = 2, 20
FEWEST_STEPS = 150  # optimizer steps; smaller data is repeated to reach them
MOST_STEPS_BETWEEN_EVALUATIONS = 100
NUM_EVALUATIONS = 10  # of a short run
SMALLEST_FALL = 0.01  # relative fall of the test loss that counts as learning
LONGEST_TEXT = 200  # characters of a reply that is shown


def choose_num_epochs(num_rows: int, *, rows_per_step: int) -> int:
    """Passes over the rows, from their number: more for small data, so that the model takes enough optimizer steps."""
    steps_per_epoch = math.ceil(num_rows / rows_per_step)
    return min(MOST_EPOCHS, max(FEWEST_EPOCHS, math.ceil(FEWEST_STEPS / steps_per_epoch)))


def choose_eval_steps(num_steps: int) -> int:
    """Steps between two evaluations: ten evaluations in a short run, one every 100 steps in a long one."""
    return min(MOST_STEPS_BETWEEN_EVALUATIONS, max(1, math.ceil(num_steps / NUM_EVALUATIONS)))


def describe_learning(metrics: Mapping[str, Any], samples: Sequence[Conversation], replies: Sequence[Reply]) -> str:
    """Whether anything was learned, in words: by the test loss, the samples' replies, and exact match if counted.

    `metrics` has `test_loss_before` and `test_loss`; `replies` are those to the samples after training.
    """
    before, after = metrics["test_loss_before"], metrics["test_loss"]
    change = f"from {before:.4f} to {after:.4f} nats per response token"
    advice = (
        "Train longer (num_train_epochs), with another learning_rate, on more conversations, or start from a model "
        "that was pretrained on more text."
    )
    if not after < before * (1 - SMALLEST_FALL):
        verb = "rose" if after > before else "hardly fell"
        return f"Nothing was learned that helps with new questions: the test loss {verb}, {change}. {advice}"
    expected = {expected_response(sample) for sample in samples}
    if len(expected) > 1 and len({reply.text for reply in replies}) == 1:
        return (
            f"The test loss fell {change}, but the model does not answer yet: it gives the same reply to all "
            f"{len(samples)} samples. {advice}"
        )
    if metrics.get("test_exact_match") == 0:
        return (
            f"The test loss fell {change}, but none of {metrics['test_answers']:,} replies is exactly the expected one."
        )
    text = f"The model learned: the test loss fell {change}."
    right = [sample for sample, reply in zip(samples, replies) if reply.text == expected_response(sample)]
    if right:
        question = right[0].messages[last_response(right[0]) - 1]["content"]
        text += f" A test question that it answers correctly:\n    {shorten(question)}"
    return text


def describe_samples(samples: Sequence[Conversation], before: Sequence[Reply], after: Sequence[Reply]) -> str:
    """Each sample's question, expected response, and replies before and after training, one per line."""
    parts = []
    for sample, old, new in zip(samples, before, after, strict=True):
        question = sample.messages[last_response(sample) - 1]["content"]
        replies = (
            f"expected: {shorten(expected_response(sample))}\n"
            f"before:   {shorten(old.text)}\n"
            f"after:    {shorten(new.text)}"
        )
        parts.append(format_sample(question, replies))
    return "\n".join(parts)


def expected_response(sample: Conversation) -> str:
    return sample.messages[last_response(sample)]["content"].strip()


def shorten(text: str) -> str:
    """The text in one line, with \\n for a line's end, and cut after LONGEST_TEXT characters."""
    line = text.replace("\n", "\\n")
    return line if len(line) <= LONGEST_TEXT else f"{line[:LONGEST_TEXT]} ..."
