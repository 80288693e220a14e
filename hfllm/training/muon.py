"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): updates by orthogonalized momentum.

A matrix's gradient is mostly a few large directions, and AdamW's update follows them. Muon replaces the singular values
of the momentum by ones: every direction moves equally, which reaches the same loss with a fraction of the tokens. It is
for the matrices between hidden states. Embeddings, the head, norms, biases and learned positions take AdamW's steps, in
the same optimizer, so that one object is scheduled, saved and resumed.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.adamw import adamw

from .sharing import Grid, SharedStack, grid_of, local_part, overlap


# An odd polynomial ax + bx^3 + cx^5 that moves singular values in (0, 1] towards 1, steepest at 0 (Jordan et al. 2024).
# After four iterations, those above 0.0052 are between 0.68 and 1.21; a fifth would reach down to 0.0016, takes a
# quarter more time and trains no better (docs/measurements/log.md, "Iterations in Muon").
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 4
STACK_NUMBERS = 1 << 26  # numbers orthogonalised at a time, so that a large model's stacks do not fill the memory


class Muon(torch.optim.Optimizer):
    """Groups with `"orthogonal": True` take Muon's step, all others that of `torch.optim.AdamW`.

    The update of a matrix of R rows and C columns is lr * sqrt(max(1, R / C)) times an orthogonal one: a layer's output
    then changes by about the same amount at every width, and a learning rate found on a small model suits a wider one.
    Weight decay is decoupled: lr * weight_decay of a parameter is subtracted. The state of a matrix is its
    `momentum_buffer`, of anything else AdamW's.

    A `momentum` of 0.85 ended lower than 0.95, the usual one, in runs of 80 to 1,200 steps of 768 to 1,024 tokens
    (docs/measurements/log.md). In 1,400 steps of 2,048 tokens seeds differed more than
    these momenta; longer runs and larger batches were not tried.

    Matrices are made orthogonal in `dtype`; unless it is given, in float32 on a CPU and in bfloat16 elsewhere. The
    iteration tolerates bfloat16's rounding. It takes three tenths of a step's time for 6 layers of 384 and 2,048
    tokens, in float32 on one core, nearly all of it in matrix products.

    Several processes share the work: each makes some of the matrices orthogonal, whole, and all get the results
    (`SharedStack`). For parameters sharded by rows (FSDP2, HSDP), these are the processes of the parameter's own mesh.
    For all others they are those of `process_group`, which must have the same parameters and gradients, as under DDP;
    without it, each process does the whole work and waits for no other. The state does not depend on who does what: a
    momentum is whole or sharded as its parameter is.

    The processes of a group must take each step together. A gradient that is missing in some of them never makes the
    others wait: a matrix becomes NaN where it has a gradient and its owner, who makes it orthogonal, has none.

    Like torch's fused optimizers it takes `found_inf` and `grad_scale` from a GradScaler (float16): a step whose
    `found_inf`, a tensor on the device, is not 0 changes nothing, and Python does not wait to know it.
    """

    _step_supports_amp_scaling = True  # the name that torch's GradScaler asks for

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float = 0.02,
        momentum: float = 0.85,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        dtype: torch.dtype | None = None,
        process_group: ProcessGroup | None = None,
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(groups, {**defaults, "orthogonal": False})
        self.dtype = dtype
        self.process_group = process_group
        for group in self.param_groups:
            for parameter in group["params"] if group["orthogonal"] else []:
                if parameter.ndim != 2:
                    raise ValueError(
                        f"Only matrices can be made orthogonal; here is a parameter of shape {tuple(parameter.shape)}. "
                        'Put it into a group without "orthogonal".'
                    )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, grad_scale = (getattr(self, name, None) for name in ("found_inf", "grad_scale"))
        if found_inf is not None and found_inf.device.type == "cpu":
            if found_inf:
                return loss
            found_inf = None
        overlap(self._tasks(found_inf, grad_scale))
        return loss

    def _tasks(self, found_inf: torch.Tensor | None, grad_scale: torch.Tensor | None) -> Iterator[Iterator[None]]:
        """One task for each stack; groups of AdamW take their step while the stacks before them are on their way."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters if grad_scale is not None else []:
                local_part(parameter.grad).div_(grad_scale)
            if group["orthogonal"]:
                for grid, stack in _stacks(group["params"], self.process_group):
                    yield self._step_orthogonal(group, stack, grid, found_inf)
            elif parameters:
                self._step_adamw(group, parameters, found_inf)

    def _step_orthogonal(
        self, group: dict[str, Any], stack: list[nn.Parameter], grid: Grid | None, found_inf: torch.Tensor | None
    ) -> Iterator[None]:
        """Muon's step for matrices of one shape; yields while numbers are on their way between processes."""
        momentum = group["momentum"]
        for parameter in stack:
            self._update_momentum(parameter, momentum, found_inf)
        if grid is None:
            momenta = [_gather(self._nesterov(parameter, momentum, found_inf), parameter) for parameter in stack]
            results = orthogonalize(momenta, self.dtype)
            updates = [_part(result, parameter) for parameter, result in zip(stack, results)]
        else:
            shared = SharedStack(stack, grid, dtype=self.dtype or default_dtype(stack[0].device))
            parts = [self._nesterov(parameter, momentum, found_inf) for parameter in shared.of_replica]
            momenta = yield from shared.collect(parts)
            results = orthogonalize(momenta, self.dtype) if momenta else []
            updates = yield from shared.distribute(results)
        for parameter, update in zip(stack, updates, strict=True):
            if parameter.grad is None:
                continue
            rows, columns = parameter.shape
            own, decay = local_part(parameter), 1 - group["lr"] * group["weight_decay"]
            if found_inf is not None:
                decay, update = torch.where(found_inf > 0, 1.0, decay), update.masked_fill(found_inf > 0, 0)
            own.mul_(decay)
            own.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

    def _update_momentum(self, parameter: nn.Parameter, momentum: float, found_inf: torch.Tensor | None) -> None:
        if parameter.grad is not None:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            gradient, buffer = self._gradient_and_buffer(parameter, found_inf)
            buffer.lerp_(gradient, 1 - momentum)

    def _nesterov(self, parameter: nn.Parameter, momentum: float, found_inf: torch.Tensor | None) -> torch.Tensor:
        """This process's part of Nesterov's momentum: the mean of the gradients with the newest counted once more."""
        if parameter.grad is None:
            return torch.full_like(local_part(parameter), math.nan)
        return torch.lerp(*self._gradient_and_buffer(parameter, found_inf), momentum)

    def _gradient_and_buffer(
        self, parameter: nn.Parameter, found_inf: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's parts of the gradient and of the mean of those before."""
        assert parameter.grad is not None
        gradient, buffer = local_part(parameter.grad), local_part(self.state[parameter]["momentum_buffer"])
        if found_inf is not None:
            gradient = torch.where(found_inf > 0, buffer, gradient)  # the buffer then stays as it is
        return gradient, buffer

    def _step_adamw(
        self, group: dict[str, Any], parameters: list[nn.Parameter], found_inf: torch.Tensor | None
    ) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] |= {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states):
            state["step"] = state["step"].to(parameter.device)  # torch leaves it on the CPU when it loads a state
        adamw(
            [local_part(parameter) for parameter in parameters],
            [local_part(parameter.grad) for parameter in parameters],
            [local_part(state["exp_avg"]) for state in states],
            [local_part(state["exp_avg_sq"]) for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            found_inf=found_inf,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalize(matrices: list[torch.Tensor], dtype: torch.dtype | None = None) -> list[torch.Tensor]:
    """Each matrix with its singular values near 1: about U V^T for U S V^T, by Newton and Schulz's iteration.

    The matrices have one shape, or that shape transposed, and are multiplied together as one stack, in `dtype`: by
    default in float32 on a CPU, elsewhere in bfloat16, whose rounding the iteration tolerates (`_iterate_gram`, which
    squares the condition number, would not). A matrix of zeros stays zero.
    """
    rows, columns = matrices[0].shape
    is_tall = [
        matrix.shape[0] > matrix.shape[1] for matrix in matrices
    ]  # the Gram matrix below is then the smaller one
    device = matrices[0].device
    dtype = dtype or default_dtype(device)
    x = torch.empty(len(matrices), min(rows, columns), max(rows, columns), dtype=dtype, device=device)
    for place, matrix, tall in zip(x, matrices, is_tall):
        place.copy_(matrix.mT if tall else matrix)
    x /= torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_(min=1e-7)  # no singular value is above 1 now
    # With r columns per row this takes 4 * (2r + 1) products of square matrices; by the Gram matrix, 13 + 2r.
    x = _iterate_gram(x) if dtype == torch.float32 and x.shape[-1] > 1.5 * x.shape[-2] else _iterate(x)
    return [matrix.mT if tall else matrix for matrix, tall in zip(x, is_tall)]


def default_dtype(device: torch.device) -> torch.dtype:
    """The type in which matrices are made orthogonal on a device."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _iterate(x: torch.Tensor) -> torch.Tensor:
    """x <- (a + b G + c G^2) x with the Gram matrix G = x x^T, NUM_ITERATIONS times."""
    a, b, c = NEWTON_SCHULZ
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _iterate_gram(x: torch.Tensor) -> torch.Tensor:
    """The same as `_iterate`, with two products of the size of x: G becomes P G P where x becomes P x."""
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.mT
    product = None  # of all polynomials so far
    for iteration in range(NUM_ITERATIONS):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else polynomial @ product
        if iteration < NUM_ITERATIONS - 1:
            gram = polynomial @ gram @ polynomial
    return product @ x


def _stacks(
    parameters: list[nn.Parameter], process_group: ProcessGroup | None
) -> Iterator[tuple[Grid | None, list[nn.Parameter]]]:
    """The parameters by shape, a shape and its transpose together, in stacks of a bounded size, each with its grid.

    All processes of a grid have the same stacks, whichever gradients they have, for each waits for the others' parts.
    """
    by_shape: dict[tuple[Any, ...], list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        grid = grid_of(parameter, process_group)
        if parameter.grad is not None or (grid is not None and grid.num_processes > 1):
            by_shape[(grid, *sorted(parameter.shape), parameter.device)].append(parameter)
    for (grid, *_), alike in by_shape.items():
        num_processes = 1 if grid is None else grid.num_processes
        # A multiple of the processes, so that all of them have as many matrices, in all stacks but the last.
        most = num_processes * max(1, STACK_NUMBERS // (num_processes * max(1, alike[0].numel())))
        for first in range(0, len(alike), most):
            yield grid, alike[first : first + most]


def _gather(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The whole tensor of which `part` is this process's, sharded like `parameter`."""
    assert isinstance(parameter, DTensor)
    mesh, placements = parameter.device_mesh, parameter.placements
    sharded = DTensor.from_local(
        part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return sharded.full_tensor()


def _part(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of `whole`, sharded like `parameter`; without communication."""
    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    replicated = DTensor.from_local(whole.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=parameter.placements).to_local()
