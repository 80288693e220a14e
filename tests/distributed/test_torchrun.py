"""torchrun: when it is killed, its processes save and stop."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.distributed.launching import ROOT, environment, recipe


pytestmark = pytest.mark.slow


def torchrun(options: dict[str, object], *, max_restarts: int) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return [*launcher, f"--max_restarts={max_restarts}", *recipe(options)]


@pytest.fixture(scope="module")
def options(small) -> dict[str, object]:
    return {**small, "max_steps": 60, "eval_steps": 60, "save_steps": 5, "per_device_train_batch_size": 4}


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
