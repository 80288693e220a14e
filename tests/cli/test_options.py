import dataclasses
import inspect
import json
import re
from typing import Literal

import pytest

from hfllm.cli import options
from hfllm.cli.options import (
    Compared,
    Location,
    about_of,
    arguments,
    changeable_of,
    check_numbers,
    differs,
    identity_of,
    inputs_of,
    option,
    values_of,
)
from tests.recipes.conftest import RECIPES, arguments_of


class Pace:
    """optimization"""

    learning_rate: float | None = option(None, help="Rate.", default_is="by optimizer", at_least=0)
    num_epochs: float = option(1.0, help="Passes.", above=0)


class Text:
    """text"""

    dataset: str = option("stdlib", help="Text.", location=Location.READ_OR_NAMED, compared=Compared.BY_CONTENT)
    share: float = option(0.5, help="Share.", at_least=0, below=1)


@arguments
class Recipe(Text, Pace):
    num_epochs = differs(3.0, help="Passes over the books.")
    share: float | None = differs(None, default_is="half")
    colour: Literal["red", "blue"] = option("red", help="Colour.", compared=Compared.NOT)
    sizes: list[int] = option(default_factory=lambda: [1, 2], help="Sizes.", at_least=1, at_most=1000)


def test_a_recipe_has_its_groups_options_in_their_order_then_its_own_and_says_only_what_differs():
    recipe = Recipe()
    assert dataclasses.asdict(recipe) == {
        "dataset": "stdlib",
        "share": None,
        "learning_rate": None,
        "num_epochs": 3.0,
        "colour": "red",
        "sizes": [1, 2],
    }
    abouts = {field.name: about_of(field) for field in dataclasses.fields(Recipe)}
    assert abouts["num_epochs"].help == "Passes over the books." and abouts["num_epochs"].above == 0
    assert [abouts[name].section for name in ("dataset", "num_epochs", "colour")] == [
        *("text", "optimization", "options of this recipe")
    ]
    assert Recipe.num_epochs == 3.0 and Recipe(num_epochs=7.0).num_epochs == 7.0


def test_what_a_recipe_changes_must_be_there_and_what_it_declares_must_not():
    with pytest.raises(AssertionError, match=r"Other changes .*lerning_rate"):

        @arguments
        class Other(Pace):
            lerning_rate = differs(0.1)

    with pytest.raises(AssertionError, match="two declarations of num_epochs"):

        @arguments
        class Another(Pace):
            num_epochs: int = option(1, help="Again.")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"share": 1.0}, "--share 1.0: give at least 0 and less than 1."),
        ({"num_epochs": 0.0}, "--num_epochs 0.0: give more than 0."),
        ({"sizes": [5, 1001]}, "--sizes 1001: give a number from 1 to 1,000."),
        ({"learning_rate": float("nan")}, "--learning_rate nan: give a finite number."),
        ({"share": -1.0, "num_epochs": -2.0}, "--share -1.0: give at least 0 and less than 1. --num_epochs -2.0: give"),
    ],
)
def test_a_number_out_of_range_is_named_with_what_would_do(given, message):
    check_numbers(Recipe())
    with pytest.raises(ValueError, match=re.escape(message)):
        check_numbers(Recipe(**given))


def test_an_option_makes_another_run_unless_its_declaration_says_that_it_does_not():
    recipe = Recipe(share=0.25)
    assert identity_of(recipe) == {
        "dataset": "stdlib",
        "share": 0.25,
        "learning_rate": None,
        "num_epochs": 3.0,
        "sizes": [1, 2],
    }
    assert identity_of(recipe, by_content=True).keys() == identity_of(recipe).keys() - {"dataset"}


def test_the_numbers_that_may_change_when_a_run_is_resumed():
    @arguments
    class Saving(Text, Pace):
        save_steps: int = option(200, help="Steps.", compared=Compared.NOT)
        keep: int | None = option(None, help="Number.", compared=Compared.NOT)
        quiet: bool = option(False, help="Print less.", compared=Compared.NOT)
        output_dir: str = option("out", help="Folder.", compared=Compared.NOT)

    assert changeable_of(Saving()) == {"save_steps": 200}


def test_a_recipe_can_hand_on_a_groups_options_and_name_what_it_reads():
    recipe = Recipe(dataset="my.txt")
    assert values_of(recipe, Pace) == {"learning_rate": None, "num_epochs": 3.0}
    assert inputs_of(recipe) == {"dataset": "my.txt"}


def test_with_an_adapter_its_base_is_read_too(tmp_path):
    @arguments
    class WithModel(options.Model):
        pass

    for name, base in (("second", "first"), ("first", "base")):
        (tmp_path / name).mkdir()
        config = {"base_model_name_or_path": str(tmp_path / base)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    second, first, base = (str(tmp_path / name) for name in ("second", "first", "base"))
    assert inputs_of(WithModel(model=second)) == {"model": second, "the base of model": [first, base]}
    assert inputs_of(WithModel(model=base)) == {"model": base}


# The recipes' own options:


def declarations() -> dict[str, list[str]]:
    """By name of an option, the classes that declare it."""
    classes = [value for value in vars(options).values() if inspect.isclass(value)]
    found: dict[str, list[str]] = {}
    for group in classes:
        for name, value in vars(group).items():
            if isinstance(value, dataclasses.Field):
                found.setdefault(name, []).append(group.__name__)
    for path in RECIPES.glob("*.py"):
        for name in re.findall(r"^    (\w+): [^=\n]+ = option\(", path.read_text(), flags=re.MULTILINE):
            found.setdefault(name, []).append(path.stem)
    return found


def test_no_option_is_declared_in_two_places():
    found = declarations()
    assert len(found) > 120
    assert {name: places for name, places in found.items() if len(places) > 1} == {}
    known = {field.name for path in RECIPES.glob("*.py") for field in dataclasses.fields(arguments_of(path.stem))}
    assert known == found.keys()  # nor anywhere else, and none that no recipe has


def test_a_pretraining_run_is_compared_by_what_it_learns_from_and_by_the_schedule():
    recipe = arguments_of("pretrain")()
    assert identity_of(recipe, by_content=True).keys() == {
        *("block_size", "stride", "seed", "learning_rate", "lr_scheduler_type", "warmup_steps", "decay_steps"),
        *("min_lr_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
        *("skip_spikes", "optimizer", "adam_learning_rate", "muon_momentum", "load_best_model_at_end"),
    }


@pytest.mark.parametrize("name", ["finetune_classification", "finetune_instruction", "finetune_preference"])
def test_a_fine_tuning_run_is_compared_by_all_options_but_these(name):
    recipe = arguments_of(name)()
    free = {
        "config",
        "output_dir",
        "overwrite_output_dir",
        "save_total_limit",
        "report_to",
        "logging_steps",
        "save_steps",
    }
    assert identity_of(recipe).keys() == {field.name for field in dataclasses.fields(recipe)} - free


def test_a_run_that_accelerate_launched_in_bf16_notes_it_and_two_precisions_are_refused(monkeypatch):
    classification = arguments_of("finetune_classification")
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert classification().bf16 is False and classification(bf16=True).bf16 is True
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert classification().bf16 is True
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert classification().bf16 is False
    with pytest.raises(ValueError, match="bf16=True, but accelerate was launched with mixed_precision fp16"):
        classification(bf16=True)
