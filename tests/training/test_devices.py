import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState

import hfllm
from hfllm.training import devices
from hfllm.training.devices import (
    check_attention,
    check_precision,
    choose_attention,
    clip_gradient,
    start_accelerator,
)
from tests.conftest import make_tiny_config
from tests.recipes.conftest import load_recipe


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


ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}


@pytest.fixture
def deepspeed(monkeypatch):
    """What accelerate is after a launch with a DeepSpeed file, where DeepSpeed need not be installed."""

    class Launched:
        def __init__(self, **arguments):
            self.distributed_type = DistributedType.DEEPSPEED
            self.gradient_accumulation_steps = arguments["gradient_accumulation_steps"]
            self.num_processes, self.device, self.is_fsdp2 = 1, torch.device("cpu"), False

    configured = []
    for name, value in ZERO.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(devices, "Accelerator", Launched)
    monkeypatch.setattr(devices.zero, "configure", lambda accelerator, **numbers: configured.append(numbers))
    yield configured
    os.environ.pop("DS_ACCELERATOR", None)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"needs_whole_matrices": True}, "Muon makes whole matrices orthogonal.*fsdp2.yaml, or give optimizer=adamw"),
        ({"skips_updates": True}, "skip_spikes decides between the gradient and the update.*fsdp2.yaml"),
    ],
)
def test_deepspeed_is_refused_for_what_it_cannot_do(deepspeed, asked, message):
    with pytest.raises(ValueError, match=message):
        start_accelerator(**asked)
    assert deepspeed == []


def test_deepspeed_gets_the_loops_numbers(deepspeed):
    start_accelerator(per_device_train_batch_size=3, max_grad_norm=0.5)
    assert deepspeed == [{"rows_per_device": 3, "max_grad_norm": 0.5}]


def test_pretraining_with_muon_is_refused_under_deepspeed_and_with_adamw_continues(deepspeed, monkeypatch, tmp_path):
    """Muon is the recipe's default for random weights, so a launch with DeepSpeed raises this first."""
    recipe = load_recipe("pretrain")
    options = {"output_dir": str(tmp_path / "out")}
    with pytest.raises(ValueError, match="give optimizer=adamw"):
        recipe.main(recipe.PretrainArguments(**options))
    monkeypatch.setattr(recipe, "claim_folder", lambda *_, **__: (_ for _ in ()).throw(InterruptedError))
    with pytest.raises(InterruptedError):  # the next thing that the recipe does
        recipe.main(recipe.PretrainArguments(**options, optimizer="adamw"))
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_half_precision_that_a_cpu_has_not_is_refused(precision, monkeypatch):
    """accelerate would compute in float32, and the run would report a share of fp16's speed."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(ValueError, match=f"launched with mixed_precision {precision}, which needs an accelerator"):
        start_accelerator()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_precision()


def test_a_machine_with_a_gpu_trains_on_its_cpu_where_that_was_asked_for(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert start_accelerator().device.type == "cpu"


def test_bf16_on_a_gpu_that_has_none_is_refused(monkeypatch):
    """torch would emulate it."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(ValueError, match=r"Tesla V100 has no bfloat16.*--mixed_precision fp16"):
        check_precision()


def test_attention_by_blocks_is_chosen_on_a_gpu_only_and_without_dropout():
    model = hfllm.GPTForCausalLM(make_tiny_config("modern"))
    assert choose_attention(model, torch.device("cuda")) == "flex_attention"
    assert choose_attention(model, torch.device("cpu")) == "sdpa"
    model.config.attention_dropout = 0.1
    assert choose_attention(model, torch.device("cuda")) == "sdpa"


def test_flex_attention_is_refused_on_a_cpu_before_anything_is_read():
    with pytest.raises(ValueError, match="no backward pass on a CPU"):
        check_attention("flex_attention", torch.device("cpu"))
    for name, device in ((None, "cpu"), ("sdpa", "cpu"), ("flex_attention", "cuda")):
        check_attention(name, torch.device(device))
