"""Conversion between our GPT and transformers' native gpt2, llama and qwen3: `from_native` and `to_native`.

Both only copy numbers, so logits agree up to rounding and the way back gives the same tensors to the bit. llama and
qwen3 have our names and layouts. gpt2 has transposed matrices (its `Conv1D` multiplies from the other side) and one
matrix for queries, keys and values.
"""

import copy
import logging
import re
from os import PathLike
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from ..model import PRESETS, GPTConfig, GPTForCausalLM
from .loading import NATIVE_TYPES, load_causal_lm, native_class


logger = logging.getLogger(__name__)

# The values that a config needs to be one of the native classes. Everything else has a field there, or can be expressed
# exactly: a bias that only theirs has becomes zeros.
_ROTARY_DECODER = {
    "position_embedding_type": "rotary",
    "norm_type": "rms_norm",
    "gated_mlp": True,
    "final_logit_softcapping": None,
    "classifier_pooling": "last",
}
_NEEDED: dict[str, dict[str, Any]] = {
    "gpt2": {
        "position_embedding_type": "learned",
        "norm_type": "layer_norm",
        "gated_mlp": False,
        "use_qk_norm": False,
        "final_logit_softcapping": None,
        "classifier_pooling": "last",
    },
    "llama": {**_ROTARY_DECODER, "use_qk_norm": False},
    "qwen3": {**_ROTARY_DECODER, "use_qk_norm": True, "mlp_bias": False},
}
_IN_WORDS = {
    ("position_embedding_type", "rotary"): "rotary positions",
    ("position_embedding_type", "learned"): "a table of learned positions",
    ("norm_type", "rms_norm"): "RMSNorm",
    ("norm_type", "layer_norm"): "LayerNorm",
    ("gated_mlp", True): "an MLP with a gate",
    ("gated_mlp", False): "an MLP without a gate",
    ("use_qk_norm", True): "a norm over each head's queries and keys",
    ("use_qk_norm", False): "no norm over queries and keys",
    ("mlp_bias", False): "no biases in its MLP",
    ("final_logit_softcapping", None): "no cap on its logits",
    ("classifier_pooling", "last"): "classifiers that read the last token",
}

# gpt2's names for the parts of a block, and ours. `attn.c_attn` is our three projections side by side.
_GPT2_BLOCK = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
    "mlp.act": "mlp.act_fn",
}
_GPT2_TOP = {"wte": "embed_tokens", "wpe": "embed_positions", "ln_f": "norm"}
_GPT2_TRANSPOSED = ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")
_PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")

Tensors = dict[str, torch.Tensor]


def from_native(model: str | PathLike | PreTrainedModel, **kwargs: Any) -> GPTForCausalLM:
    """A native gpt2, llama or qwen3 as our GPT: the same logits, in the same dtype, with weights of its own.

    `model` is a folder, an id of the Hub, or a model in memory, and stays as it is. `kwargs` go to the native class's
    `from_pretrained`: `dtype` (to train a checkpoint in half precision further, ask for float32), `revision`, `token`,
    `attn_implementation` and so on. Special tokens, the generation config, tied or untied heads and every kind of rope
    scaling are carried over; the tokenizer is not touched.

    Raises:
        ValueError: for a model that cannot be converted (another class or head, a mixture of experts, quantized
        weights, an option without a counterpart), or with missing or surplus weights or other shapes; says which.
    """
    if isinstance(model, (str, PathLike)):
        model = load_causal_lm(model, **kwargs)
        if isinstance(model, GPTForCausalLM):
            raise ValueError("This model is an hfllm GPT already: open it with GPTForCausalLM.from_pretrained.")
    elif kwargs:
        raise ValueError(f"{sorted(kwargs)} belong to loading, but a model in memory was given.")
    native_type = _check_native(model)

    tensors = _own_tensors(model)
    if native_type == "gpt2":
        tensors = _rename_from_gpt2(tensors)
    config = _our_config(native_type, model.config, is_tied=_is_tied(model))
    return _build(GPTForCausalLM, config, tensors, like=model)


def to_native(model: GPTForCausalLM, native_type: str | None = None) -> PreTrainedModel:
    """Our GPT as a native gpt2, llama or qwen3: the same logits, in the same dtype, with weights of its own.

    Without `native_type` it is the first class that fits: qwen3, then llama, then gpt2. A bias that ours lacks and the
    native class always has, such as those of the book's `qkv_bias=False`, becomes zeros, which is exact. Dropouts
    without a field in the native config are dropped with a warning; they do nothing after training.

    Raises:
        ValueError: if the config does not fit that class; names each field that prevents it (see `native_obstacles`).
    """
    if not isinstance(model, GPTForCausalLM):
        raise ValueError(f"to_native takes a GPTForCausalLM, not a {type(model).__name__}.{_advice(model)}")
    _check_weights(model)
    nearest = _nearest_type(model.config)
    if obstacles := native_obstacles(model.config, native_type or nearest):
        if native_type is None:
            failure = f"This model is none of {', '.join(NATIVE_TYPES)}. The nearest is {nearest}, but for:"
        elif native_obstacles(model.config, nearest):
            failure = f"This model is no {native_type}:"
        else:
            failure = f"This model is a {nearest}, and no {native_type}:"
        raise ValueError("\n  - ".join([failure, *obstacles]))
    native_type = native_type or nearest
    for note in _notes(model.config, native_type):
        logger.warning(note)

    config = _native_config(native_type, model.config, is_tied=_is_tied(model))
    tensors = _own_tensors(model)
    _add_missing_biases(tensors, model.config, native_type, attention=getattr(config, "attention_bias", True))
    if native_type == "gpt2":
        tensors = _rename_to_gpt2(tensors)
    return _build(native_class(native_type), config, tensors, like=model)


def native_obstacles(config: GPTConfig, native_type: str) -> list[str]:
    """Why a model of this config is not a native gpt2, llama or qwen3: a sentence for each field that prevents it.

    Each names the field, its value, the native class's value, and what to train with next time. Empty: it can be
    converted.
    """
    if native_type not in NATIVE_TYPES:
        raise ValueError(f"There is no conversion to {native_type!r}; there are {', '.join(NATIVE_TYPES)}.")
    obstacles = []
    preset = "book" if native_type == "gpt2" else "modern"
    for name, needed in _NEEDED[native_type].items():
        if (value := getattr(config, name)) != needed:
            as_text = {True: "true", False: "false", None: "null"}.get(needed, needed)
            by_preset = f", which is what preset={preset} has" if PRESETS[preset].get(name) == needed else ""
            obstacles.append(
                f"{name}={value!r}, but {native_type} has {_IN_WORDS[name, needed]}. Next time, pretrain with "
                f"config_overrides: {name}={as_text}{by_preset}."
            )
    heads = config.num_attention_heads
    if native_type == "gpt2" and config.num_key_value_heads != heads:
        obstacles.append(
            f"num_key_value_heads={config.num_key_value_heads}, but gpt2 has as many as query heads, {heads}. Next "
            "time, pretrain without num_key_value_heads."
        )
    if native_type == "gpt2" and config.head_dim != config.hidden_size / heads:
        obstacles.append(
            f"head_dim={config.head_dim}, but gpt2's heads share out hidden_size={config.hidden_size} among the "
            f"{heads} of them. Next time, pretrain with config_overrides: head_dim=null."
        )
    if native_type == "llama" and config.hidden_size % heads != 0:
        obstacles.append(
            f"hidden_size={config.hidden_size} is not a multiple of num_attention_heads={heads}, which llama needs "
            "with any head_dim. Next time, pretrain with a num_attention_heads that divides hidden_size."
        )
    if native_type != "gpt2" and (config.pad_token_id or 0) >= config.vocab_size:
        obstacles.append(
            f"pad_token_id={config.pad_token_id}, but {native_type} has an embedding for it, and vocab_size="
            f"{config.vocab_size}. Set model.config.pad_token_id to an id of the vocabulary, or to None."
        )
    return obstacles


def _check_native(model: Any) -> str:
    """The model type of a native causal language model that ours can be; otherwise an error."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in NATIVE_TYPES or not isinstance(model, native_class(model_type)):
        classes = ", ".join(native_class(native_type).__name__ for native_type in NATIVE_TYPES)
        raise ValueError(f"from_native takes one of {classes}, not a {type(model).__name__}.{_advice(model)}")
    _check_weights(model)
    if model_type == "gpt2":
        for field, needed in (
            ("scale_attn_weights", True),
            ("scale_attn_by_inverse_layer_idx", False),
            ("reorder_and_upcast_attn", False),
            ("add_cross_attention", False),
        ):
            if getattr(model.config, field) != needed:
                raise ValueError(f"This gpt2 has {field}={not needed}, which our GPT has no counterpart for.")
    if model_type == "qwen3" and (other_layers := set(model.config.layer_types) - {"full_attention"}):
        raise ValueError(
            f"This qwen3 has layers of {', '.join(sorted(other_layers))} (layer_types; use_sliding_window="
            f"{model.config.use_sliding_window}), which our GPT has no counterpart for."
        )
    return model_type


def _check_weights(model: PreTrainedModel) -> None:
    """Raise a ValueError unless all weights are plain and loaded, so that they can be copied."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("This model carries a LoRA adapter: merge it first, with PEFT's merge_and_unload().")
    quantized = next((p.dtype for p in model.parameters() if not p.is_floating_point()), None)
    if quantized is not None or getattr(model, "is_quantized", False):
        raise ValueError("This model is quantized; only weights in full precision are converted.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("Some of this model's weights are offloaded: load it without device_map to convert it.")


def _advice(model: Any) -> str:
    if isinstance(model, GPTForCausalLM):
        return " It is an hfllm GPT already."
    if hasattr(model, "merge_and_unload"):
        return " Merge the adapter first: model.merge_and_unload()."
    if (pooling := getattr(getattr(model, "config", None), "classifier_pooling", "last")) != "last":
        return (
            f" Only causal language models are converted, and this classifier has classifier_pooling={pooling!r}, "
            "where transformers' own classes read the last token: there is no native class for it."
        )
    if isinstance(model, PreTrainedModel):
        return " Only causal language models are converted; other heads are trained on them afterwards."
    return ""


def _nearest_type(config: GPTConfig) -> str:
    """The type with the fewest obstacles, 0 if one fits; of equals the first."""
    return min(("qwen3", "llama", "gpt2"), key=lambda native_type: len(native_obstacles(config, native_type)))


def _notes(config: GPTConfig, native_type: str) -> list[str]:
    """The settings that are not carried over; none of them changes a logit."""
    notes = []
    dropouts = () if native_type == "gpt2" else ("embedding_dropout", "residual_dropout")
    for name in dropouts:
        if (value := getattr(config, name)) > 0:
            notes.append(f"{name}={value} is dropped: {native_type} has none. It matters only for further training.")
    return notes


def _is_tied(model: PreTrainedModel) -> bool:
    """Whether the weights themselves are tied; a config may say so for a checkpoint with two different matrices."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _shared_fields(config: PreTrainedConfig, *, is_tied: bool) -> dict[str, Any]:
    """The fields that all four configs have, under names that all four understand."""
    names = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]
    names += ["use_cache", "bos_token_id", "eos_token_id", "pad_token_id"]
    fields = {name: getattr(config, name) for name in names}
    return fields | {"initializer_range": float(config.initializer_range), "tie_word_embeddings": is_tied}


def _our_config(native_type: str, config: PreTrainedConfig, *, is_tied: bool) -> GPTConfig:
    fields = _shared_fields(config, is_tied=is_tied)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = fields[name] if isinstance(fields[name], list) else [fields[name]]
        if any(token_id is not None and token_id >= config.vocab_size for token_id in ids):
            # GPT2Config's own default is 50256, whatever the vocabulary.
            logger.warning(f"{name}={fields[name]} is left out: the vocabulary has {config.vocab_size} ids.")
            fields[name] = None
    if native_type == "gpt2":
        # "gelu_new" is the same function as "gelu_pytorch_tanh", in eight passes over memory instead of one.
        activation = config.activation_function
        return GPTConfig.from_preset(
            "book",
            **fields,
            intermediate_size=config.n_inner or 4 * config.n_embd,
            norm_eps=config.layer_norm_epsilon,
            hidden_act="gelu_pytorch_tanh" if activation == "gelu_new" else activation,
            embedding_dropout=config.embd_pdrop,
            attention_dropout=config.attn_pdrop,
            residual_dropout=config.resid_pdrop,
        )
    return GPTConfig.from_preset(
        "modern",
        **fields,
        intermediate_size=config.intermediate_size,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rope_parameters=copy.deepcopy(config.rope_parameters),
        norm_eps=config.rms_norm_eps,
        use_qk_norm=native_type == "qwen3",
        hidden_act=config.hidden_act,
        attention_bias=config.attention_bias,
        attention_output_bias=config.attention_bias,
        mlp_bias=getattr(config, "mlp_bias", False),
        attention_dropout=config.attention_dropout or 0.0,
    )


def _native_config(native_type: str, config: GPTConfig, *, is_tied: bool) -> PreTrainedConfig:
    fields = _shared_fields(config, is_tied=is_tied)
    config_class = native_class(native_type).config_class
    if native_type == "gpt2":
        return config_class(
            **fields,
            n_inner=None if config.intermediate_size == 4 * config.hidden_size else config.intermediate_size,
            layer_norm_epsilon=float(config.norm_eps),
            activation_function="gelu_new" if config.hidden_act == "gelu_pytorch_tanh" else config.hidden_act,
            embd_pdrop=config.embedding_dropout,
            attn_pdrop=config.attention_dropout,
            resid_pdrop=config.residual_dropout,
        )
    if native_type == "llama":
        fields["mlp_bias"] = config.mlp_bias
    return config_class(
        **fields,
        intermediate_size=config.intermediate_size,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rope_parameters=copy.deepcopy(config.rope_parameters),
        rms_norm_eps=float(config.norm_eps),
        hidden_act=config.hidden_act,
        attention_bias=config.attention_bias or config.attention_output_bias,
        attention_dropout=config.attention_dropout,
    )


def _own_tensors(model: PreTrainedModel) -> Tensors:
    """Copies of all weights by name; the head of a tied model is left out."""
    head = {"lm_head.weight"} if _is_tied(model) else set()
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if name not in head}


def _add_missing_biases(tensors: Tensors, config: GPTConfig, native_type: str, *, attention: bool) -> None:
    """Zeros for the biases that the native class has and ours lacks."""
    parts = [*_PROJECTIONS, "self_attn.o_proj"] if attention else []
    parts += ["mlp.up_proj", "mlp.down_proj"] if native_type == "gpt2" else []
    for layer in range(config.num_hidden_layers):
        for part in parts:
            weight = tensors[f"model.layers.{layer}.{part}.weight"]
            tensors.setdefault(f"model.layers.{layer}.{part}.bias", weight.new_zeros(weight.shape[0]))


def _rename_from_gpt2(tensors: Tensors) -> Tensors:
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        if name == "lm_head.weight":
            renamed[name] = tensor
        elif block := re.fullmatch(r"transformer\.h\.(\d+)\.(.+)\.(\w+)", name):
            layer, part, kind = block.groups()
            if part == "attn.c_attn":  # weight (C, 3 * C), bias (3 * C)
                for projection, third in zip(_PROJECTIONS, tensor.chunk(3, dim=-1)):
                    renamed[f"model.layers.{layer}.{projection}.{kind}"] = third.t().contiguous()
            else:
                tensor = tensor.t().contiguous() if part in _GPT2_TRANSPOSED else tensor
                renamed[f"model.layers.{layer}.{_GPT2_BLOCK[part]}.{kind}"] = tensor
        else:
            _, part, kind = name.split(".")
            renamed[f"model.{_GPT2_TOP[part]}.{kind}"] = tensor
    return renamed


def _rename_to_gpt2(tensors: Tensors) -> Tensors:
    block_names = {ours: theirs for theirs, ours in _GPT2_BLOCK.items()}
    top_names = {ours: theirs for theirs, ours in _GPT2_TOP.items()}
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        if name == "lm_head.weight":
            renamed[name] = tensor
        elif block := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(\w+)", name):
            layer, part, kind = block.groups()
            if part == _PROJECTIONS[0]:
                thirds = [tensors[f"model.layers.{layer}.{projection}.{kind}"].t() for projection in _PROJECTIONS]
                renamed[f"transformer.h.{layer}.attn.c_attn.{kind}"] = torch.cat(thirds, dim=-1)
            elif part not in _PROJECTIONS:
                part = block_names[part]
                tensor = tensor.t().contiguous() if part in _GPT2_TRANSPOSED else tensor
                renamed[f"transformer.h.{layer}.{part}.{kind}"] = tensor
        else:
            _, part, kind = name.split(".")
            renamed[f"transformer.{top_names[part]}.{kind}"] = tensor
    return renamed


def _build(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: Tensors, *, like: PreTrainedModel
) -> Any:
    """A model around the tensors, on the device, in the dtypes and the mode (training or not) of another."""
    config.dtype = like.dtype
    config._attn_implementation = like.config._attn_implementation
    with init.no_init_weights():
        model = model_class(config)
    if config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors[next(name for name in tensors if re.search(r"(embed_tokens|wte)\.", name))]
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.generation_config = copy.deepcopy(like.generation_config)
    return model.to(like.device).train(like.training)
