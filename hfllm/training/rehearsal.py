"""The memory and time that a run needs, measured in its first steps."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .throughput import peak_memory_bytes, synchronize


class SavedForBackward:
    """The most bytes that a forward pass keeps for its backward pass, without the parameters.

    Hooks on autograd's saved tensors count each storage once, so it is the same on every device.
    """

    def __init__(self, model: nn.Module):
        self.own = {local(tensor).untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self.saved: dict[int, torch.UntypedStorage] = {}
        self.largest = 0

    def counting(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context for forward passes; their backward passes end the count of each."""
        return torch.autograd.graph.saved_tensors_hooks(self._keep, self._take)

    def _keep(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = local(tensor).untyped_storage()
        if storage._cdata not in self.own:
            self.saved[storage._cdata] = storage
        return tensor

    def _take(self, tensor: torch.Tensor) -> torch.Tensor:
        # Sizes are read only now: FSDP frees the gathered weights of a block after its forward pass.
        self.largest = max(self.largest, sum(storage.nbytes() for storage in self.saved.values()))
        self.saved.clear()  # backward has begun: tensors saved from now on belong to the next forward pass
        return tensor


@dataclass(frozen=True)
class Rehearsal:
    """Bytes of one process by purpose, its measured peak, and the seconds of an optimizer step."""

    parameters: int
    gradients: int
    optimizer_state: int
    saved_for_backward: int
    peak: int
    seconds_per_step: float

    def __str__(self) -> str:
        parts = {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer state": self.optimizer_state,
            "kept for the backward pass": self.saved_for_backward,
            "measured peak": self.peak,
        }
        lines = [f"  {name:28s} {num_bytes / 2**20:10,.1f} MiB" for name, num_bytes in parts.items()]
        return "\n".join(["Memory of each process:", *lines])


def rehearse(
    model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[int], object], *, num_steps: int = 3
) -> Rehearsal:
    """Take a first step that counts memory and `num_steps` more that are timed; `step(index)` trains as the run will.

    What is kept for the backward pass is that of the largest micro-batch (`SavedForBackward`). The peak is the device's
    own count, or the process's memory on a CPU. Weights and optimizer change: a rehearsal is not part of a run.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper, which takes no hooks
    device = next(model.parameters()).device
    gradients = 0

    def count_gradients(*_: object) -> None:
        nonlocal gradients
        gradients = sum(num_bytes(parameter.grad) for parameter in model.parameters() if parameter.grad is not None)

    handle = optimizer.register_step_pre_hook(count_gradients)
    saved = SavedForBackward(model)
    with saved.counting():
        step(0)
    handle.remove()

    seconds = []
    for index in range(1, num_steps + 1):
        synchronize(device)
        start = time.perf_counter()
        step(index)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return Rehearsal(
        parameters=sum(num_bytes(parameter) for parameter in model.parameters()),
        gradients=gradients,
        optimizer_state=sum(
            num_bytes(value)
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        ),
        saved_for_backward=saved.largest,
        peak=peak_memory_bytes(device),
        seconds_per_step=statistics.median(seconds),
    )


def describe_rehearsal(
    need: Rehearsal,
    *,
    max_steps: int,
    tokens_per_step: int,
    flops_per_token: int,
    learning_rate_at: Callable[[int], float],
    warmup_steps: int,
) -> str:
    """The needs of a run of `max_steps` such steps: memory, disk, time and operations, and its learning rates."""
    minutes = max_steps * need.seconds_per_step / 60
    time = f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:,.1f} hours"
    warm = min(warmup_steps, max_steps - 1)
    steps = sorted({0, warm, *(max_steps * quarter // 4 for quarter in (1, 2, 3)), max_steps - 1})
    return (
        f"{need}\n"
        f"A checkpoint: {(need.parameters + need.optimizer_state) / 2**20:,.1f} MiB, times the number of processes "
        "if the model is sharded.\n"
        f"Time: {need.seconds_per_step:.3f} s a step, {tokens_per_step / need.seconds_per_step:,.0f} tokens/s; "
        f"{max_steps:,} steps take {time} without evaluations, and "
        f"{max_steps * tokens_per_step * flops_per_token:.2e} floating-point operations.\nLearning rate: "
        + ", ".join(f"{learning_rate_at(step):.2e} at step {step:,}" for step in steps)
        + "."
    )


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a sharded tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def num_bytes(tensor: torch.Tensor) -> int:
    return local(tensor).numel() * tensor.element_size()
