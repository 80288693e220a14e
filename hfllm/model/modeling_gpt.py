"""A GPT for transformers: the book's architecture (chapters 3 to 5) and today's, by one configuration.

The order and the names are the same as in transformers' Llama. Shapes are stated in the order (batch, heads, time,
channels): B rows, H query heads, K key and value heads, T positions, D channels per head, C channels of the residual
stream, V vocabulary.

Next to it are `kernels_gpt` (fast routines for CPUs, the loss in pieces), `generation_gpt` (past the learned
positions), `documents_gpt` (packed documents) and `loading_gpt` (checkpoints that do not fit). All of them travel with
every checkpoint: they import third-party packages and each other only.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations import use_kernel_forward_from_hub, use_kernelized_func
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
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from .configuration_gpt import GPTConfig, explain_other_architecture
from .documents_gpt import build_causal_mask, count_positions, find_documents
from .generation_gpt import CACHE_NAME, SlidingGenerationMixin, accept_past_key_values
from .kernels_gpt import (
    GPTLinear,
    cast_once,
    cross_entropy_of_rows,
    fast_rms_norm,
    fast_rotation,
    has_fast_norm,
    has_fast_rotation,
    is_plain_linear,
    linear_cross_entropy,
    prefers_whole_scores,
    repeat_kv,
    whole_scores_attention,
)
from .loading_gpt import StrictLoadingMixin, warn_if_transformers_is_untested


@use_kernel_forward_from_hub("RMSNorm")
class GPTRMSNorm(nn.Module):
    """Root mean square normalisation (Zhang and Sennrich 2019), computed in float32."""

    def __init__(self, hidden_size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if has_fast_norm(hidden_states, self.weight):
            return fast_rms_norm(hidden_states, self.weight, self.variance_epsilon)
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
            self.gate_proj = GPTLinear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = GPTLinear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = GPTLinear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.down_proj.is_residual_output = True
        self.act_fn = ACT2FN[config.hidden_act]
        self.gated = config.gated_mlp

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.gated:
            hidden_states = cast_once(hidden_states)
            hidden_states = self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states)
        else:
            hidden_states = self.act_fn(self.up_proj(hidden_states))
        return self.down_proj(hidden_states)


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
    if has_fast_rotation(query, key, cos, sin):
        return fast_rotation(query, cos, sin), fast_rotation(key, cos, sin)
    return query * cos + rotate_half(query) * sin, key * cos + rotate_half(key) * sin


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


@use_kernelized_func(apply_rotary_pos_emb)
class GPTAttention(nn.Module):
    """Causal multi-head attention (Vaswani et al. 2017); query heads share key and value heads if those are fewer."""

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
        self.q_proj = GPTLinear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = GPTLinear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = GPTLinear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = GPTLinear(query_size, config.hidden_size, bias=config.attention_output_bias)
        self.o_proj.is_residual_output = True
        self.q_norm = GPTRMSNorm(self.head_dim, eps=config.norm_eps) if config.use_qk_norm else nn.Identity()
        self.k_norm = GPTRMSNorm(self.head_dim, eps=config.norm_eps) if config.use_qk_norm else nn.Identity()

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[FlashAttentionKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        cache = kwargs.pop(CACHE_NAME, None)
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        hidden_states = cast_once(hidden_states)

        # (B, T, C) -> (B, H, T, D) and (B, K, T, D)
        query = self.q_norm(self.q_proj(hidden_states).view(head_shape)).transpose(1, 2)
        key = self.k_norm(self.k_proj(hidden_states).view(head_shape)).transpose(1, 2)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)

        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, norms and rotation give float32
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx, kwargs=kwargs)

        dropout = self.attention_dropout if self.training else 0.0
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if prefers_whole_scores(self.config._attn_implementation, query, key, dropout):
            attention_interface = whole_scores_attention
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
        return self.o_proj(attn_output), attn_weights


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
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **kwargs,
        )
        hidden_states = hidden_states + self.residual_dropout(attn_output)
        return hidden_states + self.residual_dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


@auto_docstring(custom_intro="Initial weights, and what transformers may do with a GPT.")
class GPTPreTrainedModel(StrictLoadingMixin, PreTrainedModel):
    config: GPTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GPTDecoderLayer"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": GPTDecoderLayer, "attentions": GPTAttention}

    def __init__(self, config: GPTConfig, *inputs, **kwargs):
        if not isinstance(config, GPTConfig) and config.model_type != GPTConfig.model_type:
            raise ValueError(explain_other_architecture(f"A {type(config).__name__}", config.model_type))
        warn_if_transformers_is_untested()
        super().__init__(config, *inputs, **kwargs)

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

    @accept_past_key_values
    @merge_with_config_defaults
    @capture_outputs
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        cache (`Cache`, *optional*):
            Keys and values of the tokens so far. Before transformers 5.24 it was called `past_key_values`, which still
            works.
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Positions, counted from 0. Where they restart within a row, a new document starts, and documents in one row
            do not see each other, with or without an attention mask or a cache.
        """
        if (input_ids is None) ^ (inputs_embeds is not None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        # Continuous batching has a cache of another kind, and prepares mask and positions itself.
        past = cache if isinstance(cache, Cache) else None
        causal_mask = build_causal_mask(self.config, inputs_embeds, attention_mask, position_ids, past)
        if position_ids is None:
            position_ids = count_positions(inputs_embeds, attention_mask, past)

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
                position_embeddings=position_embeddings,
                use_cache=use_cache,
                **{CACHE_NAME: cache},
                **kwargs,
            )

        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE_NAME: cache})

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, T) to their embeddings (B, T, C); on a CPU, an error names ids outside the vocabulary."""
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
        """Positions (B, T) to their rows (B, T, C) of the table; an error names positions beyond it."""
        num_positions = self.embed_positions.num_embeddings
        # A GPU fails with an assert of its own, and reading values stalls it: they are read only in long inputs.
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


@auto_docstring(custom_intro="The GPT with its language modeling head: token ids to the next token's logits.")
class GPTForCausalLM(GPTPreTrainedModel, SlidingGenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.model = GPTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = GPTLinear(config.hidden_size, config.vocab_size, bias=False)
        self.cross_entropy_of_rows = cross_entropy_of_rows  # or a compiled one

        self.post_init()

    @accept_past_key_values
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        cache (`Cache`, *optional*):
            Keys and values of the tokens so far. Before transformers 5.24 it was called `past_key_values`, which still
            works.
        skip_logits (`bool`, *optional*, defaults to `False`):
            With labels, return the loss alone. The logits are then computed a few rows at a time, which saves their
            memory, unless the head is not a plain linear layer (with LoRA, sharded, soft-capped).
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Usually `input_ids` itself: the model shifts them. -100 marks tokens without a loss. Pass labels that are
            already shifted as `shift_labels`. The loss is the mean over labels, or, with `num_items_in_batch`, the sum
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
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        if skip_logits and self.config.final_logit_softcapping is None and is_plain_linear(self.lm_head):
            if shift_labels is None:
                if labels is None:
                    raise ValueError(
                        "skip_logits=True returns the loss alone, which needs labels. Pass labels or shift_labels."
                    )
                shift_labels = nn.functional.pad(labels[..., 1:], (0, 1), value=-100)
            loss = linear_cross_entropy(
                hidden_states, self.lm_head.weight, shift_labels, num_items_in_batch, self.cross_entropy_of_rows
            )
            return CausalLMOutputWithPast(
                loss=loss,
                **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
            )

        logits = self.lm_head(hidden_states)
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
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


@auto_docstring(
    custom_intro="The GPT with a linear classifier on the last token of a row, or on the mean of its tokens."
)
class GPTForSequenceClassification(GPTPreTrainedModel):
    # The loss is the mean over rows. Without this, Trainer concludes from the keywords of `forward` that the loss is
    # divided by num_items_in_batch, and multiplies gradients by the accumulation and by the number of processes.
    accepts_loss_kwargs = False
    # A model that was given its problem_type by its first loss was built, and is saved, without the bias: it is zero.
    _keys_to_ignore_on_load_missing = [r"score\.bias"]

    def __init__(self, config: GPTConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = GPTModel(config)
        # The mean of the numbers to be learned may be far from zero. transformers' own heads have no bias.
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=config.problem_type == "regression")

        self.post_init()

    @accept_past_key_values
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        r"""
        cache (`Cache`, *optional*):
            Keys and values of the tokens so far. Before transformers 5.24 it was called `past_key_values`, which still
            works.
        """
        is_mean = self.config.classifier_pooling != "last"
        if is_mean and cache is not None and cache.get_seq_length() > 0:
            raise ValueError(
                f"classifier_pooling={self.config.classifier_pooling!r} is a mean over all tokens of a text, but the "
                "cache keeps no hidden states of its tokens. Pass the whole text, without a filled cache."
            )
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        is_text = self._find_text(input_ids, attention_mask, hidden_states)
        if is_mean:
            documents = find_documents(attention_mask, position_ids, None)
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
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _find_text(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, hidden_states: torch.Tensor
    ) -> torch.Tensor:
        """True (B, T) for the tokens that are not padding, on either side.

        The attention mask decides. Without one the pad token's id does, which is wrong where a text may contain that id
        (pad == eos); a single row without either is all text.
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
