"""Accelerate's processes and sharding, checked against the launch; memory and gradient clipping."""

import atexit
import contextlib
import ctypes
import datetime
import os
import platform
import sys
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from . import zero


# How long processes wait for each other before they fail. The first one prepares the text for all, and NCCL's default
# of ten minutes is too short for a large text.
TIMEOUT = datetime.timedelta(hours=2)
ATTENTION_DROPOUTS = ("attention_dropout", "attn_pdrop")  # their names in configs


def start_accelerator(
    *,
    gradient_accumulation_steps: int = 1,
    per_device_train_batch_size: int = 1,
    max_grad_norm: float = 0.0,
    skips_updates: bool = False,
    needs_whole_matrices: bool = False,
    gradient_checkpointing: bool = False,
    **arguments: Any,
) -> Accelerator:
    """An `Accelerator` with as many processes as were launched, sharded as the accelerate file says.

    accelerate itself continues with less: on some machines it starts several workers that each run alone (several
    trainings in one output folder), or one process instead of several, or does not shard the model. All of this is
    refused here, and so is anything that our checkpoints cannot hold. On a machine without accelerators DDP, FSDP2 and
    DeepSpeed run on the CPU, over gloo.

    DeepSpeed takes the optimizer's steps itself and needs two numbers of the loop: the rows of a forward pass and the
    longest gradient (0: any). A loop that decides between the gradient and the update (`skips_updates`), or whose
    optimizer needs whole matrices (`needs_whole_matrices`, for Muon), cannot use it. `arguments` go to `Accelerator`.

    Raises:
        ValueError: the run would differ from what was launched, or could not be saved.
    """
    check_precision()
    sharding = _sharding_asked_for()
    _refuse_one_process_for_several()
    _check_mesh()
    on_cpu = not _has_accelerators()
    group = InitProcessGroupKwargs(timeout=TIMEOUT)
    if sharding == "DeepSpeed" and on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        group.backend = "gloo"
        on_cpu = False  # with cpu=True accelerate would ignore DeepSpeed; it finds the CPU by itself
    elif sharding == "FSDP" and on_cpu:
        _allow_sharding_on_cpu(group)
    arguments["log_with"] = _trackers(arguments.get("log_with"))
    accelerator = Accelerator(
        cpu=on_cpu,
        gradient_accumulation_steps=gradient_accumulation_steps,
        kwargs_handlers=[group],
        **arguments,
    )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    if (launched := _num_launched()) != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate runs as {accelerator.num_processes}: they would train "
            "apart. Use an accelerate file that fits this machine: accelerate_configs/multi_cpu.yaml for several "
            "processes on the CPU, cpu.yaml for one."
        )
    _check_sharding(accelerator, sharding)
    if accelerator.gradient_accumulation_steps != gradient_accumulation_steps:
        raise ValueError(
            f"The accelerate file (or ACCELERATE_GRADIENT_ACCUMULATION_STEPS) says gradient_accumulation_steps="
            f"{accelerator.gradient_accumulation_steps}, the recipe {gradient_accumulation_steps}. Take it out of the "
            "accelerate file: it is the recipe's option."
        )
    if accelerator.is_fsdp2 and gradient_checkpointing and accelerator.state.fsdp_plugin.activation_checkpointing:
        raise ValueError(
            "gradient_checkpointing and fsdp_activation_checkpointing of the accelerate file do the same: activations "
            "would be computed three times. Set fsdp_activation_checkpointing: false."
        )
    if accelerator.is_fsdp2 and (policy := accelerator.state.fsdp_plugin.mixed_precision_policy) is not None:
        # accelerate would also add up the processes' gradients in half precision, and round the loss to its 3 digits.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if skips_updates:
            raise ValueError(
                "skip_spikes decides between the gradient and the update, and DeepSpeed takes both at once. Leave it "
                "out, or shard with accelerate_configs/fsdp2.yaml."
            )
        if needs_whole_matrices:
            raise ValueError(
                "Muon makes whole matrices orthogonal, and DeepSpeed gives an optimizer pieces of them. Shard with "
                "accelerate_configs/fsdp2.yaml, or give optimizer=adamw."
            )
        zero.configure(accelerator, rows_per_device=per_device_train_batch_size, max_grad_norm=max_grad_norm)
    return accelerator


def check_precision() -> None:
    """Reject a precision that this machine does not have: accelerate would silently compute in float32 on a CPU.

    Raises:
        ValueError: `accelerate launch` was told fp16 or fp8, and there is no accelerator, or bf16, and the GPU has
            none: products would be emulated, many times slower.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    is_gpu = torch.cuda.is_available() and not _is_set("ACCELERATE_USE_CPU")
    if precision == "bf16" and is_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"accelerate was launched with mixed_precision bf16, and {torch.cuda.get_device_name()} has no bfloat16: "
            "that begins with NVIDIA's Ampere. Launch with --mixed_precision fp16."
        )
    if precision in ("fp16", "fp8") and not torch.accelerator.is_available():
        raise ValueError(
            f"accelerate was launched with mixed_precision {precision}, which needs an accelerator, and there is none "
            "here. Launch with --mixed_precision bf16 where the CPU has instructions for it, else with "
            "--mixed_precision no."
        )


def _trackers(log_with: list[str] | None) -> list[str] | None:
    """The requested trackers; accelerate itself would silently leave out one that is not installed."""
    names = [name for name in log_with or [] if name != "none"]
    known = {str(name) for name in LoggerType}
    for name in names:
        if name not in known:
            raise ValueError(f"report_to={name}: it is one of {', '.join(sorted(known))} or none.")
        if name != "all" and name not in map(str, get_available_trackers()):
            raise ValueError(f"report_to={name}: its package is not installed here. Install it, or leave it out.")
    return names or None


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() == "true"


def _sharding_asked_for() -> str | None:
    """The requested sharding, from the launcher's environment; kinds that our checkpoints cannot hold are refused."""
    if _is_set("ACCELERATE_USE_MEGATRON_LM"):
        raise ValueError(
            "distributed_type: MEGATRON_LM rewrites the model in a way that our checkpoints cannot hold. Use "
            "accelerate_configs/fsdp2.yaml, which shards parameters, gradients and the optimizer's state."
        )
    if _is_set("ACCELERATE_USE_FSDP"):
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise ValueError(
                "The accelerate file asks for FSDP1, which is accelerate's default, and whose flattened parameters our "
                "checkpoints cannot hold. Set fsdp_version: 2 in its fsdp_config, or use accelerate_configs/fsdp2.yaml."
            )
        return "FSDP"
    return "DeepSpeed" if _is_set("ACCELERATE_USE_DEEPSPEED") else None


def _refuse_one_process_for_several() -> None:
    """Refuse a launch of one process where several were requested; MASTER_ADDR shows accelerate's plain launcher."""
    is_plain = "ACCELERATE_USE_CPU" in os.environ and "MASTER_ADDR" in os.environ
    sizes = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # torchrun's, three MPIs'
    if is_plain and not any(name in os.environ for name in sizes):
        raise ValueError(
            "Several processes were asked for, but accelerate has started this one only, as it does with --cpu and "
            "with distributed_type: MULTI_CPU or NO. Use accelerate_configs/multi_cpu.yaml for several processes on "
            "the CPU, ddp.yaml for several GPUs. (If you want one process, set num_processes: 1 and unset MASTER_ADDR.)"
        )


def _check_mesh() -> None:
    """Refuse a mesh that does not fit the launch, for which accelerate only has an error from inside torch."""
    if not _is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):
        return
    sizes = ParallelismConfig()  # from the environment
    if sizes.non_data_parallel_size > 1:
        raise ValueError(
            "The accelerate file asks for tensor, context or sequence parallelism, whose processes share their rows; "
            "in this loop each process reads its own. Set parallelism_config's tp_size, cp_size and sp_size to 1."
        )
    if sizes.total_size != _num_launched():
        raise ValueError(
            f"{_num_launched()} processes were launched for {sizes.dp_replicate_size} groups of {sizes.dp_shard_size}: "
            f"that takes {sizes.total_size}. Launch as many by --num_processes, or other groups by "
            "--parallelism_config_dp_replicate_size and --parallelism_config_dp_shard_size."
        )


def _num_launched() -> int:
    return int(os.environ.get("WORLD_SIZE") or 1)


def _has_accelerators() -> bool:
    """Whether there is an accelerator for each process that runs here, to be used; an Apple GPU serves one only."""
    if not torch.accelerator.is_available() or _is_set("ACCELERATE_USE_CPU"):
        return False
    if torch.accelerator.current_accelerator().type == "mps":
        return _num_launched() == 1
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
    if here > (found := torch.accelerator.device_count()):
        raise ValueError(
            f"{here} processes were launched on a machine with {found} accelerators, and each needs its own. Launch "
            f"with --num_processes {found} (times the machines), or with accelerate_configs/multi_cpu.yaml for the CPU."
        )
    return True


def _allow_sharding_on_cpu(group: InitProcessGroupKwargs) -> None:
    """Make accelerate treat processes on the CPU as several GPUs, because otherwise it ignores FSDP.

    This is the only use of a private name of accelerate, and only on machines without accelerators.
    """
    state = PartialState(cpu=True, **group.to_kwargs())
    if state.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def _check_sharding(accelerator: Accelerator, asked: str | None) -> None:
    kind = accelerator.distributed_type
    active = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}.get(kind)
    if asked is not None and asked != active:
        raise ValueError(
            f"{asked} was asked for, but accelerate runs as {kind.value} and would keep the model whole. Start the "
            "recipe by `accelerate launch --config_file ...`, with accelerate_configs/ddp.yaml for whole models."
        )


def describe_sharding(accelerator: Accelerator) -> str:
    """How several processes share the model: "DDP", "FSDP2", "HSDP 2 x 4", "ZeRO-3"; "" for a single process."""
    if accelerator.distributed_type == DistributedType.NO:
        return ""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"ZeRO-{accelerator.deepspeed_plugin.deepspeed_config['zero_optimization']['stage']}"
    if not accelerator.is_fsdp2:
        return "DDP"
    sizes = accelerator.parallelism_config
    is_hybrid = sizes is not None and sizes.dp_replicate_size > 1
    return f"HSDP {sizes.dp_replicate_size} x {sizes.dp_shard_size}" if is_hybrid else "FSDP2"


@contextlib.contextmanager
def leaving_at_once(accelerator: Accelerator) -> Iterator[None]:
    """If the block fails in a run of several processes, end this process without Python's cleanup.

    gloo and DeepSpeed may still use what Python cleans up at its end: sometimes such a process never ends, and the
    launcher waits for it instead of ending the others and the job.
    """
    try:
        yield
    except BaseException as error:
        if accelerator.num_processes > 1:
            # the errors for which hfllm.cli.arguments.run exits with 2
            is_check = isinstance(error, (ValueError, OSError, RuntimeError, FloatingPointError))
            code = error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 2 if is_check else 1
            atexit.register(_leave, code)
        raise


def _leave(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def clip_gradient(accelerator: Accelerator, model: torch.nn.Module, max_norm: float) -> torch.Tensor:
    """Clip the gradient to `max_norm`; returns the norm before, of the whole model, on every process's device."""
    norm = torch.as_tensor(accelerator.clip_grad_norm_(model.parameters(), max_norm), device=accelerator.device)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm  # the sum over shards


def choose_attention(model: PreTrainedModel, device: torch.device) -> str:
    """The attention that trains packed documents fastest on a device: by blocks on an NVIDIA or AMD GPU, else SDPA.

    With a mask of packed documents, SDPA has only its slower kernels, and computes what the mask hides; flex attention
    (https://arxiv.org/abs/2412.05496) leaves out blocks that are hidden. It has no dropout.
    """
    takes_blocks = getattr(model, "_supports_flex_attn", False) and not has_attention_dropout(model.config)
    return "flex_attention" if device.type == "cuda" and takes_blocks else model.config._attn_implementation


def check_attention(name: str | None, device: torch.device) -> None:
    """Refuse an attention that was asked for and cannot train on the device.

    Raises:
        ValueError: flex attention on a CPU, where torch has no backward pass for it.
    """
    if name == "flex_attention" and device.type == "cpu":
        raise ValueError(
            "attn_implementation=flex_attention has no backward pass on a CPU. Leave it out, or give sdpa."
        )


def has_attention_dropout(config: PreTrainedConfig) -> bool:
    return any(getattr(config, name, 0) for name in ATTENTION_DROPOUTS)


def dtype_of(accelerator: Accelerator) -> torch.dtype:
    """The dtype in which products are computed; of fp8 the one that is around it."""
    return {"no": torch.float32, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.bfloat16)


def keep_freed_memory(keep: bool = True) -> None:
    """Have glibc's allocator keep the memory that a step frees for the next one, instead of returning it to the system.

    Otherwise large tensors come from fresh pages, each of which the system clears: 74,000 page faults in a step of 6
    layers of 384 (8 rows of 256, float32, 2 cores). Without them the step is 1.13 to 1.15 times as fast, and the
    process holds some 6 % more memory. On systems other than Linux with glibc this does nothing. `keep=False` restores
    glibc's defaults.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_max = -1, -4  # the parameters' numbers in malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0 if keep else 65536)
        libc.mallopt(trim_threshold, 2**31 - 1 if keep else 128 * 1024)
