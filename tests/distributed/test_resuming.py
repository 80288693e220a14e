"""A run resumes exactly with another number of processes, and sharded in another way."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from hfllm.evaluation.rows import evaluate_rows
from hfllm.training.checkpoint import load_checkpoint, save_checkpoint
from tests.distributed import checkpointing
from tests.distributed.launching import ROOT, columns, command, needs_deepspeed, pretrain, run


pytestmark = pytest.mark.slow
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@pytest.mark.parametrize(
    ("name", "config", "num_processes", "sharding", "options"),
    [
        ("adamw", "ddp.yaml", 2, "DDP", []),
        ("adamw", "fsdp2.yaml", 2, "FSDP2", []),
        ("muon", "fsdp2.yaml", 3, "FSDP2", []),
        ("muon", "hsdp.yaml", 4, "HSDP 2 x 2", ["--parallelism_config_dp_shard_size", 2]),
        pytest.param("adamw", "deepspeed_zero2.yaml", 3, "ZeRO-2", [], marks=needs_deepspeed),
        pytest.param("adamw", "deepspeed_zero3.yaml", 3, "ZeRO-3", [], marks=needs_deepspeed),
    ],
)
def test_several_processes_resume_what_one_began_and_the_other_way_round(
    tmp_path, name, config, num_processes, sharding, options
):
    accelerator = Accelerator(cpu=True)
    model, optimizer = checkpointing.build(accelerator, name)
    single = {"model": model, "optimizer": optimizer, "accelerator": accelerator}
    checkpointing.train(model, optimizer, range(2), accelerator)
    path = save_checkpoint(tmp_path / "single", state={"step": 2}, **single)

    script = str(ROOT / "tests" / "distributed" / "checkpointing.py")
    finished = run([*command(config, num_processes, *options), script, str(tmp_path), name])
    assert finished.returncode == 0, finished.stdout + finished.stderr

    # Read by several processes and written again, every file has the same bytes.
    for file in FILES:
        assert (path / file).read_bytes() == (tmp_path / "several" / "unchanged" / path.name / file).read_bytes(), file

    # Processes that stop and resume end where those that go straight on do, to the last bit.
    straight, resumed = (tmp_path / "several" / leg / "step-00000004" for leg in ("straight", "resumed"))
    for file in FILES:
        assert (straight / file).read_bytes() == (resumed / file).read_bytes(), file

    # An optimizer that has not taken a step is written as one.
    fresh = tmp_path / "several" / "fresh" / "step-00000000"
    assert load_file(fresh / "optimizer.safetensors") == {}

    # One process ends there too, up to the order of its sums, and evaluates to the same number.
    checkpointing.train(model, optimizer, range(2, 4), accelerator)
    by_several = load_file(straight / "model.safetensors")
    for key, tensor in model.state_dict().items():
        if key in by_several:
            torch.testing.assert_close(by_several[key], tensor, atol=1e-5, rtol=1e-4)
    load_checkpoint(straight, **single)
    expected = evaluate_rows(model, checkpointing.CountingRows(), batch_size=5, accelerator=accelerator)
    for index in range(num_processes):
        outcome = json.loads((tmp_path / f"{index}.json").read_text())
        assert outcome["sharding"] == sharding
        assert outcome["loss"] == pytest.approx(expected.loss, rel=1e-6)
        assert outcome["num_tokens"] == expected.num_tokens == 4 + 6 + 8 + 10 + 12
        assert "state.json" in outcome["error"]
    assert not (tmp_path / "several" / ".lock").exists()


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    """Eight steps by one process, without a stop."""
    options = {**small, "lr_scheduler_type": "constant", "eval_steps": 8, "max_steps": 8}
    log = pretrain(
        "cpu.yaml", 1, {**options, "per_device_train_batch_size": 8, "output_dir": tmp_path_factory.mktemp("straight")}
    )
    return log, options


def follow(straight, output_dir, legs: list[tuple]) -> None:
    """Two steps with each launch, in one folder: the losses are those of the run that nobody stopped."""
    expected, options = straight
    for number, (config, num_processes, *launcher_options) in enumerate(legs, start=1):
        rows = {"per_device_train_batch_size": 8 // num_processes}
        own = {**options, **rows, "max_steps": 2 * number, "save_steps": 2, "eval_steps": 2, "output_dir": output_dir}
        pretrain(config, num_processes, own, *launcher_options)
    log = columns(output_dir)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(log[name], expected[name][: 2 * len(legs)], rtol=1e-6, err_msg=name)
    assert log["step"] == sorted(log["step"])


def test_fsdp2_resumes_with_fewer_and_fewer_processes(straight, tmp_path):
    follow(straight, tmp_path, [("fsdp2.yaml", 4), ("fsdp2.yaml", 2), ("fsdp2.yaml", 1), ("cpu.yaml", 1)])


def test_a_run_changes_how_it_is_sharded(straight, tmp_path):
    groups = ["--parallelism_config_dp_shard_size", 2]
    follow(straight, tmp_path, [("ddp.yaml", 2), ("hsdp.yaml", 4, *groups), ("fsdp2.yaml", 2), ("multi_cpu.yaml", 4)])


@needs_deepspeed
def test_a_run_changes_to_deepspeed_and_back(straight, tmp_path):
    legs = [("ddp.yaml", 2), ("deepspeed_zero2.yaml", 2), ("deepspeed_zero3.yaml", 4), ("fsdp2.yaml", 2)]
    follow(straight, tmp_path, legs)
