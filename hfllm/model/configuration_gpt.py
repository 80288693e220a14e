"""The configuration of a GPT: one set of orthogonal fields that spans the book's GPT-2, Llama and Qwen3 exactly.

This file travels with every checkpoint (see `auto_map`): it imports third-party packages only.
"""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


# Every class of ours, by the Auto class that opens it. All of it is written into every saved config, so that a reader
# without hfllm can open any head of a checkpoint with `trust_remote_code=True`.
AUTO_MAP = {
    "AutoConfig": "configuration_gpt.GPTConfig",
    "AutoModel": "modeling_gpt.GPTModel",
    "AutoModelForCausalLM": "modeling_gpt.GPTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_gpt.GPTForSequenceClassification",
}

# The two ways of building. "modern" is exactly a `qwen3`, so what is trained with it runs wherever Qwen3 runs; "book"
# is GPT-2 (Radford et al. 2019) as chapters 3 to 5 build it. Everything else is a size.
PRESETS: dict[str, dict[str, Any]] = {
    "modern": {
        "position_embedding_type": "rotary",
        "norm_type": "rms_norm",
        "norm_eps": 1e-6,
        "use_qk_norm": True,
        "hidden_act": "silu",
        "gated_mlp": True,
        "attention_bias": False,
        "attention_output_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    },
    "book": {
        "position_embedding_type": "learned",
        "norm_type": "layer_norm",
        "norm_eps": 1e-5,
        "use_qk_norm": False,
        "hidden_act": "gelu_pytorch_tanh",  # GPT-2's "gelu_new", in one kernel
        "gated_mlp": False,
        "attention_bias": True,
        "attention_output_bias": True,
        "mlp_bias": True,
        "embedding_dropout": 0.1,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
        "tie_word_embeddings": True,
    },
}


@strict
class GPTConfig(PreTrainedConfig):
    """The shape of a GPT. The defaults are the modern preset at the size of the README's example.

    Args:
        vocab_size: Rows of the token embedding; at least `len(tokenizer)`.
        hidden_size: Width C of the residual stream.
        intermediate_size: Width of the MLP. Default: 4 * hidden_size; for a gated MLP 8/3 * hidden_size, rounded to a
            multiple of 64, so that three matrices hold as many weights as two (Shazeer 2020, section 2).
        num_hidden_layers: Blocks.
        num_attention_heads: Query heads H.
        num_key_value_heads: Key and value heads; fewer than H is grouped-query attention (Ainslie et al. 2023).
            Default: H.
        head_dim: Channels D of a head. Default: hidden_size / num_attention_heads.
        max_position_embeddings: The longest context, in tokens. With learned positions it is the table's size.
        position_embedding_type: `"rotary"` (Su et al. 2021) or `"learned"` (a table, as in GPT-2).
        rope_parameters: transformers' dict for rotary positions, `{"rope_type": "default", "rope_theta": 10000.0}`.
        norm_type: `"rms_norm"` (Zhang and Sennrich 2019) or `"layer_norm"` (with a bias, as in GPT-2).
        norm_eps: Added to the variance.
        use_qk_norm: An RMSNorm over each head's queries and keys (Dehghani et al. 2023; as in Qwen3).
        hidden_act: The MLP's activation, by transformers' name.
        gated_mlp: `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
        attention_bias: Biases of the query, key and value projections.
        attention_output_bias: Bias of the attention's output projection. Default: as `attention_bias`. The book's own
            GPT has `qkv_bias=False` with a bias here.
        mlp_bias: Biases of the MLP.
        embedding_dropout: Applied to the sum of the embeddings.
        attention_dropout: Applied to the attention weights.
        residual_dropout: Applied to what attention and MLP add to the residual stream.
        final_logit_softcapping: If set, logits become `cap * tanh(logits / cap)` (Gemma 2, section 2).
        initializer_range: Standard deviation of the initial weights.
        embedding_initializer_range: That of the embeddings. Default: as `initializer_range`. The book leaves them at
            PyTorch's 1.0, which with a head of its own learns a short text far faster.
        tie_word_embeddings: The head is the token embedding (Press and Wolf 2017).

    Raises:
        ValueError: for sizes that do not fit together; says which.
    """

    model_type = "hfllm_gpt"
    keys_to_ignore_at_inference = ["past_key_values"]
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 8192
    hidden_size: int = 384
    intermediate_size: int | None = None
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 1024
    position_embedding_type: Literal["rotary", "learned"] = "rotary"
    rope_parameters: dict | None = None
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    norm_eps: float | int = 1e-6
    use_qk_norm: bool = True
    hidden_act: str = "silu"
    gated_mlp: bool = True
    attention_bias: bool = False
    attention_output_bias: bool | None = None
    mlp_bias: bool = False
    embedding_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    residual_dropout: float | int = 0.0
    final_logit_softcapping: float | int | None = None
    initializer_range: float | int = 0.02
    embedding_initializer_range: float | int | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            gated_size = max(64, 64 * round(self.hidden_size * 8 / 3 / 64))
            self.intermediate_size = gated_size if self.gated_mlp else 4 * self.hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and self.num_attention_heads > 0:
            self.head_dim = self.hidden_size // self.num_attention_heads
            if self.hidden_size % self.num_attention_heads != 0:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of "
                    f"num_attention_heads={self.num_attention_heads}. Choose one that is, or set head_dim."
                )
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        if self.embedding_initializer_range is None:
            self.embedding_initializer_range = self.initializer_range
        super().__post_init__(**kwargs)
        if self.position_embedding_type == "learned":
            self.rope_parameters = None
        self.auto_map = dict(AUTO_MAP)

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> "GPTConfig":
        """A config of the preset `"modern"` or `"book"`, with sizes and any other field given as overrides."""
        if preset not in PRESETS:
            raise ValueError(f"There is no preset {preset!r}; there are {sorted(PRESETS)}.")
        return cls(**{**PRESETS[preset], **overrides})

    def validate_architecture(self):
        """Part of `@strict`-powered validation: sizes that cannot work together, named."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: it must be at least 1.")
        if self.num_hidden_layers < 0 or self.max_position_embeddings < 1:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers}, max_position_embeddings={self.max_position_embeddings}: "
                "a model has at least 0 layers and 1 position."
            )
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}: each key and value head serves as many query heads."
            )
        if self.position_embedding_type == "rotary" and self.head_dim % 2 != 0:
            raise ValueError(
                f"head_dim={self.head_dim} is odd, but rotary positions turn pairs of channels. Choose an even one, or "
                "position_embedding_type='learned'."
            )
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a dropout is a probability in [0, 1).")


__all__ = ["GPTConfig"]
