"""Trainer's checkpoints: whole or absent, verified, and a run that resumes from one ends with the same bits."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderShard, SkipBatchSampler
from torch.utils.data import BatchSampler, DataLoader
from transformers import TrainerCallback, TrainingArguments

import hfllm
from hfllm.adapters import add_lora
from hfllm.fine_tuning import checkpoints
from hfllm.fine_tuning.checkpoints import CheckpointedTrainer, newest_checkpoint, train_from_newest
from hfllm.fine_tuning.order import RowOrder, set_epoch
from hfllm.training.optimization import build_muon
from tests.conftest import make_tiny_config


class SomeRows(list):
    """Twenty rows of different lengths."""

    def __init__(self):
        draw = np.random.default_rng(0)
        self.lengths = draw.integers(4, 20, 20).tolist()
        super().__init__({"input_ids": torch.from_numpy(draw.integers(3, 64, length))} for length in self.lengths)


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    input_ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], True, 2)
    return {"input_ids": input_ids, "labels": input_ids.masked_fill(input_ids == 2, -100)}


class At(TrainerCallback):
    """Calls `action` in one step, before it ends."""

    def __init__(self, step: int, action):
        self.step, self.action = step, action

    def on_substep_end(self, args, state, control, **kwargs):
        self.on_optimizer_step(args, state, control)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1 and self.action is not None:
            action, self.action = self.action, None
            action()


def make_trainer(folder: Path, method: str = "adamw", **options) -> CheckpointedTrainer:
    """Five steps an epoch, with dropout; ten steps, a checkpoint after every second."""
    torch.manual_seed(0)
    model = hfllm.GPTForCausalLM(make_tiny_config("modern", residual_dropout=0.1))
    optimizer = None
    if method == "lora":
        model = add_lora(model, r=2)
    elif method == "muon":
        rates = {"learning_rate": 0.02, "adam_learning_rate": 0.01, "weight_decay": 0.0}
        optimizer = build_muon(model, **rates, momentum=0.95, betas=(0.9, 0.95), epsilon=1e-8)
    defaults = {
        "max_steps": 10,
        "save_steps": 2,
        "save_total_limit": None,
        "train_sampling_strategy": "group_by_length",
    }
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        remove_unused_columns=False,
        disable_tqdm=True,
        **{**defaults, **options},
    )
    rows = SomeRows()
    return CheckpointedTrainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collate, optimizers=(optimizer, None)
    )


def weights_of(trainer: CheckpointedTrainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nobody interrupted, by its method and options: its folder and its last weights."""
    runs: dict[str, tuple[Path, dict[str, torch.Tensor]]] = {}

    def run(method: str = "adamw", **options) -> tuple[Path, dict[str, torch.Tensor]]:
        key = f"{method} {options}"
        if key not in runs:
            folder = tmp_path_factory.mktemp("straight")
            trainer = make_trainer(folder, method, **options)
            assert train_from_newest(trainer)
            runs[key] = folder, weights_of(trainer)
        return runs[key]

    return run


@pytest.fixture
def interrupted(straight, tmp_path):
    """The folder of a run as it was after some step."""

    def make(step: int, *args, **options) -> Path:
        folder, _ = straight(*args, **options)
        for path in checkpoints.list_checkpoints(folder):
            if int(path.name.removeprefix("checkpoint-")) <= step:
                shutil.copytree(path, tmp_path / "checkpoints" / path.name)
        return tmp_path / "checkpoints"

    return make


@pytest.mark.fault(27)
@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
@pytest.mark.parametrize("method", ["adamw", "lora", "muon"])
def test_a_run_that_resumes_in_its_second_epoch_ends_with_the_same_bits(straight, interrupted, method, strategy):
    _, expected = straight(method, train_sampling_strategy=strategy)
    trainer = make_trainer(
        interrupted(8, method, train_sampling_strategy=strategy), method, train_sampling_strategy=strategy
    )
    assert train_from_newest(trainer)
    assert_equal(weights_of(trainer), expected)


def test_a_checkpoint_holds_no_pickle_and_all_it_holds_is_in_its_manifest(straight):
    folder, _ = straight()
    names = {path.name for path in (folder / "checkpoint-4").iterdir()}
    assert {"model.safetensors", "config.json", "optimizer.safetensors", "optimizer.json"} <= names
    assert {"scheduler.json", "random_states.safetensors", "trainer_state.json"} <= names
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".jinja", ".py", ".md"}
    manifest = json.loads((folder / "checkpoint-4" / "manifest.json").read_text())
    assert manifest["files"].keys() | {"manifest.json"} == names
    assert {path.name for path in folder.iterdir()} == {f"checkpoint-{step}" for step in (2, 4, 6, 8, 10)}


DAMAGE = ["flipped", "truncated", "empty", "missing"]


@pytest.mark.fault(25)
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "scheduler.json", "trainer_state.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(interrupted, capsys, name, damage):
    folder = interrupted(8)
    path = folder / "checkpoint-8" / name
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "missing":
        path.unlink()
    else:
        os.truncate(path, len(content) // 2 if damage == "truncated" else 0)
    os.utime(folder / "checkpoint-2")  # the newest by its time, and not by its step
    assert newest_checkpoint(folder) == str(folder / "checkpoint-6")
    assert (folder / "broken-checkpoint-8").is_dir()
    printed = capsys.readouterr().out
    # A flipped byte of the manifest makes another file's checksum wrong.
    fault = "" if (name, damage) == ("manifest.json", "flipped") else name
    assert f"{folder}/checkpoint-8 cannot be resumed from: {fault}" in printed and "broken-checkpoint-8" in printed


@pytest.mark.fault(25)
def test_a_run_whose_newest_checkpoint_is_damaged_ends_with_the_same_bits(straight, interrupted):
    _, expected = straight()
    folder = interrupted(8)
    (folder / "checkpoint-8" / "scheduler.json").unlink()
    trainer = make_trainer(folder)
    assert train_from_newest(trainer)
    assert_equal(weights_of(trainer), expected)
    assert (folder / "checkpoint-8").is_dir() and (folder / "broken-checkpoint-8").is_dir()


@pytest.mark.fault(25)
def test_a_run_without_a_sound_checkpoint_begins_again(interrupted, straight):
    folder = interrupted(2)
    (folder / "checkpoint-2" / "manifest.json").unlink()
    assert newest_checkpoint(folder) is None
    trainer = make_trainer(folder)
    assert train_from_newest(trainer)
    assert_equal(weights_of(trainer), straight()[1])


@pytest.mark.fault(28)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [3, 5, 10], ids=["within an epoch", "at an epoch's end", "in the last step"])
def test_a_signal_saves_after_the_step_and_the_resumed_run_ends_with_the_same_bits(straight, tmp_path, step, number):
    before = signal.getsignal(number)
    trainer = make_trainer(tmp_path, save_steps=100)
    trainer.add_callback(At(step, lambda: os.kill(os.getpid(), number)))
    assert not train_from_newest(trainer)
    assert trainer.state.global_step == step
    assert [path.name for path in checkpoints.list_checkpoints(tmp_path)] == [f"checkpoint-{step}"]
    assert signal.getsignal(number) is before
    resumed = make_trainer(tmp_path, save_steps=100)
    assert train_from_newest(resumed)
    assert_equal(weights_of(resumed), straight()[1])


BEST = {
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "max_steps": 20,
}


@pytest.mark.fault(28)
@pytest.mark.parametrize("step", [7, 10])
def test_the_best_epoch_is_the_same_after_a_signal(straight, tmp_path, step):
    """An evaluation in the middle of an epoch would count as one; at its end it must not be missed."""
    folder, expected = straight(**BEST)
    trainer = make_trainer(tmp_path, **BEST)
    trainer.add_callback(At(step, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert not train_from_newest(trainer)
    resumed = make_trainer(tmp_path, **BEST)
    assert train_from_newest(resumed)
    assert_equal(weights_of(resumed), expected)
    states = [json.loads((path / "checkpoint-20" / "trainer_state.json").read_text()) for path in (folder, tmp_path)]
    for name in ("best_metric", "best_global_step"):
        assert states[0][name] == states[1][name]
    losses = [[line["eval_loss"] for line in state["log_history"] if "eval_loss" in line] for state in states]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def with_losses(trainer: CheckpointedTrainer, losses: list[float]) -> CheckpointedTrainer:
    """A trainer whose evaluations give these losses, one an epoch."""

    def evaluate(*args, **kwargs):
        metrics = {"eval_loss": losses[int(trainer.state.epoch) - 1]}
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    trainer.evaluate = evaluate
    return trainer


def test_rotation_keeps_the_newest_by_step_and_the_best(tmp_path):
    trainer = with_losses(make_trainer(tmp_path, **BEST, save_total_limit=2), [3.0, 1.0, 2.0, 2.0])
    left = []

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            left.append([path.name.removeprefix("checkpoint-") for path in checkpoints.list_checkpoints(tmp_path)])
            os.utime(tmp_path / f"checkpoint-{left[-1][0]}")  # the oldest becomes the newest by its time

    trainer.add_callback(Look())
    assert train_from_newest(trainer)
    assert left == [["5"], ["5", "10"], ["10", "15"], ["10", "20"]]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-10")


@pytest.mark.fault(25)
def test_a_run_whose_best_checkpoint_is_damaged_goes_back_to_before_it(tmp_path):
    losses = [3.0, 1.0, 2.0, 0.5]
    trainer = with_losses(make_trainer(tmp_path, **BEST), losses)
    trainer.add_callback(At(17, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert not train_from_newest(trainer)
    path = tmp_path / "checkpoint-10" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    resumed = with_losses(make_trainer(tmp_path, **BEST), losses)
    assert train_from_newest(resumed)
    assert resumed.state.best_global_step == 20


def test_a_folder_that_moved_still_knows_its_best_checkpoint(tmp_path):
    losses = [1.0, 2.0, 3.0, 4.0]
    trainer = with_losses(make_trainer(tmp_path / "here", **BEST), losses)
    trainer.add_callback(At(17, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert not train_from_newest(trainer)
    (tmp_path / "here").rename(tmp_path / "there")
    resumed = with_losses(make_trainer(tmp_path / "there", **BEST), losses)
    assert train_from_newest(resumed)
    assert resumed.state.best_model_checkpoint == str(tmp_path / "there" / "checkpoint-5")


@pytest.mark.fault(20)
def test_a_run_that_resumes_after_its_last_step_takes_no_other(straight, interrupted):
    folder = interrupted(8)  # in the middle of an epoch
    trainer = make_trainer(folder, max_steps=8)
    assert train_from_newest(trainer)
    assert trainer.state.global_step == 8


@pytest.mark.fault(6)
def test_a_full_disk_is_named_before_anything_is_written(interrupted, monkeypatch):
    folder = interrupted(2)
    trainer = make_trainer(folder)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"needs 1\.\d MiB, .* has 0\.0 MiB left"):
        train_from_newest(trainer)
    assert newest_checkpoint(folder) == str(folder / "checkpoint-2")


@pytest.mark.fault(6)
def test_a_save_that_fails_leaves_the_older_checkpoints_and_no_half_one(interrupted, monkeypatch):
    folder = interrupted(2)
    trainer = make_trainer(folder)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", fail)
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written: .*No space left.* older checkpoints are"):
        train_from_newest(trainer)
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]


@pytest.mark.fault(1)
def test_a_save_that_is_killed_at_any_file_leaves_the_checkpoint_before(interrupted):
    """The process ends at the n-th file that is flushed to the disk."""
    folder = interrupted(2)
    for number in range(1, 10, 2):
        child = os.fork()
        if child == 0:
            count = 0

            def die(path: Path) -> None:
                nonlocal count
                count += 1
                if count == number:  # noqa: B023
                    os.kill(os.getpid(), signal.SIGKILL)

            checkpoints.write_manifest.__globals__["flush"] = die
            make_trainer(folder, max_steps=4).train(str(folder / "checkpoint-2"))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert newest_checkpoint(folder) == str(folder / "checkpoint-2")
    assert train_from_newest(make_trainer(folder, max_steps=4))
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.fault(1)
def test_a_checkpoint_that_only_lacked_its_name_when_the_run_was_killed_is_used(interrupted):
    folder = interrupted(4)
    (folder / "writing").mkdir()
    (folder / "checkpoint-4").rename(folder / "writing" / "checkpoint-4")
    assert newest_checkpoint(folder) == str(folder / "checkpoint-4")


def test_an_optimizer_of_another_kind_is_refused(interrupted):
    trainer = make_trainer(interrupted(2), "muon")
    with pytest.raises(ValueError, match="holds the state of AdamW, and the optimizer is Muon"):
        train_from_newest(trainer)


@pytest.mark.fault(27)
def test_the_epoch_reaches_the_sampler_of_several_processes_that_skip_batches():
    """accelerate's own set_epoch ends one wrapper above it."""
    order = RowOrder([1] * 8, batch_size=2, by_length=False, seed=0)
    shard = BatchSamplerShard(BatchSampler(order, 2, drop_last=False), num_processes=2, process_index=0)
    loader = DataLoaderShard(list(range(8)), batch_sampler=SkipBatchSampler(shard, 1))
    loader.set_epoch(3)
    assert order.epoch == 0
    set_epoch(loader, 3)
    assert order.epoch == 3
    set_epoch(DataLoader(list(range(8))), 1)  # whose sampler has no epochs


def test_grouped_rows_are_all_there_in_another_order_each_epoch():
    lengths = np.random.default_rng(0).integers(1, 50, 43).tolist()
    order = RowOrder(lengths, batch_size=4, by_length=True, seed=1, drop_last=False)
    epochs = []
    for epoch in range(2):
        order.set_epoch(epoch)
        epochs.append(list(order))
        assert sorted(epochs[-1]) == list(range(43)) and len(order) == 43
        spreads = [np.ptp([lengths[row] for row in epochs[-1][first : first + 4]]) for first in range(0, 40, 4)]
        assert np.mean(spreads) < 6  # of lengths from 1 to 50
    assert epochs[0] != epochs[1]
    assert list(order) == epochs[1]
