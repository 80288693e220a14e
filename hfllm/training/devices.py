"""The processes of a run: accelerate, on the devices that the launcher was told of, or not at all."""

import os
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
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched, but accelerate runs as {accelerator.num_processes}: they would train "
            "apart. Use an accelerate file that fits this machine, for example accelerate_configs/cpu.yaml."
        )
    return accelerator


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
