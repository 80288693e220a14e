"""The memory that training needs, measured in a separate process."""

import contextlib
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .devices import keep_freed_memory
from .optimization import build_adamw
from .throughput import loss_options, peak_memory_bytes


def training_memory(
    config: PreTrainedConfig,
    *,
    num_rows: int,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    keeps_freed_memory: bool = False,
    num_steps: int = 3,
) -> int:
    """Peak bytes of AdamW steps on a model of this config, beyond what the imports hold.

    These are weights, gradients, the optimizer's state, the tensors kept for the backward pass, and the libraries' own
    memory. A new process builds the model and takes the steps on random rows, so that no memory freed earlier is
    reused. On a CPU it is the growth of the process's resident memory, on an accelerator the tensors' memory.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        options = (num_rows, block_size, dtype, keeps_freed_memory, num_steps, torch.get_num_threads())
        return pool.submit(_train, config, *options).result()


def _train(
    config: PreTrainedConfig,
    num_rows: int,
    block_size: int,
    dtype: torch.dtype,
    keeps_freed_memory: bool,
    num_steps: int,
    num_threads: int,
) -> int:
    torch.set_num_threads(num_threads)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None
    if device.type == "cpu" and keeps_freed_memory:
        keep_freed_memory()
    before = _resident_now() if device.type == "cpu" else 0
    model = AutoModelForCausalLM.from_config(config).to(device).train()
    optimizer = build_adamw(model, learning_rate=1e-4, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-8)
    rows = torch.randint(config.vocab_size, (num_rows, block_size + 1), device=device)
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    batch = {"input_ids": inputs, "labels": inputs, "shift_labels": targets, **loss_options(model)}
    for _ in range(num_steps):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (_resident_peak() if device.type == "cpu" else peak_memory_bytes(device)) - before


def _resident_now() -> int:
    """The bytes the process holds; where Linux allows it, the peak is reset to them."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): resets VmHWM to the present size
    return psutil.Process().memory_info().rss


def _resident_peak() -> int:
    """The peak bytes of the process. (On Linux, getrusage's peak includes the parent process's.)"""
    status = Path("/proc/self/status")
    if not status.exists():
        return peak_memory_bytes("cpu")
    [kibibytes] = re.findall(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))
    return 1024 * int(kibibytes)
