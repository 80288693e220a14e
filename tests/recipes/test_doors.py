"""Errors at the start of every recipe: numbers out of range, folders without a model, and other recipes' folders."""

import dataclasses
import errno
import json

import pytest
import torch
import yaml
from transformers import TrainerState

from hfllm.cli.arguments import parse_arguments
from hfllm.cli.options import check_numbers
from hfllm.model import GPTForCausalLM, GPTForSequenceClassification
from tests.conftest import make_tiny_config
from tests.recipes.conftest import RECIPES, arguments_of, load_recipe


ARGUMENTS = {name: arguments_of(name) for name in sorted(path.stem for path in RECIPES.glob("*.py"))}
REQUIRED = {"export": {"to": "qwen3"}, "push_to_hub": {"model": "x", "repo_id": "me/x"}, "report": {"runs": ["x"]}}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_defaults_of_a_recipe_are_in_range_and_no_number_of_it_may_be_nan(name):
    arguments = ARGUMENTS[name](**REQUIRED.get(name, {}))
    check_numbers(arguments)
    for field in dataclasses.fields(arguments):
        if "float" in str(field.type):
            with pytest.raises(ValueError, match=f"--{field.name} nan: give a finite number"):
                check_numbers(dataclasses.replace(arguments, **{field.name: float("nan")}))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"per_device_train_batch_size": 0}, "--per_device_train_batch_size 0: give at least 1"),
        ({"save_total_limit": 0}, "--save_total_limit 0: give at least 1"),
        ({"learning_rate": -1.0}, "--learning_rate -1.0: give a number from 0 to 10"),
        ({"num_train_epochs": 0.0}, "--num_train_epochs 0.0: give more than 0"),
        ({"adam_beta1": 1.0}, "--adam_beta1 1.0: give at least 0 and less than 1"),
        ({"seed": 2**32}, "--seed 4294967296: give a number from 0 to 4,294,967,295"),
        ({"weight_decay": float("inf")}, "--weight_decay inf: give a finite number"),
    ],
)
def test_a_number_out_of_its_range_is_named_with_what_would_do(option, message):
    with pytest.raises(ValueError, match=message):
        check_numbers(ARGUMENTS["pretrain"](**option))


def call(recipe: str, *argv: object) -> None:
    module = load_recipe(recipe)
    module.main(parse_arguments(ARGUMENTS[recipe], list(map(str, argv))))


@pytest.fixture
def folders(tokenizer_folder, tmp_path):
    """A causal model, a classifier of it, and their tokenizer."""
    from hfllm.tokenization import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    config = make_tiny_config("modern", vocab_size=len(tokenizer))
    for name, model in (("causal", GPTForCausalLM(config)), ("classifier", GPTForSequenceClassification(config))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


WRITERS = {
    "generate": [],
    "chat": [],
    "inspect_model": [],
    "finetune_instruction": ["--dataset", "alpaca.json"],
    "pretrain": ["--dataset", "texts.txt", "--block_size", 32, "--max_steps", 1],
}


@pytest.mark.parametrize("recipe", WRITERS)
def test_a_classifier_is_not_taken_for_a_model_that_writes(recipe, folders, monkeypatch):
    monkeypatch.chdir(folders)
    (folders / "alpaca.json").write_text(json.dumps([{"instruction": f"{n}", "output": f"{n}"} for n in range(40)]))
    (folders / "texts.txt").write_text("the cat sees a dog. " * 200)
    with pytest.raises(ValueError, match="model=classifier is a GPTForSequenceClassification, which was trained to"):
        call(recipe, "--model", "classifier", *WRITERS[recipe])


@pytest.mark.parametrize("recipe", ["finetune_classification", "finetune_instruction", "generate", "evaluate_model"])
def test_a_folder_without_a_model_says_what_it_holds(recipe, folders, tokenizer_folder):
    options = [] if recipe == "generate" else ["--dataset", "nothing.csv", "--output_dir", folders / "out"]
    with pytest.raises(ValueError, match=r"without a config.json, so there is no model in it yet; it holds \["):
        call(recipe, "--model", tokenizer_folder, *options)


@pytest.mark.parametrize("recipe", ["pretrain", "finetune_classification", "finetune_instruction"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_recipe_neither_resumes_nor_deletes_another_recipes_run(recipe, overwrite, tmp_path):
    (tmp_path / "arguments.yaml").write_text(yaml.safe_dump({"dataset": "stdlib", "vocab_size": 300, "max_bytes": 9}))
    with pytest.raises(ValueError, match=r"belongs to another recipe, whose options \(max_bytes, vocab_size\) are in"):
        call(recipe, "--output_dir", tmp_path, *["--overwrite_output_dir"] * overwrite)
    (tmp_path / "arguments.yaml").write_text(": : :")
    with pytest.raises(ValueError, match=r"arguments.yaml cannot be read, so nothing says whose run this is"):
        call(recipe, "--output_dir", tmp_path, *["--overwrite_output_dir"] * overwrite)


@pytest.mark.parametrize("recipe", ["pretrain", "finetune_instruction", "finetune_classification"])
@pytest.mark.parametrize(
    ("tracker", "message"),
    [
        ("tensorbord", "report_to[= ]tensorbord: (it is one of|choose from) .*tensorboard"),
        ("swanlab", "its package is not installed"),
    ],
)
def test_a_missing_tracker_is_refused_and_not_left_out(recipe, tracker, message, folders, monkeypatch):
    monkeypatch.chdir(folders)
    rows = [{"instruction": f"{n}", "output": f"{n}", "text": f"cat {n}", "label": n % 2} for n in range(40)]
    (folders / "rows.json").write_text(json.dumps(rows))
    monkeypatch.setattr("hfllm.fine_tuning.run.get_available_reporting_integrations", lambda: ["tensorboard"])
    monkeypatch.setattr("hfllm.training.devices.get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(ValueError, match=message):
        call(recipe, "--model", "causal", "--dataset", "rows.json", "--output_dir", "out", "--report_to", tracker)


@pytest.mark.parametrize(
    ("recipe", "argv", "message"),
    [
        ("evaluate_model", ["--limit", 3], "--limit and --include_path are for lm-eval's tasks"),
        ("evaluate_model", ["--max_new_tokens", 5], "--max_new_tokens is the length of a reply: give --check_answers"),
        ("evaluate_model", ["--model", "a", "a"], "--model a a: one of them is given twice"),
        ("evaluate_model", ["--block_size", 0], "--block_size 0: give at least 1"),
        ("benchmark", ["--measure", "time_to_quality", "--bf16", "true"], "--bf16: --measure time_to_quality runs"),
        ("benchmark", ["--measure", "time_to_quality"], "is for a text of about a megabyte: give it as --dataset"),
        ("benchmark", ["--num_steps", 0], "--num_steps 0: give at least 1"),
        ("inspect_model", ["--top_k", 101], "--top_k 101: give a number from 1 to 100"),
        ("train_tokenizer", ["--vocab_size", 200], "vocab_size=200 is too small"),
        ("chat", ["--port", 70000], "--port 70000: give a number from 1 to 65,535"),
        ("chat", ["--temperature", "nan"], "--temperature nan: give a finite number"),
    ],
)
def test_options_that_would_be_ignored_or_fail_later_are_refused_at_the_start(recipe, argv, message, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a text")
    dataset = ["--dataset", text] if recipe == "evaluate_model" else []
    with pytest.raises(ValueError, match=message):
        call(recipe, *dataset, *argv)


def test_a_learning_rate_of_zero_is_not_a_default(folders, tmp_path):
    """`args.learning_rate or default` would train."""
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": f"{n}", "output": f"{n}"} for n in range(60)]))
    call(
        "finetune_instruction",
        *("--model", folders / "causal", "--dataset", tmp_path / "rows.json", "--output_dir", tmp_path / "out"),
        *("--method", "full", "--learning_rate", 0, "--max_steps", 2, "--max_new_tokens", 2, "--num_samples", 1),
    )
    before, after = (GPTForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("causal", "out"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_refused_command_leaves_a_folder_that_the_right_command_can_use(folders, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"cat {n},{n % 2}\n" for n in range(40)))
    options = ["--model", folders / "causal", "--dataset", tmp_path / "rows.csv", "--output_dir", tmp_path / "out"]
    with pytest.raises(ValueError, match="did you mean"):
        call("finetune_classification", *options, "--label_column", "lable")
    call("finetune_classification", *options, "--max_steps", 1)
    assert (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.fault(3, 6)
@pytest.mark.parametrize("recipe", ["finetune_instruction", "finetune_classification"])
def test_a_checkpoint_that_is_not_written_to_its_end_does_not_exist(recipe, folders, tmp_path, monkeypatch):
    """Trainer takes the newest folder for a checkpoint, whatever is in it, and fails on it at every further start."""
    rows = [{"instruction": f"{n}", "output": f"{n}", "text": f"cat {n}", "label": n % 2} for n in range(60)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    options = ["--model", folders / "causal", "--dataset", tmp_path / "rows.json", "--output_dir", tmp_path / "out"]
    options += ["--max_steps", 2, *(["--save_steps", 1, "--num_samples", 1] if "instruction" in recipe else [])]

    def full_disk(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(TrainerState, "save_to_json", full_disk)
        with pytest.raises(OSError, match="No space left"):
            call(recipe, *options)
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []
    call(recipe, *options)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["train_steps"] == 2
