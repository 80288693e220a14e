"""The processes of a run: accelerate, on the devices that the launcher was told of, or not at all."""

import contextlib
import ctypes
import os
import platform
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list


def start_accelerator(**arguments: Any) -> Accelerator:
    """An `Accelerator`, after a check that it took what was launched.

    On a machine without an accelerator some of accelerate's configurations start several workers of which each believes
    to be the only one: as many trainings, in one output folder, and no word of it. That is refused here.

    Raises:
        ValueError: accelerate runs as another number of processes than were launched.
    """
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), **arguments)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate runs as {accelerator.num_processes}: they would train "
            "apart. Use an accelerate file that fits this machine, for example accelerate_configs/cpu.yaml."
        )
    return accelerator


def keep_freed_memory(keep: bool = True) -> None:
    """Have glibc's allocator keep what a step frees for the next one, instead of handing it back to the system.

    Large tensors come from fresh pages otherwise, and the system clears each page again: 74,000 page faults in a step
    of 6 layers of 384 (8 rows of 256, float32, 2 cores). Without them the step is 1.13 to 1.15 times as fast, and the
    process holds some 6 % more memory. Elsewhere than on Linux with glibc this does nothing. `keep=False` goes back to
    glibc's defaults.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_max = -1, -4  # the parameters' numbers in malloc.h
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0 if keep else 65536)
        libc.mallopt(trim_threshold, 2**31 - 1 if keep else 128 * 1024)


def on_main_process(accelerator: Accelerator | None, function: Callable[[], Any]) -> Any:
    """What `function` returns on the main process, for every process; if it fails there, none is left waiting."""
    result, error = None, None
    if accelerator is None or accelerator.is_main_process:
        try:
            result = function()
        except Exception as caught:
            error = caught
    if accelerator is not None and accelerator.num_processes > 1:
        message = None if error is None else f"{type(error).__name__} in the main process: {error}"
        result, message = broadcast_object_list([result, message])
        if message is not None and error is None:
            raise RuntimeError(message)
    if error is not None:
        raise error
    return result
