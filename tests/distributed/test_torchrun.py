"""torchrun with --max_restarts: when a process dies, TorchElastic starts all of them again, and the run resumes."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.launching import ROOT, environment, recipe, run


pytestmark = pytest.mark.slow


def torchrun(options: dict[str, object], *, max_restarts: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*launcher, f"--max_restarts={max_restarts}", *recipe(options)]


@pytest.fixture(scope="module")
def options(small) -> dict[str, object]:
    return {**small, "max_steps": 60, "eval_steps": 60, "save_steps": 5, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("straight")
    finished = run(torchrun({**options, "output_dir": folder}, max_restarts=0))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return load_file(folder / "model.safetensors")


def workers_of(launcher: psutil.Process) -> list[psutil.Process]:
    """By rank, all of one start."""
    workers = [child for child in launcher.children() if "recipes/pretrain.py" in child.cmdline()]
    return sorted(workers, key=lambda worker: int(worker.environ()["RANK"]))


def wait_for_checkpoint(launcher: psutil.Process, output_dir: Path, *, after_step: int) -> int:
    """The step of a checkpoint after `after_step`."""
    end = time.monotonic() + 120
    while True:
        assert launcher.poll() is None and time.monotonic() < end
        steps = [int(path.name[5:]) for path in output_dir.glob("checkpoints/step-????????")]
        if max(steps, default=0) > after_step:
            return max(steps)
        time.sleep(0.02)


@pytest.mark.fault(13)
def test_a_process_that_dies_is_followed_by_a_start_of_all_that_resumes(options, straight, tmp_path):
    """Each process once, the second one from the checkpoint of the second start."""
    output_dir, output = tmp_path / "killed", tmp_path / "output"
    with output.open("w") as file:
        words = torchrun({**options, "output_dir": output_dir}, max_restarts=3)
        launcher = psutil.Popen(words, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    try:
        step = 0
        for rank in (1, 0):
            step = wait_for_checkpoint(launcher, output_dir, after_step=step)
            workers_of(launcher)[rank].kill()
        assert launcher.wait(timeout=120) == 0, output.read_text()
    finally:
        for process in [*launcher.children(recursive=True), launcher] if launcher.is_running() else []:
            process.kill()
    assert output.read_text().count("Resuming from step") == 2, output.read_text()
    found = load_file(output_dir / "model.safetensors")
    assert found.keys() == straight.keys()
    assert [name for name in straight if not torch.equal(straight[name], found[name])] == []


@pytest.mark.fault(13)
def test_the_processes_of_a_torchrun_that_is_killed_save_and_stop(options, tmp_path):
    """kill -9 ends the launcher alone; without it, its processes would train on in a folder that a new start wants."""
    launcher = psutil.Popen(
        torchrun({**options, "max_steps": 10_000, "output_dir": tmp_path}, max_restarts=3),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    workers: list[psutil.Process] = []
    try:
        step = wait_for_checkpoint(launcher, tmp_path, after_step=0)
        workers = workers_of(launcher)
        launcher.send_signal(signal.SIGKILL)
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert alive == []
    finally:
        for process in [launcher, *workers]:
            if process.is_running():
                process.kill()
    assert max(int(path.name[5:]) for path in tmp_path.glob("checkpoints/step-????????")) >= step
    assert not (tmp_path / ".lock").exists()
