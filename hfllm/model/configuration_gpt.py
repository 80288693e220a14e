"""The configuration of a GPT: one set of orthogonal fields that spans the book's GPT-2, Llama and Qwen3 exactly.

This file travels with every checkpoint (see `auto_map`): it imports third-party packages only.
"""

import dataclasses
import difflib
import os
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Our classes, by the Auto class that opens them. Every saved config has the whole table, so that a reader
# without hfllm can open any head of a checkpoint with `trust_remote_code=True`.
AUTO_MAP = {
    "AutoConfig": "configuration_gpt.GPTConfig",
    "AutoModel": "modeling_gpt.GPTModel",
    "AutoModelForCausalLM": "modeling_gpt.GPTForCausalLM",
    "AutoModelForSequenceClassification": "modeling_gpt.GPTForSequenceClassification",
}

# The two architectures. "modern" is exactly a `qwen3`, so what is trained with it runs wherever Qwen3 runs; "book" is
# GPT-2 (Radford et al. 2019) as chapters 3 to 5 build it. All other fields are sizes.
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

# transformers silently keeps any keyword of a config, so that a misspelled field would leave its default in place.
# These are the keywords beyond our fields that transformers acts on, or writes into a config itself.
TRANSFORMERS_KEYS = {
    "attn_implementation",
    "auto_map",
    "custom_pipelines",
    "experts_implementation",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "rope_scaling",
    "rope_theta",
    "task_specific_params",
    "tie_last_hidden_states",
    "tokenizer_class",
    "torch_dtype",
    "transformers_weights",
}

# These change transformers' masks and loops, but not what a GPT computes.
UNSUPPORTED_KEYS = ("attention_chunk_size", "layer_types", "per_layer_config", "sliding_window")

# Names of our fields in the book's dictionary, in GPT-2's config and elsewhere.
OTHER_NAMES = {
    "context_length": "max_position_embeddings",
    "emb_dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "drop_rate": "embedding_dropout, attention_dropout and residual_dropout",
    "qkv_bias": "attention_bias",
    "block_size": "max_position_embeddings",
    "n_ctx": "max_position_embeddings",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "num_heads": "num_attention_heads",
    "num_layers": "num_hidden_layers",
}

# The rotary scalings of transformers that turn a whole head, and the values that each requires.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}

DTYPES = ("float32", "float", "bfloat16", "float16", "half", "float64", "double")


@strict
class GPTConfig(PreTrainedConfig):
    """The architecture and sizes of a GPT. The defaults are the modern preset at the size of the README's example.

    Args:
        vocab_size: Rows of the token embedding; at least `len(tokenizer)`.
        hidden_size: Width C of the residual stream.
        intermediate_size: Width of the MLP. Default: 4 * hidden_size; for a gated MLP 8/3 * hidden_size, rounded to a
            multiple of 64, so that three matrices hold as many weights as two (Shazeer 2020, section 2).
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of query heads H.
        num_key_value_heads: Number of key and value heads; fewer than H is grouped-query attention (Ainslie et al.
            2023). Default: H.
        head_dim: Channels D of a head. Default: hidden_size / num_attention_heads.
        max_position_embeddings: The longest context, in tokens. With learned positions it is the table's size, and past
            it `generate` predicts from this many last tokens.
        position_embedding_type: `"rotary"` (Su et al. 2021) or `"learned"` (a table, as in GPT-2).
        rope_parameters: transformers' dict for rotary positions, `{"rope_type": "default", "rope_theta": 10000.0}`.
        norm_type: `"rms_norm"` (Zhang and Sennrich 2019) or `"layer_norm"` (with a bias, as in GPT-2).
        norm_eps: Added to the variance, so that a norm never divides by 0.
        use_qk_norm: An RMSNorm over each head's queries and keys (Dehghani et al. 2023; as in Qwen3).
        hidden_act: The MLP's activation, by transformers' name.
        gated_mlp: `down(act(gate(x)) * up(x))` instead of `down(act(up(x)))`.
        attention_bias: Biases of the query, key and value projections.
        attention_output_bias: Bias of the attention's output projection. Default: as `attention_bias`. The book's GPT
            has this bias with `qkv_bias=False`.
        mlp_bias: Biases of the MLP.
        embedding_dropout: Applied to the sum of the embeddings.
        attention_dropout: Applied to the attention weights.
        residual_dropout: Applied to the outputs of attention and MLP, before they are added to the residual stream.
        final_logit_softcapping: If set, logits become `cap * tanh(logits / cap)` (Gemma 2, section 2).
        initializer_range: Standard deviation of the initial weights.
        embedding_initializer_range: Standard deviation of the initial embeddings. Default: as `initializer_range`. The
            book leaves PyTorch's 1.0, which learns a short text far faster if the head is not tied.
        tie_word_embeddings: The head shares the token embedding's weight (Press and Wolf 2017).
        classifier_pooling: The input of `GPTForSequenceClassification`'s head: the last token's hidden state (`"last"`,
            as in transformers' own classes), the mean of all tokens' last hidden states (`"mean"`), or that mean plus
            the mean of the normalised embeddings (`"mean_first_last"`, after Gao et al. 2021, SimCSE). Padding never
            counts.

    Raises:
        ValueError: for an unknown field, naming the nearest one, and for values that cannot work, alone or together. An
            unknown key of `config.json` is kept, as in transformers, with a warning.
    """

    model_type = "hfllm_gpt"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # the name since transformers 5.24, and before
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
    classifier_pooling: Literal["last", "mean", "mean_first_last"] = "last"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self._check_keys(kwargs, from_file=kwargs.pop("_from_file", False))
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
        if self.rope_parameters is not None:
            self.rope_parameters = dict(self.rope_parameters)  # completed below, without changing the caller's
        super().__post_init__(**kwargs)
        if self.position_embedding_type == "learned":
            self.rope_parameters = None
        self._fit_parallel_plans()
        self.auto_map = dict(AUTO_MAP)
        self.validate_architecture()  # `@strict` calls it again, but its errors are not ValueErrors

    def _fit_parallel_plans(self):
        """Keep the rules of the class's plans that match this architecture; transformers warns of the others."""
        absent = set() if self.use_qk_norm else {"q_norm", "k_norm"}
        if not self.gated_mlp:
            absent.add("gate_proj")
        rules = type(self).base_model_tp_plan
        self.base_model_tp_plan = {name: rule for name, rule in rules.items() if name.split(".")[-1] not in absent}
        if self.position_embedding_type == "learned":
            self.base_model_pp_plan = None  # every stage of a pipeline would add the positions again

    @classmethod
    def from_preset(cls, preset: str, **overrides) -> "GPTConfig":
        """A config of the preset `"modern"` or `"book"`, with sizes and any other field given as overrides."""
        if preset not in PRESETS:
            raise ValueError(f"There is no preset {preset!r}; there are {sorted(PRESETS)}.")
        try:
            return cls(**{**PRESETS[preset], **overrides})
        except StrictDataclassError as error:
            raise ValueError(str(error.__cause__ or error)) from error

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> "GPTConfig":
        try:
            return super().from_dict({**config_dict, "_from_file": True}, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"config.json: {error.__cause__ or error}") from error

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
        """Refuse another architecture's config, of which transformers would make a GPT with default values."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        model_types = [
            part.get("model_type") for part in (config_dict, *config_dict.values()) if isinstance(part, dict)
        ]
        if config_dict.get("model_type") is not None and cls.model_type not in model_types:
            raise ValueError(explain_other_architecture(pretrained_model_name_or_path, config_dict["model_type"]))
        return config_dict, kwargs

    def _check_keys(self, extra: dict[str, Any], *, from_file: bool):
        """Reject keys that nothing reads and values that cannot be right; a file may hold keys of other tools."""
        for key in UNSUPPORTED_KEYS:
            if extra.get(key) is not None:
                raise ValueError(
                    f"{key}={extra[key]!r} is not supported: all layers of a GPT are alike and attend to the whole "
                    "text. Leave it out."
                )
        known = {*TRANSFORMERS_KEYS, *UNSUPPORTED_KEYS}
        unknown = [key for key in extra if key not in known and not key.startswith("_")]
        explained = " ".join(self._explain_key(key) for key in unknown)
        if unknown and not from_file:
            raise ValueError(f"{explained} help(GPTConfig) lists the fields.")
        if unknown:
            logger.warning_once(f"config.json: {explained} It is kept, without effect.")

        rotary_only = {"rope_parameters": self.rope_parameters, **extra}
        given = [key for key in ("rope_parameters", "rope_scaling", "rope_theta") if rotary_only.get(key) is not None]
        if self.position_embedding_type == "learned" and given:
            raise ValueError(
                f"{given[0]}={rotary_only[given[0]]!r} is for rotary positions, but position_embedding_type is "
                "'learned'. Leave one of the two out."
            )
        if from_file:
            return
        for dtype in (self.dtype, extra.get("torch_dtype")):
            if isinstance(dtype, str) and dtype not in DTYPES:
                raise ValueError(f"dtype={dtype!r} is not a dtype of weights; give 'float32', 'bfloat16' or 'float16'.")
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = getattr(self, name)
            for token_id in ids if isinstance(ids, list) else [ids]:
                # -1 says "none" in many older configs, and transformers warns about it.
                if token_id is not None and token_id != -1 and not 0 <= token_id < self.vocab_size:
                    raise ValueError(
                        f"{name}={token_id} is not among the {self.vocab_size} ids of the vocabulary. Give the "
                        "tokenizer's own, and a vocab_size of at least len(tokenizer)."
                    )

    @classmethod
    def _explain_key(cls, key: str) -> str:
        known = {*(field.name for field in dataclasses.fields(cls)), *TRANSFORMERS_KEYS} - {"transformers_version"}
        nearest = difflib.get_close_matches(key, sorted(known), n=1)
        if key in OTHER_NAMES:
            hint = f"; here it is called {OTHER_NAMES[key]}"
        elif nearest:
            hint = f"; did you mean {nearest[0]!r}?"
        elif hasattr(GenerationConfig(), key):
            hint = ": it is an option of generation, and belongs in model.generation_config or in generate()"
        else:
            hint = ""
        return f"GPTConfig has no field {key!r}{hint}{'' if hint.endswith('?') else '.'}"

    def validate_architecture(self):
        """Reject values that cannot work, alone or together, with the reason; `@strict` calls it."""
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
        for name in sizes:
            if (value := getattr(self, name)) is None or value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1.")
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
        if self.hidden_act not in ACT2FN:
            nearest = difflib.get_close_matches(self.hidden_act, ACT2FN, n=1, cutoff=0.5)
            raise ValueError(
                f"hidden_act={self.hidden_act!r} is not an activation of transformers"
                f"{f'; did you mean {nearest[0]!r}?' if nearest else '.'} It has {', '.join(sorted(ACT2FN))}. "
                "SwiGLU is 'silu', GeGLU 'gelu', with gated_mlp=True."
            )
        # `not a > b` instead of `a <= b`, so that nan does not pass.
        for name in ("embedding_dropout", "attention_dropout", "residual_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a dropout is a probability in [0, 1).")
        for name in ("initializer_range", "embedding_initializer_range"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: a standard deviation is not negative.")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps={self.norm_eps}: it keeps a norm from dividing by 0; it must be above 0.")
        if self.final_logit_softcapping is not None and not self.final_logit_softcapping > 0:
            raise ValueError(
                f"final_logit_softcapping={self.final_logit_softcapping}: the cap is above 0; None is no cap."
            )
        self._check_rotary()

    def _check_rotary(self):
        rope = self.rope_parameters
        if self.position_embedding_type == "learned":
            if rope is not None:
                raise ValueError("rope_parameters are for rotary positions, but position_embedding_type is 'learned'.")
            return
        if self.head_dim % 2 != 0:
            raise ValueError(
                f"head_dim={self.head_dim} is odd, but rotary positions turn pairs of channels. Choose an even one, or "
                "position_embedding_type='learned'."
            )
        rope_type = rope["rope_type"]
        if rope_type not in ROPE_TYPES:
            raise ValueError(f"rope_parameters: there is no rope_type {rope_type!r}; there are {sorted(ROPE_TYPES)}.")
        if missing := [name for name in ROPE_TYPES[rope_type] if rope.get(name) is None]:
            raise ValueError(f"rope_parameters: the rope_type {rope_type!r} needs {' and '.join(missing)} as well.")
        if rope.get("partial_rotary_factor") not in (None, 1):
            raise ValueError(
                f"rope_parameters: partial_rotary_factor={rope['partial_rotary_factor']} would turn a part of each "
                "head; a GPT turns the whole."
            )
        for name in ("rope_theta", "factor"):
            if (value := rope.get(name)) is not None and not value > 0:
                raise ValueError(f"rope_parameters: {name}={value} must be above 0.")
        for name in ("short_factor", "long_factor"):
            if rope_type == "longrope" and len(rope[name]) != self.head_dim // 2:
                raise ValueError(
                    f"rope_parameters: {name} has {len(rope[name])} numbers, but head_dim={self.head_dim} has "
                    f"{self.head_dim // 2} pairs of channels."
                )


def explain_other_architecture(name: str | os.PathLike, model_type: str) -> str:
    """An error message: why another architecture's checkpoint or config is refused, and what opens it."""
    way = "hfllm.from_native makes it one."
    if model_type not in ("gpt2", "llama", "qwen3"):
        way = (
            "transformers.AutoModelForCausalLM opens it as what it is; hfllm.from_native makes a GPT of gpt2, llama "
            "and qwen3 checkpoints only."
        )
    return f"{name} is a {model_type!r} model, not a {GPTConfig.model_type!r}. {way}"


__all__ = ["GPTConfig"]
