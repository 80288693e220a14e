"""Whole runs, as a user starts them, killed for real."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file


ROOT = Path(__file__).parents[2]
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--config_file")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command_of(options: dict, *, config: str, **launch) -> list[str]:
    launcher = [*LAUNCH, f"accelerate_configs/{config}", *(f"--{name}={value}" for name, value in launch.items())]
    return [*launcher, "recipes/pretrain.py", *(f"--{name}={value}" for name, value in options.items())]


def weights_of(output_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(output_dir / "model.safetensors")


def steps_logged(output_dir: Path) -> int:
    log = output_dir / "log.jsonl"
    return log.read_text().count('"loss"') if log.exists() else 0


@pytest.mark.slow
@pytest.mark.fault(1, 2)
def test_a_run_that_is_killed_again_and_again_ends_with_the_weights_of_one_that_was_not(small, tmp_path):
    """kill -9 at random moments of steps, saves and evaluations, which here take about as long as one another."""
    options = {**small, "max_steps": 300, "eval_steps": 3, "save_steps": 2, "config_overrides": "residual_dropout=0.1"}
    straight, killed = ({**options, "output_dir": tmp_path / name} for name in ("straight", "killed"))
    subprocess.run(command_of(straight, config="cpu.yaml"), cwd=ROOT, env=ENVIRONMENT, check=True, timeout=300)
    draw, num_kills = random.Random(0), 0
    command = command_of(killed, config="cpu.yaml")
    while num_kills < 5:
        before = steps_logged(killed["output_dir"])
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True)
        deadline = time.monotonic() + 120
        while steps_logged(killed["output_dir"]) <= before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 1))
        if process.poll() is not None:
            break  # it was quicker
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        num_kills += 1
    assert num_kills >= 2
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=300)
    expected, found = weights_of(straight["output_dir"]), weights_of(killed["output_dir"])
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.fault(13)
def test_a_supervised_run_of_two_processes_outlives_one_of_them(small, tmp_path):
    """The whole job is started anew, goes on from its checkpoint, and ends as if nothing had been."""
    options = {**small, "max_steps": 150, "save_steps": 5, "eval_steps": 150, "per_device_train_batch_size": 2}
    straight, killed = ({**options, "output_dir": tmp_path / name} for name in ("straight", "killed"))
    two = {"config": "ddp.yaml", "num_processes": 2, "main_process_port": 0, "mixed_precision": "no"}
    subprocess.run(command_of(straight, **two), cwd=ROOT, env=ENVIRONMENT, check=True, timeout=300)
    supervised = ["accelerate_configs/supervise.sh", *command_of(killed, **two)]
    process = subprocess.Popen(
        supervised, cwd=ROOT, env={**ENVIRONMENT, "WAIT_SECONDS": "0"}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list((killed["output_dir"] / "checkpoints").glob("step-????????")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    workers = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "recipes/pretrain.py" in child.cmdline() and "accelerate.commands.launch" not in child.cmdline()
    ]
    assert len(workers) == 2
    workers[1].kill()
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0
    assert "starting it again" in told
    expected, found = weights_of(straight["output_dir"]), weights_of(killed["output_dir"])
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert json.loads((killed["output_dir"] / "metrics.json").read_text())["train_steps"] == 150
