import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hfllm.training.devices import start_accelerator
from hfllm.training.interruption import StopRequest


ROOT = Path(__file__).parents[2]


def test_a_world_that_accelerate_did_not_take_is_refused(monkeypatch):
    """Two workers that each believe to be alone would train apart, into one folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    start_accelerator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but accelerate runs as 1"):
        start_accelerator()


def test_memory_that_is_freed_is_kept_for_the_next_step():
    program = """
import resource, torch
from hfllm.training.devices import keep_freed_memory
def faults_of(allocate):
    allocate()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        allocate()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
allocate = lambda: torch.ones(16 * 2**20)  # 64 MiB
print(faults_of(allocate), (keep_freed_memory(), faults_of(allocate))[1])
"""
    printed = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    without, kept = map(int, printed.stdout.split())
    assert kept * 10 < without


def test_a_first_signal_is_remembered_and_handlers_come_back(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest(Accelerator(cpu=True)) as request:
        assert not request.agreed()
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.agreed()
        assert "Once more to stop at once" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_stops_at_once():
    program = """
import os, signal
from accelerate import Accelerator
from hfllm.training.interruption import StopRequest
with StopRequest(Accelerator(cpu=True)):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    print("still here")
"""
    finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 130
    assert "still here" not in finished.stdout


def test_every_accelerate_file_is_one_that_accelerate_reads():
    from accelerate.commands.config.config_args import load_config_from_file

    files = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
    assert files
    for file in files:
        config = load_config_from_file(str(file))
        assert config.num_processes >= 1, file
        assert torch.device("cpu" if config.use_cpu else "cuda")
