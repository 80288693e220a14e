"""Fast CPU routines and the loss in pieces; they compute the same as the plain code in `modeling_gpt`.

Each routine is next to the function that says when it applies. Code that is traced, compiled, exported or runs on an
accelerator always takes the plain path.

This file travels with every checkpoint: it imports third-party packages only.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.utils.import_utils import is_tracing


# In float32 on a CPU, a training step is bound by passes over memory, and autograd makes two to three times as many as
# RMSNormFunction and RotaryFunction, whose derivatives are written out: training is 1.03 to 1.14 times as fast with
# them (three runs of 6 layers of 384, context 256, 8 rows, on 2 cores).


def is_plain_float32(*tensors: torch.Tensor) -> bool:
    """Whether all tensors are float32 on a CPU, and nothing is traced."""
    return not is_tracing(tensors[0]) and all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors
    )


def is_half_product(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether bfloat16 states come from autocast on a CPU while the weight is trained in float32."""
    return hidden_states.dtype == torch.bfloat16 and torch.is_grad_enabled() and is_plain_float32(weight)


def is_decoding(hidden_states: torch.Tensor) -> bool:
    """Whether there are few values and no gradients, as when a token is generated: the number of calls then decides.

    torch's rms_norm takes 11 us for one row of 384 channels, RMSNormFunction 20 us; for 2,048 rows they take 3.4 ms
    and 0.3 ms.
    """
    return not torch.is_grad_enabled() and hidden_states.numel() <= 2**14


def cast_once(hidden_states: torch.Tensor) -> torch.Tensor:
    """The states in autocast's dtype, for several products that take the same states.

    Otherwise each product casts them again, and its gradient back: three passes over memory each way instead of one.
    """
    device_type = hidden_states.device.type
    if hidden_states.dtype != torch.float32 or not torch.is_autocast_enabled(device_type):
        return hidden_states
    return hidden_states.to(torch.get_autocast_dtype(device_type))


# Linear layers

HAS_MKL = torch.backends.mkl.is_available()
NUM_WEIGHT_BLOCKS = 8
SMALLEST_WEIGHT = 2**15  # numbers; reading a smaller weight takes less time than the additional calls


class GPTLinear(nn.Linear):
    """nn.Linear that multiplies a single row with a faster routine of MKL.

    When a token is generated, each weight is read for one row only, and reading takes most of the time. MKL reads a
    weight at 6 to 10 GB/s in the product that F.linear asks for, and at 20 to 30 GB/s in a batch of small products with
    the weight cut into blocks of rows (AMD EPYC, AVX2, one thread). The weight is neither copied nor kept. A weight
    that is not a plain float32 parameter (quantized, sharded) takes F.linear.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not is_one_plain_row(input) or not is_block_weight(self.weight, input):
            return super().forward(input)
        blocks = self.weight.view(NUM_WEIGHT_BLOCKS, -1, self.weight.shape[1])
        # MKL takes the faster routine only if the vector's strides say that it is the transpose of a row.
        vector = input.reshape(1, -1).t().expand(NUM_WEIGHT_BLOCKS, -1, 1)
        if self.bias is None:
            product = torch.bmm(blocks, vector)
        else:
            product = torch.baddbmm(self.bias.view(NUM_WEIGHT_BLOCKS, -1, 1), blocks, vector)
        return product.view(*input.shape[:-1], -1)


def is_one_plain_row(x: torch.Tensor) -> bool:
    """Whether x is a single float32 vector on a CPU without gradients, and nothing is traced."""
    return (
        HAS_MKL
        and type(x) is torch.Tensor
        and x.numel() == x.shape[-1]
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def is_block_weight(weight: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether the weight is a plain parameter beside x, large enough, and its rows can be cut into equal blocks."""
    return (
        type(weight) is nn.Parameter
        and weight.numel() >= SMALLEST_WEIGHT
        and weight.shape[0] % NUM_WEIGHT_BLOCKS == 0
        and weight.dtype == torch.float32
        and weight.device == x.device
        and weight.is_contiguous()
    )


# Normalisation


def has_fast_norm(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    return is_plain_float32(hidden_states, weight) or is_half_product(hidden_states, weight)


def fast_rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """weight * x / rms(x) in float32, for what `has_fast_norm` accepts."""
    if hidden_states.dtype == torch.float32 and is_decoding(hidden_states):
        return nn.functional.rms_norm(hidden_states, weight.shape, weight, eps)
    return RMSNormFunction.apply(hidden_states.float(), weight, eps)


class RMSNormFunction(torch.autograd.Function):
    """weight * x / rms(x) over the last dimension, with its derivative."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        product = (grad * x).flatten(0, -2)
        grad_weight = scale.flatten() @ product
        grad_scale = (product @ weight).view_as(scale)
        grad_x = (grad * weight).mul_(scale)
        return grad_x.addcmul_(x, grad_scale.mul_(scale.pow(3)).div_(-x.shape[-1])), grad_weight, None


# Rotary positions


def has_fast_rotation(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    return is_plain_float32(query, key, cos, sin) and not is_decoding(query)


def fast_rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x * cos + rotate_half(x) * sin."""
    return RotaryFunction.apply(x, cos, sin)


class RotaryFunction(torch.autograd.Function):
    """x turned by the angles of cos and sin; its derivative is the turn back."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return RotaryFunction.turn(x, cos, sin, direction=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return RotaryFunction.turn(grad, cos, sin, direction=-1), None, None

    @staticmethod
    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
        half = x.shape[-1] // 2
        turned = x * cos
        turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
        turned[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
        return turned


# Attention

LONGEST_WHOLE_SCORES = 512  # tokens; the scores of longer rows would take too much memory


def prefers_whole_scores(implementation: str | None, query: torch.Tensor, key: torch.Tensor, dropout: float) -> bool:
    """Whether SDPA was asked for, and short rows train in bfloat16 on a CPU, where it gains nothing from bfloat16.

    8 rows of 256 with 6 heads of 64 take 40 ms forward and backward by plain products, 95 by flash attention (one core
    of an AMD EPYC with AVX-512 and its bfloat16, shared with others).
    """
    is_bfloat16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return (
        implementation == "sdpa"
        and query.device.type == "cpu"
        and (is_bfloat16 or query.dtype == torch.bfloat16)
        and query.shape[2] == key.shape[2] <= LONGEST_WHOLE_SCORES
        and dropout == 0
        and torch.is_grad_enabled()
        and not is_tracing(query)
    )


def whole_scores_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention by two products in bfloat16, as (B, T, H, D); it has the arguments of transformers' functions.

    The mask is SDPA's: True (B, 1, T, T) where a token may look, or numbers to add to the scores, or None for causal.
    """
    batch_size, num_heads, length, head_dim = query.shape
    num_groups, dtype = num_heads // key.shape[1], torch.bfloat16
    if attention_mask is None:
        attention_mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=query.device).tril()
    if attention_mask.dtype == torch.bool:
        lowest = torch.finfo(dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=dtype).masked_fill_(~attention_mask, lowest)
    bias = attention_mask.to(dtype).expand(batch_size, num_heads, length, length).flatten(0, 1)
    query, key, value = (
        states.to(dtype, memory_format=torch.contiguous_format).flatten(0, 1)
        for states in (query, repeat_kv(key, num_groups), repeat_kv(value, num_groups))
    )
    with torch.autocast("cpu", enabled=False):
        scores = torch.baddbmm(bias, query, key.mT, alpha=scaling)
        output = torch.bmm(scores.softmax(-1), value)
    return output.view(batch_size, num_heads, length, head_dim).transpose(1, 2), None


def repeat_kv(hidden_states: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Give each query head its own copy of its key or value head: (B, K, T, D) -> (B, K * num_groups, T, D)."""
    return hidden_states if num_groups == 1 else hidden_states.repeat_interleave(num_groups, dim=1)


# The loss

# Rows of logits at a time; with fewer, adding up the weight's gradient takes longer than the products.
LOGIT_ROWS = {"cpu": 512, "accelerator": 4096}


def is_plain_linear(linear: nn.Module) -> bool:
    """Whether a layer's product may be taken from its weight alone: whole, in one place, no hooks, nothing traced."""
    return (
        type(linear) in (nn.Linear, GPTLinear)
        and type(linear.weight) is nn.Parameter
        and linear.weight.shape == (linear.out_features, linear.in_features)
        and linear.bias is None
        and not linear._forward_pre_hooks
        and not linear._forward_hooks
        and not is_tracing(linear.weight)
    )


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    shift_labels: torch.Tensor,
    num_items_in_batch: int | torch.Tensor | None = None,
    of_rows: Callable | None = None,
) -> torch.Tensor:
    """transformers' ForCausalLMLoss from hidden states (B, T, C), without all logits at once.

    It is the mean over labels, or their sum divided by `num_items_in_batch`. `of_rows` computes a piece: by default
    `cross_entropy_of_rows`.
    """
    targets = shift_labels.flatten().to(hidden_states.device)
    device_type = hidden_states.device.type
    is_autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if is_autocast else weight.dtype
    with torch.autocast(device_type, enabled=False):
        nats = LinearCrossEntropyFunction.apply(
            hidden_states.flatten(0, -2), weight, targets, dtype, of_rows or cross_entropy_of_rows
        )
    if num_items_in_batch is None:
        num_items_in_batch = (targets != -100).sum()
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(nats.device)
    return nats / num_items_in_batch


class LinearCrossEntropyFunction(torch.autograd.Function):
    """The cross entropy of a head's targets in nats, summed, computed from a few rows of logits at a time.

    Each piece of logits gives its part of the loss and of both gradients, and is freed. All logits together would take
    412 MB at 50,257 ids and 2,048 tokens, and several times as much with what autograd keeps. hidden_states is (N, C),
    weight (V, C), targets (N), -100 for none. Products are taken in `dtype`, all else in float32.
    """

    @staticmethod
    def forward(
        ctx,
        hidden_states: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        dtype: torch.dtype,
        of_rows: Callable,
    ) -> torch.Tensor:
        x, w = hidden_states.to(dtype), weight.to(dtype)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_w = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        nats = torch.zeros((), dtype=torch.float32, device=x.device)
        num_rows = LOGIT_ROWS["cpu" if x.device.type == "cpu" else "accelerator"]
        for first in range(0, len(x), num_rows):
            rows = slice(first, first + num_rows)
            piece, grad_logits = of_rows(x[rows] @ w.mT, targets[rows, None], any(ctx.needs_input_grad))
            nats += piece
            if grad_x is not None:
                torch.mm(grad_logits, w, out=grad_x[rows])
            if grad_w is not None:
                grad_w += grad_logits.mT @ x[rows]
        ctx.save_for_backward(
            None if grad_x is None else grad_x.to(hidden_states.dtype),
            None if grad_w is None else grad_w.to(weight.dtype),
        )
        return nats

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grads = [None if saved is None else saved * grad for saved in ctx.saved_tensors]
        return *grads, None, None, None


def cross_entropy_of_rows(
    logits: torch.Tensor, target: torch.Tensor, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The summed cross entropy in nats of logits (N, V) and targets (N, 1), and its gradient in the logits' dtype."""
    dtype, logits = logits.dtype, logits.float()
    is_target, target = target != -100, target.clamp(min=0)
    probabilities = logits.softmax(-1)
    # From the likeliest token, whose probability is exp(its logit - logsumexp).
    logsumexp = logits.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log_()
    nats = (is_target * (logsumexp - logits.gather(-1, target))).sum()
    if not needs_gradient:
        return nats, None
    if torch.compiler.is_compiling():  # where scattering would write all probabilities once more
        is_own = torch.arange(logits.shape[-1], device=logits.device) == target
        return nats, (torch.where(is_own, probabilities - 1, probabilities) * is_target).to(dtype)
    probabilities.scatter_add_(-1, target, torch.full_like(logsumexp, -1.0))
    return nats, probabilities.mul_(is_target).to(dtype)
