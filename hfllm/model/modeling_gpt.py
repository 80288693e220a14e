"""A GPT for transformers: the book's architecture (chapters 3 to 5) and today's, by one configuration.

The order and the names are those of transformers' Llama, so that whoever knows one knows both. Shapes are stated in the
order (batch, heads, time, channels): B rows, H query heads, K key and value heads, T positions, D channels per head,
C channels of the residual stream, V vocabulary.

This file travels with every checkpoint: it imports third-party packages and `.configuration_gpt` only.
"""

import math
import os
import re
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin, MaxLengthCriteria
from transformers.integrations import use_kernel_forward_from_hub, use_kernelized_func
from transformers.masking_utils import create_causal_mask, packed_sequence_mask_function
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutputWithPast,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel, slice_logits_to_keep
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .configuration_gpt import GPTConfig, explain_other_architecture


logger = logging.get_logger(__name__)

# In float32 on a CPU a step is bound by passes over memory, and autograd makes two to three times as many as the two
# functions below, whose derivatives are written out: training is 1.03 to 1.14 times as fast with them (three runs of 6
# layers of 384, context 256, 8 rows, on 2 cores). What is compiled, or runs on an accelerator, takes the plain code.


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


class RotaryFunction(torch.autograd.Function):
    """x turned by the angles of cos and sin; its derivative is the turn back."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return RotaryFunction.turn(x, cos, sin, direction=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return RotaryFunction.turn(grad, *ctx.saved_tensors, direction=-1), None, None

    @staticmethod
    def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, direction: int) -> torch.Tensor:
        half = x.shape[-1] // 2
        turned = x * cos
        turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-direction)
        turned[..., half:].addcmul_(x[..., :half], sin[..., half:], value=direction)
        return turned


LOGIT_ROWS = 512  # at a time: fewer, and adding up the weight's gradient takes longer than the products


class LinearCrossEntropyFunction(torch.autograd.Function):
    """The nats that a head needs for its targets, summed, from some rows of logits at a time and never all of them.

    Each piece of logits is made, gives its part of the loss and of both gradients, and is forgotten. All of them would
    be 412 MB at 50,257 ids and 2,048 tokens, several times over with what autograd keeps. hidden_states is (N, C),
    weight (V, C), targets (N), -100 for none. Products are taken in `dtype`, all else in float32.
    """

    @staticmethod
    def forward(
        ctx, hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        x, w = hidden_states.to(dtype), weight.to(dtype)
        grad_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        grad_w = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        nats = torch.zeros((), dtype=torch.float32, device=x.device)
        for first in range(0, len(x), LOGIT_ROWS):
            rows = slice(first, first + LOGIT_ROWS)
            logits, target = (x[rows] @ w.mT).float(), targets[rows, None]
            is_target, target = target != -100, target.clamp(min=0)
            probabilities = logits.softmax(-1)
            # What softmax has divided by: the likeliest token's probability is exp(its logit - logsumexp).
            logsumexp = logits.amax(-1, keepdim=True) - probabilities.amax(-1, keepdim=True).log_()
            nats += (is_target * (logsumexp - logits.gather(-1, target))).sum()
            if not any(ctx.needs_input_grad):
                continue
            probabilities.scatter_add_(-1, target, torch.full_like(logsumexp, -1.0))
            grad_logits = probabilities.mul_(is_target).to(dtype)
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
        return *grads, None, None


def is_plain_float32(*tensors: torch.Tensor) -> bool:
    """Whether the functions above apply: float32 on a CPU, and nobody traces."""
    return not is_tracing(tensors[0]) and all(
        tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors
    )


def is_half_product(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether autocast on a CPU has put out the states, in bfloat16, of a layer whose weight is float32: it trains."""
    return hidden_states.dtype == torch.bfloat16 and torch.is_grad_enabled() and is_plain_float32(weight)


def round_once(hidden_states: torch.Tensor) -> torch.Tensor:
    """The states in autocast's dtype, for the several products that take them.

    Each product would cast them again, and its gradient back: three passes over memory each way instead of one.
    """
    device_type = hidden_states.device.type
    if hidden_states.dtype != torch.float32 or not torch.is_autocast_enabled(device_type):
        return hidden_states
    return hidden_states.to(torch.get_autocast_dtype(device_type))


def is_decoding(hidden_states: torch.Tensor) -> bool:
    """Whether few values go forward only, as when a token is generated: what counts then is the number of calls.

    One row of 384 channels is normalised in 11 us by torch's rms_norm and in 20 us by the function above; 2,048 rows in
    3.4 ms by torch's and in 0.3 ms by the function.
    """
    return not torch.is_grad_enabled() and hidden_states.numel() <= 2**14


HAS_MKL = torch.backends.mkl.is_available()
NUM_WEIGHT_BLOCKS = 8
SMALLEST_WEIGHT = 2**15  # numbers; of fewer, the reading takes less time than the call, which F.linear does with less


def is_one_plain_row(x: torch.Tensor) -> bool:
    """Whether x is a single vector of float32 on a CPU that goes forward only, and nobody traces."""
    return (
        type(x) is torch.Tensor
        and x.numel() == x.shape[-1]
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
    )


def project(linear: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """linear(x). A single row takes the same product with the same weights, in MKL's faster routine.

    When a token is generated, each weight is read for one row, and reading is what takes the time. MKL reads the rows
    of a weight at 6 to 10 GB/s in the product that F.linear asks for, and at 20 to 30 GB/s in a batch of small products
    with the weight cut into blocks of rows (AMD EPYC, AVX2, one thread). The weight is neither copied nor kept, and
    whatever is not a plain nn.Linear (LoRA, quantized, sharded, hooked) is called as it is.
    """
    if not HAS_MKL or type(linear) is not nn.Linear or linear.weight.numel() < SMALLEST_WEIGHT:
        return linear(x)
    if not is_one_plain_row(x):
        return linear(x)
    weight, num_blocks = linear.weight, NUM_WEIGHT_BLOCKS
    is_hooked = linear._forward_pre_hooks or linear._forward_hooks or "forward" in linear.__dict__
    has_global_hooks = nn.modules.module._global_forward_pre_hooks or nn.modules.module._global_forward_hooks
    is_plain = type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.is_contiguous()
    if is_hooked or has_global_hooks or not is_plain or weight.shape[0] % num_blocks or weight.device != x.device:
        return linear(x)
    blocks = weight.view(num_blocks, -1, weight.shape[1])
    # MKL takes the faster routine only if the vector's strides say that it is the transpose of a row.
    vector = x.reshape(1, -1).t().expand(num_blocks, -1, 1)
    if linear.bias is None:
        product = torch.bmm(blocks, vector)
    else:
        product = torch.baddbmm(linear.bias.view(num_blocks, -1, 1), blocks, vector)
    return product.view(*x.shape[:-1], -1)


@use_kernel_forward_from_hub("RMSNorm")
class GPTRMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if is_plain_float32(hidden_states, self.weight):
            if is_decoding(hidden_states):
                return nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
            return RMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon)
        if is_half_product(hidden_states, self.weight):
            return RMSNormFunction.apply(hidden_states.float(), self.weight, self.variance_epsilon)
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.variance_epsilon}"


def build_norm(config: GPTConfig) -> nn.Module:
    if config.norm_type == "layer_norm":
        return nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
    return GPTRMSNorm(config.hidden_size, eps=config.norm_eps)


class GPTMLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        if config.gated_mlp:
            self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.is_residual_output = True
        self.act_fn = ACT2FN[config.hidden_act]
        self.gated = config.gated_mlp

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.gated:
            hidden_states = round_once(hidden_states)
            hidden_states = self.act_fn(project(self.gate_proj, hidden_states)) * project(self.up_proj, hidden_states)
        else:
            hidden_states = self.act_fn(project(self.up_proj, hidden_states))
        return project(self.down_proj, hidden_states)


class GPTRotaryEmbedding(nn.Module):
    """Rotary positions (Su et al. 2021), with transformers' scalings by `config.rope_parameters`."""

    inv_freq: torch.Tensor

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config

        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)

        self.inv_freq = nn.Buffer(inv_freq, persistent=False)
        self.original_inv_freq = nn.Buffer(inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: GPTConfig, **kwargs) -> tuple[torch.Tensor, float]:
        """The D / 2 angular frequencies, in radians per position, and the scaling of cos and sin (1: none)."""
        base = config.rope_parameters["rope_theta"]
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
        return 1.0 / (base**exponent), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        freqs = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        emb = torch.cat((freqs, freqs), dim=-1)  # (B, T, D / 2) -> (B, T, D)
        cos = emb.cos() * self.attention_scaling
        sin = emb.sin() * self.attention_scaling
        return cos.to(dtype=x.dtype), sin.to(dtype=x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + D/2) of channels by 90 degrees."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


@use_kernel_forward_from_hub("rotary_pos_emb")
def apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn queries (B, H, T, D) and keys (B, K, T, D) by their positions' angles; cos and sin are (B, T, D)."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    if is_plain_float32(query, key, cos, sin) and not is_decoding(query):
        return RotaryFunction.apply(query, cos, sin), RotaryFunction.apply(key, cos, sin)
    return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin


def repeat_kv(hidden_states: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Give each query head its own copy of its key or value head: (B, K, T, D) -> (B, K * num_groups, T, D)."""
    return hidden_states if num_groups == 1 else hidden_states.repeat_interleave(num_groups, dim=1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention as chapter 3 writes it: softmax(query @ key.T * scaling + mask) @ value, and the weights."""
    key = repeat_kv(key, module.num_key_value_groups)
    value = repeat_kv(value, module.num_key_value_groups)

    attn_weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        attn_weights = attn_weights + attention_mask
    attn_weights = nn.functional.softmax(attn_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attn_weights = nn.functional.dropout(attn_weights, p=dropout, training=module.training)
    attn_output = torch.matmul(attn_weights, value).transpose(1, 2).contiguous()  # (B, H, T, D) -> (B, T, H, D)
    return attn_output, attn_weights


LONGEST_WHOLE_SCORES = 512


def prefers_whole_scores(query: torch.Tensor, key: torch.Tensor, dropout: float) -> bool:
    """Whether short rows train in bfloat16 on a CPU, where torch's flash attention gains nothing from bfloat16.

    8 rows of 256 with 6 heads of 64 take 40 ms forward and backward by plain products, 95 by flash attention (one core
    of an AMD EPYC with AVX-512 and its bfloat16, shared with others); longer rows would pay in memory.
    """
    is_bfloat16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return (
        query.device.type == "cpu"
        and (is_bfloat16 or query.dtype == torch.bfloat16)
        and query.shape[2] == key.shape[2] <= LONGEST_WHOLE_SCORES
        and dropout == 0
        and torch.is_grad_enabled()
        and not is_tracing(query)
    )


def whole_scores_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Attention by two products in bfloat16, as (B, T, H, D).

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
    return output.view(batch_size, num_heads, length, head_dim).transpose(1, 2)


@use_kernelized_func(apply_rotary_pos_emb)
class GPTAttention(nn.Module):
    """Causal multi-head attention (Vaswani et al. 2017); key and value heads are shared if there are fewer of them."""

    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        query_size = config.num_attention_heads * self.head_dim
        key_value_size = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.o_proj.is_residual_output = True
        self.q_norm = GPTRMSNorm(self.head_dim, eps=config.norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = GPTRMSNorm(self.head_dim, eps=config.norm_eps) if config.use_qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[FlashAttentionKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        hidden_states = round_once(hidden_states)

        # (B, T, C) -> (B, H, T, D) and (B, K, T, D)
        query = self.q_norm(project(self.q_proj, hidden_states).view(head_shape)).transpose(1, 2)
        key = self.k_norm(project(self.k_proj, hidden_states).view(head_shape)).transpose(1, 2)
        value = project(self.v_proj, hidden_states).view(head_shape).transpose(1, 2)

        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)

        dropout = self.attention_dropout if self.training else 0.0
        if self.config._attn_implementation == "sdpa" and prefers_whole_scores(query, key, dropout):
            attn_output = whole_scores_attention(query, key, value, attention_mask, self.scaling)
            return project(self.o_proj, attn_output.reshape(*input_shape, -1)), None

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()  # (B, T, H, D) -> (B, T, C)
        return project(self.o_proj, attn_output), attn_weights


class GPTDecoderLayer(GradientCheckpointingLayer):
    """A block: attention, then the MLP, each normalised before and added to the residual stream after."""

    def __init__(self, config: GPTConfig, layer_idx: int):
        super().__init__()
        self.hidden_size = config.hidden_size
        self.self_attn = GPTAttention(config, layer_idx)
        self.mlp = GPTMLP(config)
        self.input_layernorm = build_norm(config)
        self.post_attention_layernorm = build_norm(config)
        self.residual_dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = hidden_states + self.residual_dropout(attn_output)
        return hidden_states + self.residual_dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


@auto_docstring(custom_intro="Weights, plans and what transformers may do with a GPT.")
class GPTPreTrainedModel(PreTrainedModel):
    config: GPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPTDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": GPTDecoderLayer, "attentions": GPTAttention}

    def __init__(self, config: GPTConfig, *inputs, **kwargs):
        if not isinstance(config, GPTConfig) and config.model_type != GPTConfig.model_type:
            raise ValueError(explain_other_architecture(f"A {type(config).__name__}", config.model_type))
        super().__init__(config, *inputs, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """transformers' own, except that weights which do not fit the config are an error, in words.

        transformers draws what a checkpoint lacks at random and leaves out what it has too much, with a warning. That
        is right for a new head and for layers that a smaller `num_hidden_layers` leaves out; anywhere else the model
        would be broken. Who asks for `output_loading_info` gets the lists instead.
        """
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        if "float8" in str(dtype):
            raise ValueError(
                f"dtype={dtype}: torch only stores numbers in it. Load with torch.bfloat16 or torch.float16; weights "
                "of 8 bits need a quantization_config, e.g. transformers.TorchAoConfig."
            )
        model, loading_info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
        if loading_info["mismatched_keys"] and not ignore_mismatched_sizes:
            key, saved, built = min(loading_info["mismatched_keys"])
            raise RuntimeError(  # transformers' own type
                f"The checkpoint {str(pretrained_model_name_or_path)!r} does not fit: {key} is {tuple(saved)} there, "
                f"{tuple(built)} by the config ({len(loading_info['mismatched_keys'])} such weights). Load it with its "
                "own config.json and without overrides; ignore_mismatched_sizes=True draws such weights at random."
            )
        if output_loading_info:
            return model, loading_info
        if pretrained_model_name_or_path is not None:
            model._check_loaded(pretrained_model_name_or_path, loading_info)
        return model

    def _check_loaded(self, name: str | os.PathLike, loading_info: dict):
        """Refuse a checkpoint that lacks weights of the layers, or of the head it was saved with, or has others."""
        heads = ("lm_head.", "score.")
        saved_as_this = type(self).__name__ in (self.config.architectures or [])
        missing = [key for key in loading_info["missing_keys"] if saved_as_this or not key.startswith(heads)]
        surplus = [
            key
            for key in loading_info["unexpected_keys"]
            if not key.startswith(heads) and not self._is_left_out_layer(key)
        ]
        if not missing and not surplus:
            return
        parts = [
            f"{what} {', '.join(sorted(keys)[:3])}{f' and {len(keys) - 3} more weights' if len(keys) > 3 else ''}"
            for what, keys in (("it lacks", missing), ("the config has no place for", surplus))
            if keys
        ]
        reason = "Were its weights and its config.json saved together?"
        if any("base_layer" in key or "lora_" in key for key in surplus):
            reason = "That is LoRA: save the adapter with PEFT, or merge it (merge_and_unload) before saving."
        elif missing == ["lm_head.weight"]:
            reason = (
                "Saved with tied weights, it has none. Load it so; to untie them then, copy the embedding: "
                "model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone()), "
                "model.config.tie_word_embeddings = False."
            )
        raise ValueError(
            f"The checkpoint {str(name)!r} does not fit: {'; '.join(parts)}. {reason} "
            "from_pretrained(..., output_loading_info=True) returns the model as it is, and the lists."
        )

    def _is_left_out_layer(self, key: str) -> bool:
        match = re.match(rf"(?:{self.base_model_prefix}\.)?layers\.(\d+)\.", key)
        return match is not None and int(match[1]) >= self.config.num_hidden_layers

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        embedding_std = self.config.embedding_initializer_range
        if isinstance(module, nn.Embedding) and embedding_std != self.config.initializer_range:
            init.normal_(module.weight, mean=0.0, std=embedding_std)
        # Each block adds twice to the residual stream, so its two output layers start smaller by 1/sqrt(2 * depth): the
        # stream's variance then does not grow with depth (Radford et al. 2019, section 2.3). The mark sits on the
        # Linear because only modules with uninitialised parameters of their own come through here.
        if getattr(module, "is_residual_output", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)


@auto_docstring(custom_intro="The GPT without a head: token ids to the last layer's hidden states.")
class GPTModel(GPTPreTrainedModel):
    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.learned_positions = config.position_embedding_type == "learned"

        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if self.learned_positions:
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.rotary_emb = GPTRotaryEmbedding(config)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(
            [GPTDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = build_norm(config)
        self.gradient_checkpointing = False

        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Positions, counted from 0. Where they restart within a row, a new document starts, and documents in one row
            do not see each other, with or without an attention mask or a cache.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)

        if isinstance(attention_mask, dict):  # `generate` prepares one for a static cache
            causal_mask = attention_mask["full_attention"]
        else:
            causal_mask = self._build_mask(inputs_embeds, attention_mask, position_ids, past_key_values)
        if position_ids is None:
            position_ids = self._count_positions(inputs_embeds, attention_mask, past_key_values)

        position_embeddings = None
        hidden_states = inputs_embeds
        if self.learned_positions:
            hidden_states = hidden_states + self._embed_positions(position_ids)
        else:
            position_embeddings = self.rotary_emb(hidden_states, position_ids)
        hidden_states = self.embedding_dropout(hidden_states)

        for decoder_layer in self.layers[: self.config.num_hidden_layers]:  # fewer, for `assistant_early_exit`
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=causal_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )

        hidden_states = self.norm(hidden_states)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values,
        )

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to their embeddings (B, T, C); an id that has none is an error in words, on a CPU."""
        try:
            return self.embed_tokens(input_ids)
        except IndexError as error:
            num_ids = self.embed_tokens.num_embeddings
            unknown = input_ids[(input_ids < 0) | (input_ids >= num_ids)].unique().tolist()
            raise ValueError(
                f"The input_ids {unknown[:5]} are not among the {num_ids} of the vocabulary. Is the tokenizer the "
                "model's own? If tokens were added to it, call model.resize_token_embeddings(len(tokenizer))."
            ) from error

    def _embed_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Positions (B, T) to their rows (B, T, C) of the table; one that has none is an error in words."""
        num_positions = self.embed_positions.num_embeddings
        # A GPU answers with an assert of its own, and reading values stalls it: they are read only where they are many.
        is_long = position_ids.shape[-1] > num_positions and not is_tracing(position_ids)
        try:
            if is_long and position_ids.max() >= num_positions:
                raise IndexError
            return self.embed_positions(position_ids)
        except IndexError as error:
            unknown = position_ids[(position_ids < 0) | (position_ids >= num_positions)].unique().tolist()
            raise ValueError(
                f"Position {unknown[-1]} is beyond the {num_positions} learned positions of this model, which count "
                "from 0. Shorten the input (truncation=True, max_length=...), or train with a larger "
                "max_position_embeddings; rotary positions have no such table."
            ) from error

    def _build_mask(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> torch.Tensor | None:
        """The causal mask in the form the attention backend wants, which also keeps packed documents apart.

        transformers looks for restarting positions only when there is neither a mask nor a cache, and with one lets
        documents see each other without a word. Here a mask of ones, a padding mask and an empty cache change nothing.
        """
        documents = self._find_documents(attention_mask, position_ids, past_key_values)
        mask_arguments = {"config": self.config, "inputs_embeds": inputs_embeds}
        if documents is None:
            return create_causal_mask(**mask_arguments, attention_mask=attention_mask, past_key_values=past_key_values)
        is_full = attention_mask is None or (not is_tracing(attention_mask) and bool(attention_mask.all()))
        if "flash" in self.config._attn_implementation and (inputs_embeds.shape[0] > 1 or not is_full):
            raise ValueError(
                f"{self.config._attn_implementation!r} keeps packed documents apart only in a single row without "
                "padding. Load the model with attn_implementation='sdpa' or 'flex_attention', or pass one row at a "
                "time, without padding and attention_mask."
            )
        if is_full:
            return create_causal_mask(
                **mask_arguments, attention_mask=None, past_key_values=None, position_ids=position_ids
            )
        return create_causal_mask(
            **mask_arguments,
            attention_mask=attention_mask,
            past_key_values=None,
            and_mask_function=packed_sequence_mask_function(documents.expand(inputs_embeds.shape[0], -1)),
        )

    @staticmethod
    def _find_documents(
        attention_mask: torch.Tensor | None, position_ids: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.Tensor | None:
        """The number (B, T) of the document that each token belongs to; None if no row holds more than one."""
        length = 1 if position_ids is None else position_ids.shape[-1]
        if length == 1 or (attention_mask is not None and len(attention_mask.shape) != 2):
            return None
        is_static = getattr(past_key_values, "is_compileable", False)
        if is_static and is_tracing(position_ids):
            return None
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        restarts = position_ids.diff(dim=-1) != 1
        if attention_mask is not None:
            # Padding may repeat positions: a restart counts only between two tokens that are not padding.
            is_text = attention_mask[:, seen : seen + length].bool()
            if is_text.shape[-1] != length or attention_mask.shape[-1] != length + seen:
                return None
            restarts = restarts & is_text[:, 1:] & is_text[:, :-1]
        if not is_tracing(restarts) and not restarts.any():
            return None
        if is_static or seen > 0:
            if is_tracing(restarts):
                return None
            raise ValueError(
                "The position_ids restart, as where a new document starts in a packed row, but with a cache that is "
                f"{'static' if is_static else 'not empty'} the documents would see each other. Pass no cache, or each "
                "document in a row of its own."
            )
        return nn.functional.pad(restarts.cumsum(-1), (1, 0))

    @staticmethod
    def _count_positions(
        inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, past_key_values: Cache | None
    ) -> torch.Tensor:
        """Positions (B or 1, T) of the new tokens: after the cached ones, and counted without padding on the left."""
        length = inputs_embeds.shape[1]
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 2 and isinstance(seen, int):
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
            return positions[:, seen : seen + length].to(inputs_embeds.device)
        return (torch.arange(length, device=inputs_embeds.device) + seen).unsqueeze(0)


@auto_docstring(custom_intro="The GPT with its language modeling head: token ids to the next token's logits.")
class GPTForCausalLM(GPTPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.model = GPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        skip_logits (`bool`, *optional*, defaults to `False`):
            With labels, return the loss alone. The logits then are never there all at once, which saves their memory;
            where the head is not a plain linear layer (LoRA on it, sharded, soft-capped) they are, all the same.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Usually `input_ids` itself: the model shifts them. -100 marks what is not learned. Labels that are shifted
            already go in as `shift_labels`; the loss is the mean over labels, or, with `num_items_in_batch`, their sum
            divided by that number.

        Example:

        ```python
        >>> import hfllm
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer

        >>> model = AutoModelForCausalLM.from_pretrained("out/demo")
        >>> tokenizer = AutoTokenizer.from_pretrained("out/demo")
        >>> inputs = tokenizer("import os", return_tensors="pt")
        >>> print(tokenizer.decode(model.generate(**inputs, max_new_tokens=30)[0]))
        ```"""
        shift_labels = kwargs.pop("shift_labels", None)
        num_items_in_batch = kwargs.pop("num_items_in_batch", None)
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        if skip_logits and self._has_plain_head():
            if shift_labels is None:
                if labels is None:
                    raise ValueError("skip_logits=True leaves the loss alone, and without labels there is none.")
                shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=-100)
            loss = self._cross_entropy(hidden_states, shift_labels, num_items_in_batch)
            return CausalLMOutputWithPast(
                loss=loss,
                past_key_values=outputs.past_key_values,
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            )

        logits = project(self.lm_head, hidden_states)
        if (cap := self.config.final_logit_softcapping) is not None:
            logits = cap * torch.tanh(logits / cap)

        loss = None
        if labels is not None or shift_labels is not None:
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                num_items_in_batch=num_items_in_batch,
                shift_labels=None if shift_labels is None else shift_labels.contiguous(),
            )

        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _has_plain_head(self) -> bool:
        """Whether the head's weight may be multiplied by itself: whole, here, and with nothing hung onto the layer."""
        head = self.lm_head
        return (
            type(head) is nn.Linear
            and type(head.weight) is nn.Parameter
            and head.weight.shape == (head.out_features, head.in_features)
            and not head._forward_pre_hooks
            and not head._forward_hooks
            and self.config.final_logit_softcapping is None
            and not is_tracing(head.weight)
        )

    def _cross_entropy(
        self, hidden_states: torch.Tensor, shift_labels: torch.Tensor, num_items_in_batch: int | torch.Tensor | None
    ) -> torch.Tensor:
        """transformers' ForCausalLMLoss of hidden states (B, T, C): the mean over labels, or their sum by a number."""
        weight, targets = self.lm_head.weight, shift_labels.flatten().to(hidden_states.device)
        device_type = hidden_states.device.type
        is_autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if is_autocast else weight.dtype
        with torch.autocast(device_type, enabled=False):
            nats = LinearCrossEntropyFunction.apply(hidden_states.flatten(0, -2), weight, targets, dtype)
        if num_items_in_batch is None:
            num_items_in_batch = (targets != -100).sum()
        elif torch.is_tensor(num_items_in_batch):
            num_items_in_batch = num_items_in_batch.to(nats.device)
        return nats / num_items_in_batch

    # What follows lets `generate` go on past the learned positions. Rotary positions have no end: they go on as
    # transformers has it, by the frequencies that config.rope_parameters gives.

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict:
        """The inputs of the next step; past the learned positions, the last `max_position_embeddings` tokens.

        The window slides as chapter 4 crops its input: what is in it is counted from 0 again. So every token changes
        its position at every step, no key or value of the step before holds, and the cache is emptied and filled anew.
        A token past the end costs a pass over the window.
        """
        position_ids = kwargs.get("position_ids")
        has_table, length = self.model.learned_positions, 0
        if has_table:
            length = max(part.shape[-1] for part in (input_ids, attention_mask, position_ids) if part is not None)
        if not has_table or not self._must_slide(length, position_ids, past_key_values):
            return super().prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=next_sequence_length,
                past_key_values=past_key_values,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                is_first_iteration=is_first_iteration,
                **kwargs,
            )

        window = min(length, self.config.max_position_embeddings)
        if inputs_embeds is not None:  # the prompt's; what was generated since are ids
            generated = input_ids[:, input_ids.shape[1] - (length - inputs_embeds.shape[1]) :]
            generated_embeds = self.get_input_embeddings()(generated.to(inputs_embeds.device))
            inputs_embeds = torch.cat([inputs_embeds, generated_embeds], dim=1)[:, -window:]
        elif input_ids.shape[1] < window:
            raise ValueError(
                f"The text has {length} tokens, more than the model's {self.config.max_position_embeddings} learned "
                f"positions, so its last {window} are computed anew; but only {input_ids.shape[1]} input_ids were "
                "given. Pass those of the cached tokens as well."
            )

        is_text = input_ids.new_ones(input_ids.shape[0], length) if attention_mask is None else attention_mask
        self._check_counting(is_text, position_ids)
        if past_key_values is not None:
            past_key_values.reset()
            past_key_values.starts_late = length > window
        if length > window:
            logger.warning_once(
                f"The text is longer than the model's {self.config.max_position_embeddings} learned positions: each "
                "further token is predicted from that many last ones, at the cost of a pass over all of them."
            )
        kwargs["position_ids"] = (is_text[:, -window:].long().cumsum(-1) - 1).clamp(min=0)
        return super().prepare_inputs_for_generation(
            input_ids[:, -window:],
            past_key_values=past_key_values,
            attention_mask=None if attention_mask is None else attention_mask[:, -window:],
            inputs_embeds=inputs_embeds,
            is_first_iteration=inputs_embeds is not None,
            **kwargs,
        )

    def _must_slide(self, length: int, position_ids: torch.Tensor | None, past_key_values: Cache | None) -> bool:
        # A cache filled by a window that had slid holds no beginning of a text: it cannot be cropped and gone on from.
        if getattr(past_key_values, "starts_late", False):
            return True
        if length <= self.config.max_position_embeddings:
            return False
        # Padding on the left takes columns, but no positions. A static cache has as many columns as the table has rows.
        if position_ids is None or getattr(past_key_values, "is_compileable", False):
            return True
        return int(position_ids.max()) >= self.config.max_position_embeddings

    @staticmethod
    def _check_counting(is_text: torch.Tensor, position_ids: torch.Tensor | None):
        """A window is counted from 0, over text: say so to whoever counted otherwise."""
        if is_text.dim() != 2:
            raise ValueError(
                f"Past the learned positions the window slides, for which the attention_mask must be (batch, length) "
                f"instead of {tuple(is_text.shape)}."
            )
        if position_ids is None:
            return
        counted = (is_text.long().cumsum(-1) - 1)[:, -position_ids.shape[-1] :]
        differs = (position_ids.to(counted.device) != counted) & is_text[:, -position_ids.shape[-1] :].bool()
        if differs.any():
            raise ValueError(
                "Past the learned positions the window slides and is counted from 0, but these position_ids do not "
                "count a row's tokens from 0. Pad on the left (tokenizer.padding_side = 'left'), and leave "
                "position_ids out."
            )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """transformers' own, with no more room than the table has positions, and words for a cache too small."""
        if self.model.learned_positions:
            max_cache_length = min(max_cache_length, self.config.max_position_embeddings)
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        cache = model_kwargs.get("past_key_values")
        if getattr(cache, "is_compileable", False) and 0 <= cache.get_max_length() < max_cache_length:
            raise ValueError(
                f"The cache has room for {cache.get_max_length()} tokens, but up to {max_cache_length} are asked for. "
                f"Make it with max_cache_len={max_cache_length}, or pass cache_implementation='static' and no cache."
            )

    def _prefill(self, input_ids: torch.Tensor, generation_config, model_kwargs: dict, **kwargs):
        # Chunks of a prompt that does not fit would fill a cache of which nothing holds.
        if self.model.learned_positions and input_ids.shape[1] > self.config.max_position_embeddings:
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)

    def _get_stopping_criteria(self, *args, **kwargs):
        criteria = super()._get_stopping_criteria(*args, **kwargs)
        for criterion in criteria:
            if self.model.learned_positions and isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None  # its warning of exceptions is not true here
        return criteria

    def _get_candidate_generator(self, *args, **kwargs):
        """transformers' own, which past the learned positions proposes nothing.

        Assisted decoding checks several tokens in one pass, but there each of them has a window of its own.
        """
        generator = super()._get_candidate_generator(*args, **kwargs)
        if not self.model.learned_positions:
            return generator
        propose, update = generator.get_candidates, generator.update_candidate_strategy
        limit = self.config.max_position_embeddings

        def get_candidates(input_ids, *args, **kwargs):
            if input_ids.shape[1] >= limit:
                return input_ids, None
            candidate_ids, logits = propose(input_ids, *args, **kwargs)
            return candidate_ids[:, :limit], None if logits is None else logits[:, : limit - input_ids.shape[1]]

        def update_candidate_strategy(input_ids, scores, num_matches):
            if input_ids.shape[1] <= limit:
                update(input_ids, scores, num_matches)

        generator.get_candidates = get_candidates
        generator.update_candidate_strategy = update_candidate_strategy
        return generator


@auto_docstring(
    custom_intro="The GPT with a linear classifier on a row's last token, or the mean of its tokens, padding aside."
)
class GPTForSequenceClassification(GPTPreTrainedModel):
    # The loss is the mean over rows. Trainer has to be told, or it takes the keywords of `forward` for a promise that
    # num_items_in_batch divides it, and multiplies gradients by the accumulation and by the number of processes.
    accepts_loss_kwargs = False

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = GPTModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)

        self.post_init()

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        is_mean = self.config.classifier_pooling != "last"
        if is_mean and past_key_values is not None and past_key_values.get_seq_length() > 0:
            raise ValueError(
                f"classifier_pooling={self.config.classifier_pooling!r} is over all tokens of a text, and those in "
                "past_key_values have left no hidden states. Pass the whole text, without a filled cache."
            )
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        is_text = self._find_text(input_ids, attention_mask, hidden_states)
        if is_mean:
            documents = self.model._find_documents(attention_mask, position_ids, None)
            if self.config.classifier_pooling == "mean_first_last":
                embeddings = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
                hidden_states = hidden_states + nn.functional.rms_norm(embeddings, embeddings.shape[-1:])
            pooled = self._mean_of_text(hidden_states, is_text, documents)
        else:
            rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
            pooled = hidden_states[rows, self._last_token(is_text)]
        logits = self.score(pooled)  # (B, C) -> (B, num_labels)

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)

        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _find_text(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """Which tokens (B, T) are not padding, on whichever side the padding is.

        The attention mask decides. Only without one does the pad token's id, which is wrong where a text may contain
        that id (pad == eos); a single row without either is taken whole.
        """
        batch_size, length = hidden_states.shape[:2]
        if attention_mask is not None and len(attention_mask.shape) == 2:
            is_text = attention_mask[:, -length:].bool()
        elif input_ids is not None and self.config.pad_token_id is not None:
            is_text = input_ids != self.config.pad_token_id
        elif batch_size == 1 or input_ids is None:
            is_text = torch.ones(batch_size, length, dtype=torch.bool)
        else:
            raise ValueError(
                f"Cannot tell text from padding in {batch_size} rows: pass attention_mask, or set config.pad_token_id."
            )
        return is_text.to(hidden_states.device)

    @staticmethod
    def _last_token(is_text: torch.Tensor) -> torch.Tensor:
        """The index (B,) of each row's last token that is not padding."""
        return (torch.arange(is_text.shape[1], device=is_text.device) * is_text).argmax(-1)

    @classmethod
    def _mean_of_text(
        cls, hidden_states: torch.Tensor, is_text: torch.Tensor, documents: torch.Tensor | None
    ) -> torch.Tensor:
        """The mean (B, C) of each row's tokens; of a row with several documents, the last one's, as the last token."""
        if documents is not None:
            documents = documents.expand_as(is_text)
            is_text = is_text & (documents == documents.gather(1, cls._last_token(is_text)[:, None]))
        weights = is_text.to(hidden_states.dtype)
        return (weights[:, None] @ hidden_states)[:, 0] / weights.sum(-1, keepdim=True).clamp(min=1)


__all__ = ["GPTForCausalLM", "GPTForSequenceClassification", "GPTModel", "GPTPreTrainedModel"]
