import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from hfllm.training.devices import clip_gradient, start_accelerator


ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _accelerate_starts_anew():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.fault(9)
def test_a_world_that_accelerate_did_not_take_is_refused(monkeypatch):
    """Two workers that each believe to be alone would train apart, into one folder."""
    start_accelerator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched, but accelerate runs as 1"):
        start_accelerator()


# What `accelerate launch` passes on to the script by its environment, and what the script must then say.
REFUSED = {
    "FSDP1": ({"ACCELERATE_USE_FSDP": "true"}, "fsdp_version: 2"),
    "FSDP1 by its number": ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 2"),
    "Megatron": ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "accelerate_configs/fsdp2.yaml"),
    "FSDP2 without a launcher": (
        {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"},
        "FSDP was asked for, but accelerate runs as NO",
    ),
    "several processes of which one was started": (
        {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1"},
        "accelerate_configs/multi_cpu.yaml",
    ),
    "an accumulation that is not the recipe's": (
        {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
        "gradient_accumulation_steps=4, the recipe 2",
    ),
    "tensor parallelism": (
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
        "each process reads its own",
    ),
    "groups that are not the launch": (
        {
            "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
            "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
            "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4",
        },
        "1 processes were launched for 2 groups of 4: that takes 8",
    ),
}


@pytest.mark.fault(9)
@pytest.mark.parametrize(("environment", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_launch_that_would_not_be_what_was_asked_for_is_refused(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        start_accelerator(gradient_accumulation_steps=2)


def test_more_processes_than_accelerators_are_refused(monkeypatch):
    """accelerate would give two processes the same one."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    for name, value in {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "8", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="8 processes were launched on a machine with 4 accelerators"):
        start_accelerator()


def test_a_gradient_is_shortened_and_its_length_before_that_told():
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert clip_gradient(Accelerator(cpu=True), layer, max_norm=1.0) == 5.0
    torch.testing.assert_close(layer.weight.grad, torch.tensor([[0.6, 0.8]]), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
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
