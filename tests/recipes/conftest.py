"""Recipes run in this process, as `python recipes/x.py ...` would run them, on texts small enough for seconds."""

import functools
import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState, GradientState

from hfllm.cli.arguments import parse_arguments
from hfllm.tokenization import train_bpe


RECIPES = Path(__file__).parents[2] / "recipes"


def load_recipe(name: str):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def arguments_of(recipe: str) -> type:
    """The class of a recipe's arguments."""
    own = vars(load_recipe(recipe)).values()
    [found] = [
        each
        for each in own
        if isinstance(each, type) and each.__module__ == f"recipe_{recipe}" and each.__name__.endswith("Arguments")
    ]
    return found


@pytest.fixture
def run_pretrain() -> Callable:
    """Run recipes/pretrain.py on command-line options; returns what it wrote into metrics.json.

    Drawing the curves takes as long as all the rest of such a small run, so they are drawn only where a test asks.
    """
    recipe = load_recipe("pretrain")
    plot_curves = recipe.plot_curves

    def run(*, draw: bool = False, **options) -> dict:
        recipe.plot_curves = plot_curves if draw else lambda *args, **kwargs: None
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        argv = [f"--{name}={value}" for name, value in options.items() if not isinstance(value, list)]
        for name, values in options.items():
            argv += [f"--{name}", *map(str, values)] if isinstance(values, list) else []
        recipe.main(parse_arguments(recipe.PretrainArguments, argv))
        metrics = Path(options["output_dir"]) / "metrics.json"
        return json.loads(metrics.read_text()) if metrics.exists() else {}  # a dry run writes none

    run.recipe = recipe
    return run


def make_sentences(num: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    subjects, verbs = ["the cat", "a dog", "my bird", "one fish"], ["sees", "likes", "hears", "follows"]
    return [
        ". ".join(
            f"{draw.choice(subjects)} {draw.choice(verbs)} {draw.choice(subjects)}" for _ in range(draw.randint(1, 9))
        )
        for _ in range(num)
    ]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A hundred short documents of different lengths."""
    path = tmp_path_factory.mktemp("text") / "animals.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in make_sentences(100)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    train_bpe(make_sentences(100), 300).save_pretrained(path)
    return path


@pytest.fixture
def small(text_file, tokenizer_folder, tmp_path) -> dict:
    """Options of a run that takes about a second."""
    return {
        "dataset": text_file,
        "tokenizer": tokenizer_folder,
        "output_dir": tmp_path / "out",
        "cache_dir": tmp_path / "cache",
        "validation_fraction": 0.2,
        "block_size": 32,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "per_device_train_batch_size": 4,
        "max_steps": 12,
        "warmup_steps": 2,
        "logging_steps": 1,
        "eval_steps": 6,
        "save_steps": 6,
        "sample_tokens": 0,
    }
