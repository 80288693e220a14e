"""How fast a run goes: tokens per second, and which share of the machine's arithmetic they use."""

import contextlib
import functools
import inspect
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn


def flops_per_token(model: nn.Module, *, block_size: int) -> int:
    """Floating-point operations that training spends on one token, forward and backward.

    6 for each weight that multiplies (one multiplication and one addition forward, twice that backward) and
    12 * layers * heads * head_dim * block_size for the attention scores and their values: the estimate of PaLM's
    appendix B (https://arxiv.org/abs/2204.02311), which nanoGPT and most papers use. By that convention the attention
    counts whole, although half of it is masked. Looking up an embedding costs nothing; the head counts, tied or not.
    `model` is a bare transformers model; what gradient checkpointing computes twice counts once.
    """
    config = model.config
    weights = {
        id(parameter): parameter.numel()
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim >= 2
    }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * block_size
    return 6 * sum(weights.values()) + attention


@functools.cache
def peak_flops(device: torch.device | str, dtype: torch.dtype = torch.float32) -> float:
    """Multiplications and additions a second that `device` reaches on large square matrices.

    Measured, not read from a data sheet, once per process: the best of several products within about a third of a
    second, with the threads and the float32 precision (TF32 or not) set at that time. A model's MFU is its own rate
    divided by this one; against a data sheet's number it would come out lower.
    """
    device = torch.device(device)
    size = 1024 if device.type == "cpu" else 8192
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    best = float("inf")
    end = None
    while end is None or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        left @ right
        synchronize(device)
        stop = time.perf_counter()
        if end is None:
            end = stop + 0.3  # the first product loads kernels and wakes threads: it does not count
        else:
            best = min(best, stop - start)
    return 2 * size**3 / best


def compile_blocks(model: nn.Module) -> None:
    """Compile each block of the model, or the whole of one that does not name its blocks, in place."""
    blocks = [
        module
        for module in model.modules()
        if type(module).__name__ in (getattr(model, "_no_split_modules", None) or [])
    ]
    for module in blocks or [model]:  # one graph serves all blocks, so it is compiled once
        module.compile()


def loss_options(model: nn.Module) -> dict[str, bool]:
    """What a bare model's forward is given to return the loss alone: ours then never has all logits at once."""
    return {"skip_logits": True} if "skip_logits" in inspect.signature(model.forward).parameters else {}


def multiplies_bfloat16(device: torch.device | str) -> bool:
    """Whether `device` has instructions for products of bfloat16; where a CPU has not, float32 is the faster one."""
    if torch.device(device).type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def peak_memory_bytes(device: torch.device | str) -> int:
    """The most memory this process has held so far: the tensors on an accelerator, or everything on a CPU."""
    device = torch.device(device)
    if device.type not in ("cpu", "mps"):
        return torch.accelerator.max_memory_allocated(device)
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


class ThroughputMeter:
    """Tokens per second of training alone: without the first steps, which compile, and without what is paused.

    The accelerator works on while Python runs ahead, so the meter waits for it where it reads the clock: once after the
    warm-up, and in `read` and `paused`; never in an ordinary step.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        *,
        num_warmup_steps: int = 1,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self.device = torch.device(device)
        self.clock = clock
        self.steps_to_skip = num_warmup_steps
        self.started = self.last_read = self._now()  # until the warm-up is over, when they are set anew
        self.num_tokens = self.num_tokens_at_read = 0
        self.seconds_paused = self.seconds_paused_since_read = 0.0

    def step(self, num_tokens: int) -> None:
        """Count a finished step of `num_tokens`, those of all processes."""
        if self.steps_to_skip > 0:
            self.steps_to_skip -= 1
            if self.steps_to_skip == 0:
                self.started = self.last_read = self._now()
        else:
            self.num_tokens += num_tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep what happens inside, an evaluation or a save, out of the rates."""
        start = self._now()
        try:
            yield
        finally:
            if self.steps_to_skip == 0:
                seconds = self._now() - start
                self.seconds_paused += seconds
                self.seconds_paused_since_read += seconds

    def read(self) -> float | None:
        """Tokens per second since the last `read`, or None if no step was counted since."""
        if self.num_tokens == self.num_tokens_at_read:
            return None
        now = self._now()
        rate = (self.num_tokens - self.num_tokens_at_read) / (now - self.last_read - self.seconds_paused_since_read)
        self.last_read, self.num_tokens_at_read, self.seconds_paused_since_read = now, self.num_tokens, 0.0
        return rate

    def overall(self) -> float | None:
        """Tokens per second of the whole run, or None before a step was counted."""
        if self.num_tokens == 0:
            return None
        return self.num_tokens / (self._now() - self.started - self.seconds_paused)

    def seconds_left(self, num_tokens: int) -> float | None:
        """How long `num_tokens` more will take if pauses go on as often as they came so far."""
        if self.num_tokens == 0:
            return None
        return num_tokens * (self._now() - self.started) / self.num_tokens

    def _now(self) -> float:
        synchronize(self.device)
        return self.clock()


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given, so that a clock read next is right."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
