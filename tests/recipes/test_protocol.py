"""The guarantees of every recipe that writes a folder, tested with each of them."""

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hfllm.cli.arguments import parse_arguments
from hfllm.cli.opening import open_causal_lm
from hfllm.runs.lock import run_lock
from tests.recipes.conftest import load_recipe
from tests.recipes.every_recipe import EVERY, TRAINING, Command, make_commands, weights_of


pytestmark = pytest.mark.slow

ARGUMENTS = {
    "pretrain": "PretrainArguments",
    "finetune_instruction": "InstructionArguments",
    "finetune_classification": "ClassificationArguments",
    "finetune_preference": "PreferenceArguments",
    "train_tokenizer": "TokenizerArguments",
    "export": "ExportArguments",
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, Command]:
    return make_commands(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def start(commands) -> Callable:
    """Run a recipe in this process, with further options."""
    recipes = {command.recipe: load_recipe(command.recipe) for command in commands.values()}

    def run(name: str, output_dir: Path, **others: object) -> None:
        command = commands[name]
        recipe = recipes[command.recipe]
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        recipe.main(parse_arguments(getattr(recipe, ARGUMENTS[command.recipe]), command.argv(output_dir, **others)))

    return run


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a finished run; each recipe runs once."""
    folders: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in folders:
            folder = tmp_path_factory.mktemp("finished") / "out"
            start(name, folder)
            folders[name] = folder
        return folders[name]

    return find


@pytest.fixture
def copy(finished, tmp_path) -> Callable[[str], Path]:
    return lambda name: shutil.copytree(finished(name), tmp_path / "out", symlinks=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.fault(20, 24)
@pytest.mark.parametrize("name", EVERY)
def test_a_finished_run_has_nothing_to_do(start, copy, name, capsys):
    folder = copy(name)
    before = contents(folder)
    start(name, folder)
    assert "nothing to do" in (told := capsys.readouterr().out) or "holds this tokenizer already" in told
    after = contents(folder)
    assert {path for path in before | after if before.get(path) != after.get(path)} <= {"run.json"}


@pytest.mark.fault(3, 4, 23, 24)
@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_a_result_that_is_damaged_is_made_again_with_the_same_weights(start, commands, copy, name, damage):
    folder, result = copy(name), commands[name].result
    expected = result(folder)
    file = folder / ("tokenizer.json" if name == "tokenizer" else "model.safetensors")
    if damage == "missing":
        file.unlink()
    elif name == "tokenizer":  # it may have been changed by hand, which is not to be lost
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(ValueError, match="has changed since it was written"):
            start(name, folder)
        return
    else:
        file.write_bytes(file.read_bytes()[:100])
    start(name, folder)
    found = result(folder)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.fault(3, 4, 25)
@pytest.mark.parametrize("name", TRAINING)
def test_a_result_and_the_newest_checkpoint_may_be_damaged_together(start, copy, name, capsys):
    """By default one more checkpoint is kept."""
    folder = copy(name)
    expected = weights_of(folder)
    (folder / "model.safetensors").unlink()
    newest = max((folder / "checkpoints").glob("*-*"), key=lambda path: int(path.name.split("-")[1]))
    content = bytearray((newest / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "optimizer.safetensors").write_bytes(content)
    capsys.readouterr()
    start(name, folder)
    assert "Resuming from" in capsys.readouterr().out
    assert (folder / "checkpoints" / f"broken-{newest.name}").is_dir()
    found = weights_of(folder)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


@pytest.mark.fault(8, 33)
@pytest.mark.parametrize("name", EVERY)
def test_a_folder_in_use_is_refused(start, tmp_path, name):
    with run_lock(tmp_path / "out"), pytest.raises(RuntimeError, match="Another run is using"):
        start(name, tmp_path / "out")


@pytest.mark.fault(30)
@pytest.mark.parametrize("name", EVERY)
def test_the_lock_of_a_dead_run_on_another_host_is_taken_over(start, copy, name):
    folder = copy(name)
    holder = {"pid": 1, "host": "another-host", "recipe": name, "since": "2099-01-01 00:00:00", "machine": "another"}
    (folder / ".lock").write_text("")
    (folder / ".lock.json").write_text(json.dumps(holder))
    start(name, folder)
    assert not (folder / ".lock").exists() and not (folder / ".lock.json").exists()


MISTAKES = {
    "dataset": [*TRAINING, "tokenizer"],
    "model": ["instruction lora", "classification", "preference", "export"],
    "tokenizer": ["pretrain", "export"],
    "label_column": ["classification"],
    "chat_template": ["instruction lora"],
}


@pytest.mark.fault(32)
@pytest.mark.parametrize(("option", "name"), [(option, name) for option, names in MISTAKES.items() for name in names])
def test_a_mistake_elsewhere_in_the_command_leaves_what_was_to_be_overwritten(start, copy, option, name):
    folder = copy(name)
    before = contents(folder)
    with pytest.raises((ValueError, OSError)):
        start(name, folder, overwrite_output_dir=True, **{option: "./nowhere/at_all"})
    assert contents(folder) == before


@pytest.mark.fault(32)
@pytest.mark.parametrize("name", EVERY)
def test_somebody_elses_files_are_neither_overwritten_nor_deleted(start, copy, tmp_path, name):
    theirs = tmp_path / "theirs"
    for path in ("checkpoints/other_tool.pt", "samples.txt", "config.json", "tokenizer.json", "thesis.docx"):
        (theirs / path).parent.mkdir(parents=True, exist_ok=True)
        (theirs / path).write_text("theirs")
    before = contents(theirs)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds files that no run made"):
            start(name, theirs, overwrite_output_dir=overwrite)
    assert contents(theirs) == before

    folder = copy(name)
    (folder / "thesis.docx").write_text("theirs")
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "other_tool.pt").write_text("theirs")
    start(name, folder, overwrite_output_dir=True)
    assert (folder / "thesis.docx").exists() and (folder / "checkpoints" / "other_tool.pt").exists()


@pytest.mark.fault(32)
@pytest.mark.parametrize("name", [name for name in EVERY if name != "tokenizer"])
def test_the_folder_of_the_model_is_not_overwritten(start, copy, name):
    folder = copy(name)
    before = contents(folder)
    for place in (folder, *sorted((folder / "checkpoints").glob("*-*"))):
        with pytest.raises(ValueError, match=r"output_dir|output_dir .* is the model's own folder"):
            start(name, folder, model=place, overwrite_output_dir=True)
    assert contents(folder) == before


@pytest.mark.fault(32)
def test_the_base_of_a_checkpoint_of_lora_is_not_overwritten(start, commands, finished, tmp_path):
    checkpoint = sorted((finished("instruction lora") / "checkpoints").glob("checkpoint-*"))[0]
    base = Path(str(commands["instruction lora"].options["model"]))
    before = contents(base)
    for name in ("instruction full", "export"):
        with pytest.raises(ValueError, match="is the base of model itself, which would be overwritten"):
            start(name, base, model=checkpoint, overwrite_output_dir=True)
    assert contents(base) == before


CHANGES = {
    "pretrain": ("texts.jsonl", "corpus_sha256"),
    "tokenizer": ("texts.jsonl", "corpus_sha256"),
    "instruction lora": ("chats.jsonl", "_sha256"),
    "instruction full": ("chats.jsonl", "_sha256"),
    "classification": ("labels.jsonl", "_sha256"),
    "preference": ("pairs.jsonl", "_sha256"),
}


@pytest.mark.fault(19, 26)
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("change", ["a row more", "another word"])
def test_a_text_that_changed_is_refused_with_the_difference(start, commands, copy, tmp_path, name, change):
    folder = copy(name)
    before = contents(folder)
    file_name, told = CHANGES[name]
    text = Path(str(commands[name].options["dataset"])).read_text()
    assert Path(str(commands[name].options["dataset"])).name == file_name
    text += text.split("\n")[0].replace("up", "nowhere") + "\n" if change == "a row more" else ""
    (tmp_path / file_name).write_text(text if change == "a row more" else text.replace("home", "hoem", 1))
    with pytest.raises(ValueError, match=rf"belongs to another run:\n(.*\n)*.*{told} was "):
        start(name, folder, dataset=tmp_path / file_name)
    assert contents(folder) == before


@pytest.mark.fault(26)
@pytest.mark.parametrize("name", [name for name in EVERY if name not in ("pretrain", "tokenizer")])
def test_a_base_that_was_trained_further_is_refused(start, commands, copy, tmp_path, name):
    folder = copy(name)
    base = shutil.copytree(str(commands[name].options["model"]), tmp_path / "base")
    content = bytearray((base / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (base / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"(base|model)_sha256 was "):
        start(name, folder, model=base)


@pytest.mark.fault(11, 31)
@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("learning_rate", [10, 1e3, 1e25])
def test_a_learning_rate_at_which_training_diverges_leaves_no_nan_and_no_success(start, tmp_path, name, learning_rate):
    rates = {"learning_rate": learning_rate}
    if name == "classification":
        rates["head_learning_rate"] = learning_rate
    # At the highest rate that is allowed some training diverges, and some, as that of LoRA, is poor.
    with (
        contextlib.suppress(FloatingPointError) if learning_rate == 10 else pytest.raises(ValueError, match="from 0 to")
    ):
        start(name, tmp_path / "out", **rates)
    for path in (tmp_path / "out").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values() if tensor.is_floating_point()), path
    for path in (*(tmp_path / "out").rglob("*.json"), *(tmp_path / "out").rglob("*.jsonl")):
        assert not any(word in path.read_text() for word in ("NaN", "Infinity")), path


@pytest.mark.fault(11, 31)
# Instruction tuning at 1e3 ends no worse than a guess, or keeps the model from before it diverged.
@pytest.mark.parametrize(
    ("learning_rate", "name"),
    [(rate, name) for name in TRAINING for rate in (1e3, 1e25) if rate > 1e3 or not name.startswith("instruction")],
)
def test_training_that_diverges_stops_by_itself(start, tmp_path, name, learning_rate, monkeypatch):
    """As if the door had let such a rate pass."""
    monkeypatch.setattr("hfllm.cli.options.About.admits", lambda self, number: True)
    rates = {"learning_rate": learning_rate}
    if name == "classification":
        rates["head_learning_rate"] = learning_rate
    with pytest.raises((FloatingPointError, ValueError), match="learning_rate"):
        start(name, tmp_path / "out", **rates)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    for path in (tmp_path / "out").rglob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values() if tensor.is_floating_point()), path


@pytest.mark.parametrize("name", [name for name in TRAINING if name != "classification"])
def test_any_checkpoint_of_a_run_is_a_model(start, finished, tmp_path, name):
    """It is exported, and a run starts from it."""
    checkpoints = sorted((finished(name) / "checkpoints").glob("*-*"))
    assert checkpoints
    start("export", tmp_path / "exported", model=checkpoints[0])
    start("instruction full", tmp_path / "again", model=checkpoints[0], max_steps=1)
    assert math.isfinite(json.loads((tmp_path / "again" / "metrics.json").read_text())["eval_loss"])


@pytest.mark.parametrize("name", ["instruction lora", "preference"])
def test_a_run_on_a_checkpoint_of_lora_has_checkpoints_that_open_too(start, finished, tmp_path, name):
    """The second run's adapter is on the first one's, which is on the base: merged, they are the second run's model."""
    first = sorted((finished(name) / "checkpoints").glob("checkpoint-*"))[0]
    start("instruction lora", tmp_path / "again", model=first, max_steps=3, load_best_model_at_end=False)
    [second] = (tmp_path / "again" / "checkpoints").glob("checkpoint-*")
    merged, saved = open_causal_lm(str(second)).state_dict(), weights_of(tmp_path / "again")
    for key, weight in saved.items():
        torch.testing.assert_close(merged[key], weight)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_checkpoint_of_a_classifier_is_a_classifier(start, commands, tmp_path, method):
    """It is measured as the run's model was, and a run for the same labels goes on from its head."""
    run = tmp_path / "run"
    start("classification", run, method=method, num_train_epochs=1, learning_rate=0.001)
    [checkpoint] = (run / "checkpoints").glob("checkpoint-*")
    assert AutoTokenizer.from_pretrained(checkpoint)("we go").input_ids
    dataset = str(commands["classification"].options["dataset"])
    recipe = load_recipe("evaluate_model")
    for model, folder in ((run, "whole"), (checkpoint, "checkpoint")):
        AcceleratorState._reset_state(reset_partial_state=True)
        argv = ["--model", str(model), "--dataset", dataset, "--output_dir", str(tmp_path / folder)]
        recipe.main(parse_arguments(recipe.EvaluateArguments, argv))
    scores = [json.loads((tmp_path / folder / "metrics.json").read_text()) for folder in ("whole", "checkpoint")]
    assert scores[0]["test_loss"] == pytest.approx(scores[1]["test_loss"], rel=1e-5)
    assert scores[0]["test_confusion"] == scores[1]["test_confusion"]

    start("classification", tmp_path / "again", model=checkpoint, max_steps=1, learning_rate=0, head_learning_rate=0)
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    first = json.loads((run / "metrics.json").read_text())
    assert again["test_loss"] == pytest.approx(first["test_loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["instruction lora", "classification"])
def test_a_classifier_for_other_labels_starts_from_any_checkpoint_with_a_new_head(
    start, commands, finished, tmp_path, name
):
    checkpoint = sorted((finished(name) / "checkpoints").glob("checkpoint-*"))[0]
    text = Path(str(commands["classification"].options["dataset"])).read_text()
    (tmp_path / "labels.jsonl").write_text(text.replace('"early"', '"soon"').replace('"late"', '"tonight"', 20))
    start("classification", tmp_path / "out", model=checkpoint, dataset=tmp_path / "labels.jsonl", max_steps=2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert sorted(config["label2id"]) == ["late", "soon", "tonight"]
