"""Sizes from a depth or a budget, with every number counted by hand."""

import dataclasses

import pytest

from hfllm.training.sizing import (
    MOST_PASSES,
    SIZED,
    Budget,
    Speed,
    Task,
    multiplying_parameters,
    size_run,
    steps_in_time,
    tokens_per_step,
    tokens_worth,
)


TASK = Task(vocab_size=4096, block_size=256, text_tokens=100_000_000)


def values(sizes) -> dict:
    return {name: choice.value for name, choice in sizes.items()}


def given(**options) -> Task:
    return dataclasses.replace(TASK, given=options)


def test_a_depth_gives_the_shape_of_small_models_everybody_knows():
    """6 layers of 384 are nanoGPT's small one, 12 of 768 GPT-2."""
    for depth, width in ((1, 64), (2, 128), (6, 384), (12, 768)):
        sizes = values(size_run(TASK, depth=depth))
        assert sizes["num_hidden_layers"] == sizes["num_attention_heads"] == depth
        assert sizes["hidden_size"] == width
        assert set(sizes) == set(SIZED)


def test_the_weights_that_multiply_are_counted():
    # Of two blocks, 4 * 128^2 of the attention and 8 * 128^2 of the MLP each; and the head.
    assert multiplying_parameters(2, vocab_size=4096) == 2 * 12 * 128 * 128 + 4096 * 128 == 917_504


def test_a_depth_alone_trains_for_as_many_tokens_as_it_is_worth():
    """A token for each of less than a million parameters; more for larger models, as sqrt(millions), up to twenty."""
    sizes = values(size_run(TASK, depth=2))
    assert sizes["max_steps"] == 917_504 // 1024 == 896
    assert (sizes["per_device_train_batch_size"], sizes["gradient_accumulation_steps"]) == (4, 1)
    assert sizes["eval_steps"] == sizes["save_steps"] == 224
    # 12 * 12 * 768^2 + 4,096 * 768 are 88.08 million, whose root is 9.385; of 686 million it is 26.
    assert tokens_worth(12, TASK) == pytest.approx(9.385 * 88_080_384, rel=1e-4)
    assert tokens_worth(24, TASK) == 20 * (12 * 24 * 1536**2 + 4096 * 1536)


def test_a_short_text_is_not_read_more_often_than_helps():
    short = dataclasses.replace(TASK, text_tokens=10_240)
    sizes = size_run(short, depth=2)
    assert sizes["max_steps"].value == MOST_PASSES * 10_240 // 1024
    assert "4 passes over the text" in sizes["max_steps"].because
    stream = dataclasses.replace(TASK, text_tokens=None)
    assert size_run(stream, depth=2) == size_run(TASK, depth=2)


def test_what_is_given_wins_and_the_rest_follows_from_it():
    task = given(hidden_size=192, learning_rate=0.5, max_steps=100, eval_steps=7, num_train_epochs=3.0)
    sizes = size_run(task, depth=4)
    assert values(sizes) | {"hidden_size": 192, "learning_rate": 0.5, "max_steps": 100} == values(sizes)
    assert values(sizes) | {"eval_steps": 7, "save_steps": 25, "num_attention_heads": 3} == values(sizes)
    assert sizes["max_steps"].because == sizes["hidden_size"].because == "given"
    assert sizes["num_attention_heads"].because != "given"
    assert values(size_run(given(num_train_epochs=0.5), depth=2))["max_steps"] == 50_000_000 // 4096
    with pytest.raises(ValueError, match="give num_attention_heads"):
        size_run(given(hidden_size=100), depth=4)
    assert values(size_run(given(hidden_size=100, num_attention_heads=5), depth=4))["hidden_size"] == 100


@pytest.mark.parametrize(
    ("options", "num_processes", "per_device", "accumulation"),
    [
        ({}, 1, 4, 1),
        ({}, 2, 2, 1),
        ({}, 3, 2, 1),  # six rows, where four cannot be dealt
        ({"per_device_train_batch_size": 1}, 1, 1, 4),
        ({"gradient_accumulation_steps": 2}, 1, 2, 2),
        ({"per_device_train_batch_size": 8}, 1, 8, 1),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}, 2, 8, 2),
    ],
)
def test_the_batch_is_cut_as_the_devices_and_the_options_ask(options, num_processes, per_device, accumulation):
    task = dataclasses.replace(given(**options), num_processes=num_processes)
    sizes = values(size_run(task, depth=2))
    assert (sizes["per_device_train_batch_size"], sizes["gradient_accumulation_steps"]) == (per_device, accumulation)
    step = per_device * accumulation * num_processes * 256
    assert sizes["max_steps"] == 917_504 // step


def test_the_batch_grows_with_the_tokens():
    # 1,024 tokens up to a million; then times 10^0.4 = 2.51 for ten times the tokens, as the nearest power of two.
    expected = {10_000: 1024, 1_000_000: 1024, 10_000_000: 2048, 100_000_000: 8192, 1_000_000_000: 16_384}
    assert {num_tokens: tokens_per_step(num_tokens) for num_tokens in expected} == expected
    # So many rows do not fit into one forward pass of a process.
    sizes = values(size_run(dataclasses.replace(TASK, text_tokens=None), budget=Budget(tokens=20_000_000_000), depth=2))
    assert (sizes["per_device_train_batch_size"], sizes["gradient_accumulation_steps"]) == (64, 4)


def test_a_budget_of_tokens_is_spent_and_no_more():
    sizes = size_run(TASK, depth=3, budget=Budget(tokens=102_400 + 1023))
    assert sizes["max_steps"].value == 100
    assert "max_train_tokens 103,423" in sizes["max_steps"].because


def test_the_deepest_model_is_chosen_that_the_budget_trains_well():
    """And a depth's own tokens choose that depth: the dial turns both ways."""
    for depth in (1, 2, 5, 12):
        task = dataclasses.replace(TASK, text_tokens=10**12)
        assert values(size_run(task, budget=Budget(tokens=tokens_worth(depth, TASK))))["num_hidden_layers"] == depth
    assert values(size_run(TASK, budget=Budget(tokens=2048)))["num_hidden_layers"] == 1
    # Tokens that are read again and again make no larger model worth its size.
    short = dataclasses.replace(TASK, text_tokens=tokens_worth(2, TASK) // MOST_PASSES + 1024)
    sizes = values(size_run(short, budget=Budget(tokens=10**9)))
    assert sizes["num_hidden_layers"] == 2
    assert sizes["max_steps"] == 10**9 // tokens_per_step(10**9)
    assert values(size_run(given(num_hidden_layers=3), budget=Budget(tokens=10**9)))["num_hidden_layers"] == 3


def test_steps_and_evaluations_fill_the_time():
    """Two minutes: five evaluations of 4 s leave 100 s for steps of half a second."""
    speed = Speed(seconds_per_step=0.5, seconds_per_evaluation=4.0)
    assert steps_in_time(speed, 2.0, TASK) == 200
    assert steps_in_time(speed, 2.0, dataclasses.replace(TASK, eval_on_start=False)) == 208
    # One after every 8 steps: 116 s for pieces of 8 * 0.5 + 4 s.
    assert steps_in_time(speed, 2.0, given(eval_steps=8)) == 116
    assert steps_in_time(speed, 0.1, TASK) == 0


@pytest.mark.parametrize("depth", [None, 2])
def test_time_beyond_the_passes_that_help_is_not_spent(depth):
    """Half an hour at a thousandth of a second a step is 1.8 million steps, of a text that 40 steps pass over."""
    short = dataclasses.replace(TASK, text_tokens=40 * 1024)
    measured = []

    def measure(sizes: dict) -> Speed:
        measured.append(sizes["per_device_train_batch_size"])
        return Speed(0.001, 0.0)

    sizes = size_run(short, depth=depth, budget=Budget(minutes=30, measure=measure))
    assert sizes["max_steps"].value == MOST_PASSES * 40
    assert sizes["eval_steps"].value == sizes["save_steps"].value == MOST_PASSES * 10
    assert f"{MOST_PASSES} passes over the text, because more" in sizes["max_steps"].because
    assert "there is time for 45,000. Give more text, or max_steps" in sizes["max_steps"].because
    assert set(measured) == {4}  # the batch is that of the tokens that are read, not of those there is time for
    # Less time than that is spent, and so is a number of tokens that was asked for.
    sizes = size_run(short, depth=depth, budget=Budget(minutes=0.001, measure=measure))
    assert sizes["max_steps"].value == 60
    assert size_run(short, depth=2, budget=Budget(tokens=400 * 1024))["max_steps"].value == 400
    assert (
        size_run(short, depth=2, budget=Budget(tokens=400 * 1024, minutes=30, measure=measure))["max_steps"].value
        == 400
    )


def test_a_budget_of_less_than_a_step_is_an_error_but_no_obstacle_to_a_smaller_model():
    def measure(sizes: dict) -> Speed:
        return Speed(0.5, 0.1 if sizes["num_hidden_layers"] == 1 else 1000.0)

    assert values(size_run(TASK, budget=Budget(minutes=1, measure=measure)))["max_steps"] == 119
    with pytest.raises(ValueError, match=r"1 minutes at 0\.500 s each and 1000\.0 s an evaluation.* too small"):
        size_run(TASK, depth=2, budget=Budget(minutes=1, measure=measure))


def test_a_budget_of_time_is_spent_at_the_measured_speed():
    measured = []

    def measure(sizes: dict) -> Speed:
        """A machine that takes a nanosecond for each parameter and token."""
        measured.append(sizes)
        step = sizes["per_device_train_batch_size"] * 256
        return Speed(1e-9 * step * multiplying_parameters(sizes["num_hidden_layers"], vocab_size=4096), 0.0)

    sizes = values(size_run(TASK, depth=2, budget=Budget(minutes=1, measure=measure)))
    assert sizes["max_steps"] == int(60 / (1e-9 * 1024 * 917_504))
    assert {name for options in measured for name in options} < set(SIZED)
    assert measured[0]["hidden_size"] == 128 and measured[0]["learning_rate"] == sizes["learning_rate"]
    # How long each depth takes for its own tokens is known, then: ten minutes are enough for the one, not for the next.
    depth = values(size_run(TASK, budget=Budget(minutes=10, measure=measure)))["num_hidden_layers"]
    taken = [
        1e-9 * tokens_worth(each, TASK) * multiplying_parameters(each, vocab_size=4096) for each in (depth, depth + 1)
    ]
    assert taken[0] < 600 < taken[1]
    both = size_run(TASK, depth=2, budget=Budget(tokens=10_240, minutes=1, measure=measure))
    assert both["max_steps"].value == 10
    # Steps that are given are not measured.
    num_measured = len(measured)
    size_run(given(max_steps=5), depth=2, budget=Budget(minutes=1, measure=measure))
    assert len(measured) == num_measured
