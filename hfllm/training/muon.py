"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): updates by orthogonalized momentum.

A matrix's gradient is mostly a few large directions, and AdamW's update follows them. Muon replaces the singular values
of the momentum by ones: every direction moves equally, which reaches the same loss with a fraction of the tokens. It is
for the matrices between hidden states. Embeddings, the head, norms, biases and learned positions take AdamW's steps, in
the same optimizer, so that one object is scheduled, saved and resumed.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.optim.adamw import adamw


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

    A parameter may be sharded (FSDP2's DTensor): its momentum is then gathered, every process orthogonalises the whole,
    and keeps its part of the result.

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
    ):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(groups, {**defaults, "orthogonal": False})
        self.dtype = dtype
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
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters if grad_scale is not None else []:
                _local(parameter.grad).div_(grad_scale)
            if group["orthogonal"]:
                self._step_orthogonal(group, parameters, found_inf)
            elif parameters:
                self._step_adamw(group, parameters, found_inf)
        return loss

    def _step_orthogonal(
        self, group: dict[str, Any], parameters: list[nn.Parameter], found_inf: torch.Tensor | None
    ) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        for stack in _stacks(parameters):
            updates = [self._update_momentum(parameter, group["momentum"], found_inf) for parameter in stack]
            for parameter, update in zip(stack, orthogonalize(updates, self.dtype)):
                rows, columns = parameter.shape
                own, update = _local(parameter), _share(update, parameter)
                decay = 1 - group["lr"] * group["weight_decay"]
                if found_inf is not None:
                    decay, update = torch.where(found_inf > 0, 1.0, decay), update.masked_fill(found_inf > 0, 0)
                own.mul_(decay)
                own.add_(update, alpha=-group["lr"] * math.sqrt(max(1, rows / columns)))

    def _update_momentum(
        self, parameter: nn.Parameter, momentum: float, found_inf: torch.Tensor | None
    ) -> torch.Tensor:
        """Nesterov's momentum, whole: the mean of the gradients with the newest one counted once more."""
        assert parameter.grad is not None
        gradient, buffer = _local(parameter.grad), _local(self.state[parameter]["momentum_buffer"])
        if found_inf is not None:
            gradient = torch.where(found_inf > 0, buffer, gradient)  # the buffer then stays as it is
        buffer.lerp_(gradient, 1 - momentum)
        return _gather(torch.lerp(gradient, buffer, momentum), parameter)

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
            [_local(parameter) for parameter in parameters],
            [_local(parameter.grad) for parameter in parameters],
            [_local(state["exp_avg"]) for state in states],
            [_local(state["exp_avg_sq"]) for state in states],
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
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x = torch.empty(len(matrices), min(rows, columns), max(rows, columns), dtype=dtype, device=device)
    for place, matrix, tall in zip(x, matrices, is_tall):
        place.copy_(matrix.mT if tall else matrix)
    x /= torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp_(min=1e-7)  # no singular value is above 1 now
    # With r columns per row this takes 4 * (2r + 1) products of square matrices; by the Gram matrix, 13 + 2r.
    x = _iterate_gram(x) if dtype == torch.float32 and x.shape[-1] > 1.5 * x.shape[-2] else _iterate(x)
    return [matrix.mT if tall else matrix for matrix, tall in zip(x, is_tall)]


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


def _stacks(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters by shape, a shape and its transpose together, in stacks of a bounded size."""
    by_shape: dict[tuple[Any, ...], list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        by_shape[(*sorted(parameter.shape), parameter.device)].append(parameter)
    stacks = []
    for alike in by_shape.values():
        most = max(1, STACK_NUMBERS // max(1, alike[0].numel()))
        stacks += [alike[first : first + most] for first in range(0, len(alike), most)]
    return stacks


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _gather(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The whole tensor of which `local` is this process's part, sharded like `parameter`."""
    if not isinstance(parameter, DTensor):
        return local
    mesh, placements = parameter.device_mesh, parameter.placements
    sharded = DTensor.from_local(
        local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )
    return sharded.full_tensor()


def _share(whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This process's part of `whole`, sharded like `parameter`; without communication."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    replicated = DTensor.from_local(whole.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=parameter.placements).to_local()
