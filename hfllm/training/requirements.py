"""The memory and time of a training run, computed without its weights: for a model that does not fit this machine."""

import contextlib
import copy
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..model.kernels_gpt import linear_cross_entropy
from .devices import ATTENTION_DROPOUTS, describe_sharding, has_attention_dropout
from .optimization import hidden_matrices
from .rehearsal import SavedForBackward
from .throughput import loss_options


# Sizes of cards in 1e9 bytes. They have about 5 % more, which is left to CUDA and to fragmentation.
CARDS_GB = (24, 80, 141)
NUM_DEVICES = 8  # of the plans that share a model
USUAL_MFU = 0.4
# On a CPU, a process took 764 MB beyond its imports where its tensors need 570: libraries and the allocator's rest.
HOST_FACTOR = 1.5
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
# DeepSpeed's defaults for ZeRO-3, in numbers: gathered parameters (stage3_max_live_parameters) and the gradients that
# are sent together (reduce_bucket_size).
ZERO_LIVE_PARAMETERS, ZERO_BUCKET = 1_000_000_000, 500_000_000


class Pass(NamedTuple):
    """A forward and a backward pass of one device; the weights are float32 whatever the `dtype` of the computation."""

    num_rows: int
    block_size: int
    dtype: torch.dtype
    gradient_checkpointing: bool


class Plan(NamedTuple):
    """How devices share a model: `sharding` is "" for one device, "DDP", "FSDP2" or "ZeRO-3"."""

    sharding: str
    num_devices: int

    @property
    def is_sharded(self) -> bool:
        return self.sharding in ("FSDP2", "ZeRO-3")

    def __str__(self) -> str:
        return f"{self.sharding} x {self.num_devices}" if self.sharding else "one device"


def plan_of(accelerator: Accelerator) -> Plan:
    """The plan of this launch; of HSDP one group, and ZeRO-2, which keeps whole weights, as DDP."""
    kind = describe_sharding(accelerator)
    if kind.startswith("HSDP"):
        return Plan("FSDP2", accelerator.parallelism_config.dp_shard_size)
    return Plan("DDP" if kind == "ZeRO-2" else kind, accelerator.num_processes)


class Activations(NamedTuple):
    """Bytes of one forward and backward pass, beside weights and gradients.

    Attributes:
        kept: What the forward pass keeps for the backward pass.
        temporary: What the worst moment needs beyond that: with gradient checkpointing, a block's activations.
    """

    kept: int
    temporary: int


@dataclass(frozen=True)
class Requirements:
    """Bytes of one device by purpose.

    Their sum is an upper bound, because gradients come as activations go.
    """

    weights: int
    gradients: int
    optimizer_state: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer_state + self.activations + self.temporary


def build_empty(config: PreTrainedConfig) -> PreTrainedModel:
    """The model with float32 weights that take no memory, on the `meta` device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def require(
    model: PreTrainedModel, activations: Activations, *, plan: Plan, optimizer: str, dtype: torch.dtype
) -> Requirements:
    """The memory of the device that needs the most; `dtype` is the one of the computation, weights are float32.

    `model` may be empty. `activations` are `count_activations` of this model, sharded or not as the plan is.
    """
    sizes = [_shard(parameter, plan) for parameter in model.parameters()]
    num_weights = sum(sizes)
    # ZeRO-3 computes with weights and gradients in `dtype`, and keeps the float32 weights beside them.
    in_dtype = dtype.itemsize if plan.sharding == "ZeRO-3" else 0
    return Requirements(
        weights=num_weights * (4 + in_dtype),
        gradients=num_weights * (in_dtype or 4),
        optimizer_state=_optimizer_state(model, plan=plan, optimizer=optimizer),
        activations=activations.kept,
        temporary=activations.temporary + _exchanged(model, plan, dtype),
    )


def _shard(parameter: torch.Tensor, plan: Plan) -> int:
    """The numbers of a parameter that the first device holds, which has the largest part."""
    if plan.sharding == "FSDP2":  # cut by rows
        rows = parameter.shape[0]
        return -(-rows // plan.num_devices) * (parameter.numel() // rows)
    return -(-parameter.numel() // plan.num_devices) if plan.sharding == "ZeRO-3" else parameter.numel()


def _optimizer_state(model: PreTrainedModel, *, plan: Plan, optimizer: str) -> int:
    """AdamW keeps two means and a step count of each parameter, Muon one momentum of each matrix."""
    matrices = {id(matrix) for matrix in hidden_matrices(model)} if optimizer == "muon" else set()
    return sum(
        4 * _shard(parameter, plan) if id(parameter) in matrices else 8 * _shard(parameter, plan) + 4
        for parameter in model.parameters()
    )


def _exchanged(model: PreTrainedModel, plan: Plan, dtype: torch.dtype) -> int:
    """Weights that are fetched and gradients that are sent at a time."""
    num_parameters = model.num_parameters()
    if plan.sharding == "DDP":
        return 4 * num_parameters  # buckets, which hold every gradient a second time (gradient_as_bucket_view=False)
    if plan.sharding == "ZeRO-3":
        return dtype.itemsize * (min(num_parameters, ZERO_LIVE_PARAMETERS) + min(num_parameters, ZERO_BUCKET))
    if plan.sharding != "FSDP2":
        return 0
    block = max((sum(map(torch.numel, block.parameters())) for block in _blocks(model)), default=0)
    rest = num_parameters - sum(sum(map(torch.numel, block.parameters())) for block in _blocks(model))
    # The rest (embeddings, head) stays, a block computes and the next one is fetched; gradients are sent in float32.
    largest = max(block, rest)
    return dtype.itemsize * (rest + 2 * block + largest) + 4 * largest


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    names = getattr(model, "_no_split_modules", None) or []
    return [module for module in model.modules() if type(module).__name__ in names]


def count_activations(config: PreTrainedConfig, one_pass: Pass, *, is_sharded: bool = False) -> Activations:
    """The memory of activations, counted on tensors without data (torch's FakeTensorMode).

    The model's own code runs with one block and with two, and each further block adds as much as the second. It is the
    code for accelerators, not our routines for CPUs, but attention is a CPU's, which holds all scores if it has dropout
    (see `count_on_cards`). A sharded model computes in the pass's dtype throughout, and has all logits at once.
    """
    config, num_blocks, counts = copy.deepcopy(config), config.num_hidden_layers, []
    for config.num_hidden_layers in (1, 2):
        counts.append(_count(config, one_pass, is_sharded))
    (kept, peak), (kept_by_two, _) = counts
    return Activations(kept + (num_blocks - 1) * (kept_by_two - kept), peak - kept)


def count_on_cards(config: PreTrainedConfig, one_pass: Pass) -> dict[bool, Activations]:
    """`count_activations` by whether the model is sharded, with an accelerator's attention.

    It keeps no scores, with dropout neither.
    """
    config = copy.deepcopy(config)
    for name in ATTENTION_DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    return {is_sharded: count_activations(config, one_pass, is_sharded=is_sharded) for is_sharded in (False, True)}


def _count(config: PreTrainedConfig, one_pass: Pass, is_sharded: bool) -> tuple[int, int]:
    """What the forward pass keeps, and the peak of forward and backward."""
    num_rows, block_size, dtype, gradient_checkpointing = one_pass
    with FakeTensorMode():
        own = {"dtype": dtype if is_sharded else torch.float32, "attn_implementation": "sdpa"}
        model = AutoModelForCausalLM.from_config(config, **own).train()
        if gradient_checkpointing:
            model.activation_checkpointing_enable()
        rows = torch.zeros(num_rows, block_size, dtype=torch.long)
        batch = {"input_ids": rows, "position_ids": torch.arange(block_size).expand(num_rows, -1), "use_cache": False}
        saved = SavedForBackward(model)
        with _LiveMemory(model) as memory:
            with saved.counting(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                if loss_options(model) and not is_sharded and config.final_logit_softcapping is None:
                    # The loss in pieces, which the model itself takes on real tensors only.
                    hidden_states = model.base_model(**batch).last_hidden_state
                    loss = linear_cross_entropy(hidden_states, model.get_output_embeddings().weight, rows)
                else:
                    loss = model(**batch, labels=rows, shift_labels=rows).loss
            loss.backward()
    return saved.largest, memory.peak


class _LiveMemory(TorchDispatchMode):
    """The peak of the bytes of all tensors made in the block, without the gradients of the model's parameters."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.parameters = list(model.parameters())
        self.own = {tensor.untyped_storage()._cdata for tensor in (*self.parameters, *model.buffers())}
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        found = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        gradients = {gradient.untyped_storage()._cdata for gradient in found}
        self.peak = max(self.peak, sum(size for key, size in self.live.items() if key not in gradients))
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.live and key not in self.own:
            self.live[key] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, key, None).atexit = False


def describe_requirements(model: PreTrainedModel, activations: Mapping[bool, Activations], one_pass: Pass) -> str:
    """A table of each device's memory by plan and optimizer, and of the cards that have it; see `count_on_cards`."""
    needs = {}
    for plan in [Plan("", 1), *(Plan(sharding, NUM_DEVICES) for sharding in ("DDP", "FSDP2", "ZeRO-3"))]:
        own = {"plan": plan, "dtype": one_pass.dtype}
        for optimizer in OPTIMIZERS if plan.sharding != "ZeRO-3" else ("adamw",):  # it cuts the matrices of Muon
            need = require(model, activations[plan.is_sharded], optimizer=optimizer, **own)
            needs[f"{plan}, {OPTIMIZERS[optimizer]}"] = need

    titles = ("weights", "gradients", "optimizer", "activations", "temporary", "together")
    heads = [f"{title:>12s}" for title in titles] + [f"{f'{card} GB':>8s}" for card in CARDS_GB]
    unit, name = (2**30, "GiB") if any(need.total >= 2**30 for need in needs.values()) else (2**20, "MiB")
    lines = [
        f"Memory of each device in {name}, and whether a card has it: {one_pass.num_rows:,} rows of "
        f"{one_pass.block_size:,} tokens in a forward pass, {str(one_pass.dtype).removeprefix('torch.')}, "
        f"{'with' if one_pass.gradient_checkpointing else 'without'} gradient checkpointing.",
        f"  {'':18s}{''.join(heads)}",
    ]
    for words, need in needs.items():
        parts = (need.weights, need.gradients, need.optimizer_state, need.activations, need.temporary, need.total)
        cells = [f"{part / unit:12,.2f}" for part in parts]
        cells += [f"{'yes' if need.total <= card * 1e9 else 'no':>8s}" for card in CARDS_GB]
        lines.append(f"  {words:18s}{''.join(cells)}")
    return "\n".join(lines)


def describe_rate(num_tokens: int, flops_per_token: int, *, flops_per_second: float, source: str) -> str:
    """The hours of training on one device of this speed and on NUM_DEVICES, and the `source` of the speed."""
    hours = num_tokens * flops_per_token / flops_per_second / 3600
    return (
        f"Time: {num_tokens:,} tokens are {num_tokens * flops_per_token:.2e} floating-point operations. At {source}, "
        f"one device takes {hours:,.1f} hours and {NUM_DEVICES} take {hours / NUM_DEVICES:,.1f}, without evaluations "
        "and without waiting for each other."
    )


def missing_memory(
    model: PreTrainedModel,
    activations: Mapping[bool, Activations],
    one_pass: Pass,
    *,
    optimizer: str,
    accelerator: Accelerator,
) -> tuple[int, int] | None:
    """The bytes that the run needs here and those that are free, if these are fewer; None if the run fits.

    Every process gets the same answer. On a CPU it is the memory of all processes of this machine, with HOST_FACTOR.
    """
    plan, device = plan_of(accelerator), accelerator.device
    on_host = device.type in ("cpu", "mps")
    own = activations[plan.is_sharded]
    if on_host and has_attention_dropout(model.config):
        own = count_activations(model.config, one_pass, is_sharded=plan.is_sharded)
    need = require(model, own, plan=plan, optimizer=optimizer, dtype=one_pass.dtype).total
    weights = 4 * model.num_parameters()  # each process makes them whole, on the host
    num_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    pairs = [(num_here * (int(HOST_FACTOR * need) if on_host else weights), _free_memory())]
    if not on_host:
        pairs.append((need, torch.accelerator.get_memory_info(device)[0]))
    lacking = [pair for pairs in gather_object([pairs]) for pair in pairs if pair[0] > pair[1]]
    return max(lacking, key=lambda pair: pair[0] - pair[1], default=None)


def _free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its control group (a container, a job of Slurm)."""
    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):
        group = Path("/proc/self/cgroup").read_text(encoding="ascii").strip().removeprefix("0::/")
        folder = Path("/sys/fs/cgroup") / group
        limit, used = (int((folder / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return free
