"""SIGTERM to a run of several processes: all save together within a step, and the same command resumes."""

import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.distributed.launching import ROOT, command, environment, pretrain, recipe


pytestmark = pytest.mark.slow


def stop(words: list[str], log: Path, whom: str) -> tuple[int, int, str]:
    """Start the command, and send SIGTERM after a few steps: the launcher's exit code, the steps then, its output."""
    output = log.parent.with_suffix(".output")
    with output.open("w") as file:
        launcher = psutil.Popen(words, cwd=ROOT, env=environment(), stdout=file, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 240
        while not (log.exists() and log.read_text().count("\n") > 5):
            assert launcher.poll() is None and time.monotonic() < end, output.read_text()
            time.sleep(0.02)
        workers = launcher.children()
        assert len(workers) == 2
        for process in {"the launcher": [launcher], "a worker": workers[1:], "all": [launcher, *workers]}[whom]:
            process.send_signal(signal.SIGTERM)
        steps = log.read_text().count('"loss"')
        code = launcher.wait(timeout=120)
        assert not any(worker.is_running() for worker in workers)
    finally:
        for process in [*launcher.children(recursive=True), launcher] if launcher.is_running() else []:
            process.kill()
    return code, steps, output.read_text()


@pytest.fixture(scope="module")
def straight(small, tmp_path_factory):
    """The log of a run that nobody stopped, and its options, by its accelerate file."""
    steps = {"max_steps": 40, "eval_steps": 40, "save_steps": 1000}
    options = {**small, **steps, "per_device_train_batch_size": 64}  # so that a step takes longer than a signal
    logs: dict[str, dict[str, list]] = {}

    def run(config: str) -> tuple[dict[str, list], dict[str, object]]:
        if config not in logs:
            logs[config] = pretrain(config, 2, {**options, "output_dir": tmp_path_factory.mktemp("straight")})
        return logs[config], options

    return run


@pytest.mark.parametrize(
    ("config", "whom"), [("ddp.yaml", "the launcher"), ("fsdp2.yaml", "all"), ("fsdp2.yaml", "a worker")]
)
def test_sigterm_saves_and_the_same_command_resumes_to_the_same_losses(straight, tmp_path, config, whom):
    expected, options = straight(config)
    own = {**options, "output_dir": tmp_path / "stopped"}
    words = [*command(config, 2), *recipe(own)]
    code, steps_when_told, output = stop(words, tmp_path / "stopped" / "log.jsonl", whom)
    assert code != 0
    [checkpoint] = (tmp_path / "stopped" / "checkpoints").glob("step-*")
    step = int(checkpoint.name.removeprefix("step-"))
    assert steps_when_told <= step <= steps_when_told + 2  # the step under way, and one that began meanwhile
    assert f"Stopped at step {step} of 40; the same command resumes" in output
    if whom == "a worker":  # the launcher reports how its workers ended, unless it gets the signal itself
        assert "exitcode: 143" in output
    assert not (tmp_path / "stopped" / ".lock").exists()
    assert not (tmp_path / "stopped" / "model.safetensors").exists()

    log = pretrain(config, 2, own)
    for name in ("step", "loss", "grad_norm", "eval_loss"):
        np.testing.assert_array_equal(log[name], expected[name], err_msg=name)
