"""Whole runs, as a user starts them, killed for real."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import pytest
import torch

from tests.hub.double import Hub
from tests.recipes.every_recipe import EVERY, ROOT, TRAINING, Command, make_commands, weights_of


LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--config_file")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command_of(options: dict, *, config: str, **launch) -> list[str]:
    launcher = [*LAUNCH, f"accelerate_configs/{config}", *(f"--{name}={value}" for name, value in launch.items())]
    return [*launcher, "recipes/pretrain.py", *(f"--{name}={value}" for name, value in options.items())]


@pytest.fixture(scope="module")
def commands(tmp_path_factory) -> dict[str, Command]:
    return make_commands(tmp_path_factory.mktemp("inputs"))


def kill_at_random(command: list[str], *, num_kills: int, seconds: float, ended: Callable[[], None]) -> None:
    """Start the command and kill -9 it at a random moment, again and again; `ended` is called when it was quicker.

    `seconds` is what the command takes when it is left alone. At the end it is left alone.
    """
    draw = random.Random(0)
    left = num_kills
    while left:
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, start_new_session=True, stdout=subprocess.DEVNULL
        )
        try:
            assert process.wait(timeout=draw.uniform(0, seconds)) == 0
            ended()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            left -= 1
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, timeout=600, stdout=subprocess.DEVNULL)


# HFLLM_NUM_KILLS=20 is what was tried once for each training recipe; every run tries a few. Tokenizers, exports and
# pushes, which have no steps to be killed between, are killed half as often.
NUM_KILLS = int(os.environ.get("HFLLM_NUM_KILLS", "2"))
NUM_KILLS_WITHOUT_STEPS = max(1, NUM_KILLS // 2)


@pytest.mark.slow
@pytest.mark.fault(1, 2, 23, 24)
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", EVERY)
def test_what_is_killed_again_and_again_ends_as_if_it_had_not_been(commands, tmp_path, name):
    """kill -9 at random moments of the start, of steps, saves and evaluations, and of the end."""
    command, straight, killed = commands[name], tmp_path / "straight", tmp_path / "killed"
    start = time.monotonic()
    subprocess.run(command.shell(straight), cwd=ROOT, env=ENVIRONMENT, check=True, timeout=600)
    seconds = time.monotonic() - start
    expected = command.result(straight)

    def compare() -> None:
        found = command.result(killed)
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []

    def compare_and_start_again() -> None:
        compare()
        shutil.rmtree(killed)

    num_kills = NUM_KILLS if name in TRAINING else NUM_KILLS_WITHOUT_STEPS
    kill_at_random(command.shell(killed), num_kills=num_kills, seconds=seconds, ended=compare_and_start_again)
    compare()
    left = {path.name for path in killed.iterdir()}
    assert left == {path.name for path in straight.iterdir()}  # no half of anything


@pytest.mark.slow
@pytest.mark.fault(24, 33)
@pytest.mark.timeout(1800)
def test_a_push_that_is_killed_again_and_again_arrives_as_a_whole(commands, tmp_path):
    model = commands["export"].options["model"]
    with Hub() as hub:
        environment = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home")}
        environment |= {"HF_TOKEN": hub.token("me")}
        command = [sys.executable, "recipes/push_to_hub.py", f"--model={model}", "--repo_id=me/my-gpt"]
        draw, num_kills, seconds = random.Random(0), 0, 20.0
        while num_kills < NUM_KILLS_WITHOUT_STEPS:
            start = time.monotonic()
            process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
            try:
                assert process.wait(timeout=draw.uniform(0, seconds)) == 0
                seconds = time.monotonic() - start
                hub.repositories.clear()
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                num_kills += 1
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=300)
        commits = hub.repositories["me/my-gpt"].commits.values()
        weights = (model / "model.safetensors").read_bytes()
        assert all(commit.files["model.safetensors"] == weights for commit in commits if "config.json" in commit.files)
        assert "config.json" in hub.repositories["me/my-gpt"].find("main").files
    assert not (model / ".lock").exists() or not (model / ".lock.json").exists()


@pytest.mark.slow
@pytest.mark.fault(13)
def test_a_supervised_run_of_two_processes_outlives_one_of_them(small, tmp_path):
    """The whole job is started again, resumes from its checkpoint, and ends with the same weights."""
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
