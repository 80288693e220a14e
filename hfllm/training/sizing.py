"""Sizes of a model and of its training run, from its depth or from a budget of tokens or time.

The rules were fitted to small models of the modern preset with Muon, trained for minutes on a CPU; the table is in
docs/measurements/log.md, "Sizing rules". Fixed: a width of 64 for each block (6 x 384, 12 x 768: shapes that are known
to train well), heads of 64 channels, and a linear decay to zero. Measured, with up to 2.9 million tokens: the number of
tokens from which depth 2 beats depth 1 at equal compute, the two learning rates at two widths, and the batch. Beyond
that, the rules are extrapolated towards published results of large models.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from accelerate.utils import gather_object


DIALS = ("depth", "max_train_tokens", "max_train_minutes")
SIZED: tuple[str, ...] = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads"),
    *("learning_rate", "adam_learning_rate", "lr_scheduler_type", "min_lr_ratio"),
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_steps", "eval_steps", "save_steps"),
)

HEAD_DIM = 64  # channels of a head; each block also adds this many to the width
# Tokens per parameter: 1 up to a million parameters, where depths 1 and 2 were equally good at equal cost. Above, the
# square root of the millions of parameters, which agrees with what is known about large models: 10 at a hundred
# million, and 20, the maximum, from 400 million (Hoffmann et al. 2022, arXiv 2203.15556).
MOST_TOKENS_PER_PARAMETER = 20.0
# Passes over the text. With Muon and no dropout, depths 1 and 2 were best at four passes over 80 and 300 kB of prose,
# of 1 to 16 tried, each with its own decay to zero. With large models, more passes gain little as well
# (Muennighoff et al. 2023, arXiv 2305.16264).
MOST_PASSES = 4
BATCH_TOKENS, BATCH_FROM = 1024, 1_000_000
BATCH_EXPONENT = 0.4  # of the tokens, with which the best batch grows (Bergsma et al. 2025, arXiv 2505.13738)
LEARNING_RATE, ADAM_LEARNING_RATE = 0.02, 0.02
TOKENS_PER_FORWARD_PASS = 16_384  # so that activations and logits fit; the rest of a step is accumulated
NUM_EVALUATIONS = 4  # besides the one before the first step; each is followed by a checkpoint


class Choice(NamedTuple):
    """An option's value, and the reason for it."""

    value: Any
    because: str


class Speed(NamedTuple):
    """The measured seconds of an optimizer step and of an evaluation."""

    seconds_per_step: float
    seconds_per_evaluation: float


def slowest(speed: Speed) -> Speed:
    """The speed of the slowest process, the same on all processes, which must agree on the number of steps."""
    return Speed(*map(max, zip(*gather_object([tuple(speed)]), strict=True)))


@dataclass(frozen=True)
class Task:
    """The conditions of a run: vocabulary, tokens of a row and of one pass over the text, and given options.

    Attributes:
        text_tokens: None for a stream, whose length is unknown.
        given: Options of SIZED, which take precedence, and perhaps `num_train_epochs`.
    """

    vocab_size: int
    block_size: int
    text_tokens: int | None
    num_processes: int = 1
    eval_on_start: bool = True
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Budget:
    """The most tokens, or minutes of training and evaluating, that a run may take.

    `measure` takes the options of a run and returns its speed on this machine; only a budget of time needs it.
    """

    tokens: int | None = None
    minutes: float | None = None
    measure: Callable[[dict[str, Any]], Speed] | None = None


def multiplying_parameters(depth: int, *, vocab_size: int, hidden_size: int | None = None) -> int:
    """The weights used in a matrix product for each token: about 12 * width^2 in each block, and the head."""
    width = hidden_size or HEAD_DIM * depth
    return 12 * depth * width**2 + vocab_size * width


def tokens_per_parameter(num_parameters: int) -> float:
    return min(MOST_TOKENS_PER_PARAMETER, max(1.0, math.sqrt(num_parameters / 1e6)))


def tokens_worth(depth: int, task: Task) -> int:
    """The tokens that a model of this depth is trained on; with fewer, a smaller model is better."""
    width = task.given.get("hidden_size")
    num_parameters = multiplying_parameters(depth, vocab_size=task.vocab_size, hidden_size=width)
    return round(tokens_per_parameter(num_parameters) * num_parameters)


def tokens_per_step(num_tokens: float) -> int:
    """Tokens per step of a run over `num_tokens`: a power of two near BATCH_TOKENS, growing beyond BATCH_FROM."""
    grown = BATCH_TOKENS * max(1.0, num_tokens / BATCH_FROM) ** BATCH_EXPONENT
    return 2 ** round(math.log2(grown))


def steps_in_time(speed: Speed, minutes: float, task: Task) -> int:
    """The steps that fit into the time with their evaluations: NUM_EVALUATIONS, or one after every `eval_steps`."""
    seconds_each, num_evaluations = speed.seconds_per_step, int(task.eval_on_start)
    if "eval_steps" in task.given:
        seconds_each += speed.seconds_per_evaluation / task.given["eval_steps"]
    else:
        num_evaluations += NUM_EVALUATIONS
    seconds = 60 * minutes - num_evaluations * speed.seconds_per_evaluation
    return max(0, math.floor(seconds / seconds_each))


def size_run(task: Task, *, depth: int | None = None, budget: Budget | None = None) -> dict[str, Choice]:
    """A choice for every option of SIZED, from a depth, a budget or both.

    Without a budget, the model gets the tokens that suit its depth. Then, and with a budget of time, it makes at most
    MOST_PASSES over the text; a given number of tokens is always used. Without a depth, the model is the deepest one
    for which the budget has enough tokens.

    Raises:
        ValueError: the budget is too small for a step, or the width cannot be split into heads.
    """
    budget = budget or Budget()
    depth = depth or task.given.get("num_hidden_layers")
    if depth is None:
        sizes = _deepest(task, budget)
    else:
        sizes = _size(depth, task, budget, because="the depth")
    if (num_steps := sizes["max_steps"]).value < 1:
        raise ValueError(
            f"The budget ({num_steps.because}) is too small for one step, of {tokens_of_a_step(sizes, task):,} "
            "tokens. Give a larger one, a shorter block_size, or less text to evaluate on."
        )
    return sizes


def _deepest(task: Task, budget: Budget) -> dict[str, Choice]:
    best = _size(1, task, budget, because="the smallest: the budget is small")
    for depth in itertools.count(2):
        words = f"the deepest for which the budget has enough tokens, {tokens_worth(depth, task):,}"
        sizes = _size(depth, task, budget, because=words)
        num_tokens = (sizes["max_steps"].value + 1) * tokens_of_a_step(sizes, task)  # steps are whole, budgets are not
        if task.text_tokens is not None:
            num_tokens = min(num_tokens, MOST_PASSES * task.text_tokens)
        if num_tokens < tokens_worth(depth, task):
            return best
        best = sizes
    raise AssertionError("unreachable: deeper models need more and more tokens")


def _size(depth: int, task: Task, budget: Budget, *, because: str) -> dict[str, Choice]:
    """Every choice for a model of this depth."""
    model = _shape(depth, task, because=because) | _course()
    num_tokens, why = _tokens_without_time(depth, task, budget)
    batch = _batch(num_tokens, task)
    if budget.minutes is not None and "max_steps" not in task.given:
        assert budget.measure is not None
        for _ in range(2):  # the batch depends on the number of tokens in the time, which depends on the batch's speed
            speed = budget.measure({name: choice.value for name, choice in _with_given(model | batch, task).items()})
            in_time = steps_in_time(speed, budget.minutes, task) * tokens_of_a_step(batch, task)
            if in_time < num_tokens or budget.tokens is None:
                num_tokens = in_time
                why = f"{budget.minutes:g} minutes at {speed.seconds_per_step:.3f} s each"
                why += f" and {speed.seconds_per_evaluation:.1f} s an evaluation, both measured"
                if task.text_tokens is not None and in_time > MOST_PASSES * task.text_tokens:
                    num_tokens = MOST_PASSES * task.text_tokens
                    why = f"{MOST_PASSES} passes over the text, because more would memorize it; there is time for "
                    why += f"{in_time / task.text_tokens:,.0f}. Give more text, or max_steps"
            if batch == (batch := _batch(num_tokens, task)):
                break
    fewest = 1 if budget.tokens is None and budget.minutes is None else 0
    num_steps = task.given.get("max_steps", max(fewest, num_tokens // tokens_of_a_step(batch, task)))
    quarter = Choice(max(1, math.ceil(num_steps / NUM_EVALUATIONS)), f"max_steps / {NUM_EVALUATIONS}")
    steps = {"max_steps": Choice(num_steps, why), "eval_steps": quarter, "save_steps": quarter}
    return _with_given(model | batch | steps, task)


def _shape(depth: int, task: Task, *, because: str) -> dict[str, Choice]:
    width = task.given.get("hidden_size", HEAD_DIM * depth)
    if "num_attention_heads" not in task.given and width % HEAD_DIM:
        raise ValueError(
            f"hidden_size {width} is not a multiple of {HEAD_DIM}, the channels of a head: give num_attention_heads."
        )
    return {
        "num_hidden_layers": Choice(depth, because),
        "hidden_size": Choice(width, f"{HEAD_DIM} for each block"),
        "num_attention_heads": Choice(width // HEAD_DIM, f"of {HEAD_DIM} channels each"),
    }


def _course() -> dict[str, Choice]:
    return {
        "learning_rate": Choice(LEARNING_RATE, "of the hidden matrices, at any depth"),
        "adam_learning_rate": Choice(ADAM_LEARNING_RATE, "of embeddings and norms, at any depth"),
        "lr_scheduler_type": Choice("linear", "the best schedule for a short run"),
        "min_lr_ratio": Choice(0.0, "down to zero at the last step"),
    }


def _tokens_without_time(depth: int, task: Task, budget: Budget) -> tuple[int, str]:
    """The tokens that a model of this depth gets if time does not matter, and why."""
    if budget.tokens is not None:
        return budget.tokens, f"max_train_tokens {budget.tokens:,}"
    if (epochs := task.given.get("num_train_epochs")) is not None and task.text_tokens is not None:
        return math.ceil(epochs * task.text_tokens), f"num_train_epochs {epochs:g}"
    worth = tokens_worth(depth, task)
    if task.text_tokens is not None and worth > MOST_PASSES * task.text_tokens:
        return MOST_PASSES * task.text_tokens, f"{MOST_PASSES} passes over the text, which is short for this depth"
    return worth, f"{worth:,} tokens, which suit this depth"


def _batch(num_tokens: int, task: Task) -> dict[str, Choice]:
    """Rows per forward pass, and forward passes per step: `tokens_per_step`, as near as the devices allow."""
    rows = max(1, round(tokens_per_step(num_tokens) / task.block_size))  # of all processes
    rows_each = math.ceil(rows / task.num_processes)
    most = task.given.get("per_device_train_batch_size", max(1, TOKENS_PER_FORWARD_PASS // task.block_size))
    accumulation = task.given.get("gradient_accumulation_steps", math.ceil(rows_each / most))
    per_device = task.given.get("per_device_train_batch_size", math.ceil(rows_each / accumulation))
    total = per_device * accumulation * task.num_processes * task.block_size
    return {
        "per_device_train_batch_size": Choice(per_device, f"{total:,} tokens a step, for {num_tokens:,} in all"),
        "gradient_accumulation_steps": Choice(accumulation, f"at most {TOKENS_PER_FORWARD_PASS:,} tokens at a time"),
    }


def _with_given(sizes: dict[str, Choice], task: Task) -> dict[str, Choice]:
    return {name: Choice(task.given[name], "given") if name in task.given else choice for name, choice in sizes.items()}


def tokens_of_a_step(sizes: Mapping[str, Choice], task: Task) -> int:
    """Rows per device x accumulation x processes x tokens of a row."""
    rows = sizes["per_device_train_batch_size"].value * sizes["gradient_accumulation_steps"].value
    return rows * task.num_processes * task.block_size


def describe_sizes(sizes: Mapping[str, Choice], *, dials: Mapping[str, Any]) -> str:
    """What was chosen and why, one line per option."""
    asked = " ".join(f"{name} {value}" for name, value in dials.items() if value is not None)
    lines = [f"  {name:28s} {choice.value!s:>8s}  {choice.because}" for name, choice in sizes.items()]
    return "\n".join([f"Sized by {asked}; each of these can also be given as an option:", *lines])


def choose_sizes(
    options: Mapping[str, Any],
    *,
    vocab_size: int,
    text_tokens: int | None,
    num_processes: int,
    measure: Callable[[dict[str, Any]], Speed],
) -> tuple[dict[str, Any], str]:
    """A value for every option of SIZED, and a description of the reasons; `options` are those of recipes/pretrain.py.

    A resumed run keeps the sizes it began with; otherwise they follow from the dials. `measure` goes to `Budget`, the
    other arguments to `Task`.

    Raises:
        ValueError: as in `sizes_of_run` and `size_run`.
    """
    dials = {name: options[name] for name in DIALS}
    given = {name: options[name] for name in (*SIZED, "num_train_epochs") if options[name] is not None}
    rest = {name: options[name] for name in ("block_size", "eval_on_start")}
    task = Task(vocab_size=vocab_size, text_tokens=text_tokens, num_processes=num_processes, given=given, **rest)
    sizes = None if options["overwrite_output_dir"] else sizes_of_run(options["output_dir"], task, dials=dials)
    if sizes is None:
        budget = Budget(tokens=dials["max_train_tokens"], minutes=dials["max_train_minutes"], measure=measure)
        sizes = size_run(task, depth=dials["depth"], budget=budget)
    return {name: choice.value for name, choice in sizes.items()}, describe_sizes(sizes, dials=dials)


def sizes_of_run(output_dir: str | Path, task: Task, *, dials: Mapping[str, Any]) -> dict[str, Choice] | None:
    """The sizes with which the run in this folder began, to resume it; None if there is no run.

    Raises:
        ValueError: it was sized by other dials.
    """
    path = Path(output_dir) / "arguments.yaml"
    if not path.exists():
        return None
    arguments = yaml.safe_load(path.read_text(encoding="utf-8"))
    differences = [
        f"{name}: {arguments.get(name)} there, {value} here"
        for name, value in dials.items()
        if arguments.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"{output_dir} holds a run of another size ({'; '.join(differences)}). To train that run for longer, start "
            f"it with its own options and a max_steps above {arguments['max_steps']:,}. For a run of this size, choose "
            "another output_dir, or start again with overwrite_output_dir."
        )
    return _with_given({name: Choice(arguments[name], f"as the run in {output_dir} has it") for name in SIZED}, task)


def check_dials(options: Mapping[str, Any]) -> None:
    """Reject runs that the dials cannot size, and options that contradict them.

    Raises:
        ValueError: says what to give instead.
    """
    dial = " ".join(f"`{name}`" for name in DIALS if options[name] is not None)
    minutes, epochs = options["max_train_minutes"], options["num_train_epochs"]
    if options["model"] is not None:
        raise ValueError(f"{dial} is for random weights, and `model` has its own size. Give max_steps instead.")
    if options["preset"] != "modern" or options["optimizer"] != "muon":
        raise ValueError(
            f"{dial} follows rules that were measured with preset=modern and optimizer=muon. Leave it out, and give "
            "sizes, rates and steps one by one."
        )
    if options["depth"] is not None and options["num_hidden_layers"] not in (None, options["depth"]):
        raise ValueError(
            f"depth={options['depth']} and num_hidden_layers={options['num_hidden_layers']} contradict each other: "
            "give one of them."
        )
    if epochs is not None and (options["max_train_tokens"] is not None or minutes is not None):
        raise ValueError(
            "num_train_epochs and a budget (max_train_tokens, max_train_minutes) both say how long to train: give one."
        )
    if options["streaming"] and (minutes is not None or epochs is not None):
        raise ValueError(
            "A stream is read once, so no step can be tried and no pass counted: with `streaming` give `depth` or "
            "max_train_tokens."
        )
