"""Training speed: tokens per second, and the share of the machine's peak (MFU)."""

import contextlib
import functools
import inspect
import re
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn


# A CPU's instructions for products in a dtype, by torch's names; any one of them is enough.
CPU_INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16"),
}


def flops_per_token(model: nn.Module, *, block_size: int) -> int:
    """Floating-point operations of training on one token, forward and backward.

    6 for each weight of a matrix product (one multiplication and one addition forward, twice that backward) and 12 *
    layers * heads * head_dim * block_size for the attention scores and their values: the estimate of PaLM's appendix B
    (https://arxiv.org/abs/2204.02311), which nanoGPT and most papers use. By that convention all of the attention
    counts, although half of it is masked. An embedding lookup counts as nothing; the head counts, tied or not. `model`
    is a bare transformers model. Activations that gradient checkpointing computes twice count once.
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
    """Floating-point operations per second that `device` reaches on large square matrices.

    Measured once per process, not read from a data sheet: the best of several products within about a third of a
    second, with the threads and the float32 precision (TF32 or not) set at that time. A model's MFU is its own rate
    divided by this one; with a data sheet's number it would be lower.
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
            end = stop + 0.3  # the first product is not counted, because it also loads kernels and starts threads
        else:
            best = min(best, stop - start)
    return 2 * size**3 / best


# Dense bfloat16 products, floating-point operations per second by the makers' data sheets; the name is torch's.
DATA_SHEET_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def data_sheet_flops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """The data sheet's peak of a GPU for products in bfloat16 or float16; None where it is not listed here."""
    if torch.device(device).type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    is_other = " NVL" in name  # slower, and under the same names
    known = (peak for known, peak in DATA_SHEET_FLOPS.items() if re.match(rf"{known}\b", name) and not is_other)
    return next(known, None)


def compile_model(model: nn.Module) -> None:
    """Compile the model in place for training: each block, or the whole if it does not name them; on a GPU the loss.

    On a CPU the compiled loss would be no faster.
    """
    blocks = [
        module
        for module in model.modules()
        if type(module).__name__ in (getattr(model, "_no_split_modules", None) or [])
    ]
    for module in blocks or [model]:  # one graph serves all blocks, so it is compiled once
        module.compile()
    if torch.cuda.is_available() and hasattr(model, "cross_entropy_of_rows"):
        model.cross_entropy_of_rows = torch.compile(model.cross_entropy_of_rows, dynamic=False)


def loss_options(model: nn.Module) -> dict[str, bool]:
    """Options of the model's forward that make it return the loss alone, so that it never holds all logits at once."""
    return {"skip_logits": True} if "skip_logits" in inspect.signature(model.forward).parameters else {}


def multiplies_fast(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether `device` has instructions for products in `dtype`; on a CPU without them, float32 is faster."""
    if torch.device(device).type != "cpu" or dtype not in CPU_INSTRUCTIONS:
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in CPU_INSTRUCTIONS[dtype])


def share_of_peak(flops_per_second: float, peak: float | None) -> float | None:
    """A rate divided by the measured peak (MFU); None without a peak, or if the rate is above the peak.

    If another program used the machine while the peak was measured, the peak is too low, and a share of it means
    nothing.
    """
    if peak is None or flops_per_second > peak:
        return None
    return flops_per_second / peak


def peak_memory_bytes(device: torch.device | str) -> int:
    """The peak memory of this process so far: its tensors on an accelerator, or everything on a CPU."""
    device = torch.device(device)
    if device.type not in ("cpu", "mps"):
        return torch.accelerator.max_memory_allocated(device)
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


class ThroughputMeter:
    """Tokens per second of training alone, without the first steps, which compile, and without pauses.

    Python runs ahead of an accelerator, so the meter waits for the accelerator whenever it reads the clock: once after
    the warm-up, and in `read` and `paused`, but never in an ordinary step.
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
        self.started = self.last_read = self._now()  # set again when the warm-up is over
        self.num_tokens = self.num_tokens_at_read = 0
        self.seconds_paused = self.seconds_paused_since_read = 0.0

    def step(self, num_tokens: int) -> None:
        """Count a finished step of `num_tokens` in all processes together."""
        if self.steps_to_skip > 0:
            self.steps_to_skip -= 1
            if self.steps_to_skip == 0:
                self.started = self.last_read = self._now()
        else:
            self.num_tokens += num_tokens

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block, such as an evaluation or a save, from the rates."""
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

    def _now(self) -> float:
        synchronize(self.device)
        return self.clock()


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has finished its work, so that a clock that is read next is right."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
