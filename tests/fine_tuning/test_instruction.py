"""The number of epochs and evaluations, and the description of what was learned."""

import pytest

from hfllm.data.conversations import Conversation
from hfllm.evaluation.replies import Reply
from hfllm.fine_tuning.instruction import (
    choose_eval_steps,
    choose_num_epochs,
    describe_learning,
    describe_samples,
)


def question(prompt: str, response: str) -> Conversation:
    return Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": response}], "")


SAMPLES = [question("2 + 2?", "4"), question("3 + 3?", "6")]


@pytest.mark.parametrize(
    "num_rows, rows_per_step, epochs",
    [(24, 8, 20), (80, 8, 15), (600, 8, 2), (200_000, 8, 2), (100, 10, 15), (3, 8, 20)],
)
def test_small_data_is_repeated_until_the_model_has_taken_enough_steps(num_rows, rows_per_step, epochs):
    assert choose_num_epochs(num_rows, rows_per_step=rows_per_step) == epochs


def test_a_short_run_is_evaluated_ten_times_and_a_long_one_every_hundred_steps():
    assert [choose_eval_steps(steps) for steps in (3, 60, 150, 1000, 50_000)] == [1, 6, 15, 100, 100]


def describe(before: float, after: float, replies: tuple[str, str], **metrics) -> str:
    metrics |= {"test_loss_before": before, "test_loss": after}
    return describe_learning(metrics, SAMPLES, [Reply(text, True) for text in replies])


def test_a_model_that_learned_nothing_is_described_so():
    assert "Nothing was learned" in describe(2.0, 2.5, ("4", "6")) and "rose, from 2.0000 to 2.5" in describe(
        2.0, 2.5, "ab"
    )
    assert "the test loss hardly fell" in describe(2.0, 1.999, ("4", "6"))
    said = describe(5.0, 3.0, ("4 4 4", "4 4 4"))
    assert "does not answer yet: it gives the same reply to all 2 samples" in said and "learned:" not in said
    said = describe(5.0, 3.0, ("5", "7"), test_exact_match=0.0, test_answers=40)
    assert "none of 40 replies is exactly the expected one" in said


def test_a_model_that_learned_is_described_so_with_a_question_that_it_answers():
    said = describe(5.0, 3.0, ("5", "6"), test_exact_match=0.5, test_answers=40)
    assert said.startswith("The model learned: the test loss fell from 5.0000 to 3.0000")
    assert said.endswith("answers correctly:\n    3 + 3?")
    assert "correctly" not in describe(5.0, 3.0, ("5", "7"))  # nothing that was not measured


def test_replies_before_and_after_are_shown_in_the_same_short_form():
    long = "to be\nor " * 100
    text = describe_samples(SAMPLES[:1], [Reply(long, False)], [Reply(long, False)])
    _, expected, before, after = text.splitlines()
    assert expected == "expected: 4"
    assert before.removeprefix("before:") == after.removeprefix("after: ") and len(before) < 220
    assert before.startswith("before:   to be\\nor ") and before.endswith(" ...")
