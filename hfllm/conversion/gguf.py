"""A native gpt2, llama or qwen3 model and its tokenizer as one GGUF file, for llama.cpp and programs based on it."""

import contextlib
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .gguf_tokenizer import GGUFTokenizer, describe_tokenizer


logger = logging.getLogger(__name__)

DTYPES = ("f32", "f16", "bf16", "q8_0")
ARCHITECTURES = ("gpt2", "llama", "qwen3")  # transformers' model types; llama.cpp calls them the same
Q8_BLOCK = 32  # weights of a row that share one scale


def export_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike,
    *,
    dtype: str = "f32",
) -> Path:
    """Write model and tokenizer as one GGUF file; `verify_gguf` then checks that it is the same model.

    `dtype` is the type of the matrices: "f32", "f16", "bf16", or "q8_0" (8 bits and a scale for each 32 weights, 34
    bytes for 32). Norms, biases and the table of positions stay in float32. The file is written under a temporary name
    and renamed, so it is whole or absent; an older one is replaced. Only one tensor at a time is in memory.

    Raises:
        ValueError: for a model, tokenizer or path that cannot be a GGUF file; names all obstacles.
        OSError: if the file could not be written; nothing of it is left.
    """
    gguf = import_gguf()
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}.")
    path = Path(path)
    if path.suffix != ".gguf":
        raise ValueError(f"{str(path)!r} does not end in .gguf, by which programs recognise a GGUF file.")
    if obstacles := gguf_obstacles(model):
        raise ValueError("This model cannot be written as GGUF:\n" + "\n".join(f"- {line}" for line in obstacles))
    description = describe_tokenizer(tokenizer, model)

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    writer = gguf.GGUFWriter(partial, model.config.model_type)
    writer.add_type("model")
    writer.add_name(path.stem)
    writer.add_file_type(getattr(gguf.LlamaFileType, "ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"))
    if dtype == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_architecture(writer, model.config)
    _add_tokenizer(writer, description)
    total_bytes = _add_tensor_list(writer, model, dtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in gguf_tensors(model):
            writer.write_tensor_data(_stored(name, tensor, dtype))
        writer.close()
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            writer.close()
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                f"{str(path)!r} could not be written ({error}), and nothing is left of it. It needs "
                f"{total_bytes / 2**20:,.1f} MiB and the tokenizer."
            ) from error
        raise
    return path


def import_gguf() -> ModuleType:
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the gguf package: pip install -e '.[export]'") from error
    return gguf


def gguf_obstacles(model: PreTrainedModel) -> list[str]:
    """The features of a model that llama.cpp does not have, one sentence each; empty if it can be exported."""
    config = model.config
    if config.model_type not in ARCHITECTURES or model.get_output_embeddings() is None:
        hint = " Convert it first: hfllm.to_native(model)." if config.model_type == "hfllm_gpt" else ""
        return [f"It is a {type(model).__name__} ({config.model_type}), not a gpt2, llama or qwen3 causal LM.{hint}"]
    obstacles = []
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.is_floating_point():
            where = "on the meta device (offloaded)" if parameter.is_meta else f"of {parameter.dtype} (quantized)"
            obstacles.append(f"{name} is {where}: load the model whole, in a floating dtype.")
            break
    if config.model_type == "gpt2":
        return obstacles + _gpt2_obstacles(config)
    if config.hidden_act != "silu":
        obstacles.append(f"hidden_act={config.hidden_act!r}: llama.cpp's {config.model_type} has silu.")
    if config.model_type == "qwen3" and config.attention_bias:
        obstacles.append("attention_bias=True: llama.cpp's qwen3 has no bias after the attention. Train without it.")
    if any(layer != "full_attention" for layer in getattr(config, "layer_types", None) or []):
        obstacles.append("use_sliding_window=True: llama.cpp's qwen3 attends to the whole text.")
    return obstacles + _rope_obstacles(config)


def _gpt2_obstacles(config: PreTrainedConfig) -> list[str]:
    obstacles = []
    if config.activation_function not in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_python_tanh"):
        obstacles.append(
            f"activation_function={config.activation_function!r}: llama.cpp's gpt2 has the tanh form of GELU, gelu_new."
        )
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        obstacles.append(
            "scale_attn_weights and scale_attn_by_inverse_layer_idx: llama.cpp's gpt2 divides by sqrt(head_dim) only."
        )
    if config.add_cross_attention:
        obstacles.append("add_cross_attention=True: llama.cpp's gpt2 is a decoder alone.")
    return obstacles


def _rope_obstacles(config: PreTrainedConfig) -> list[str]:
    rope = config.rope_parameters
    rope_type = rope["rope_type"]
    obstacles = []
    if rope_type not in ("default", "linear", "yarn") and (rope_type, config.model_type) != ("llama3", "llama"):
        known = "default, linear, yarn" + (" and llama3" if config.model_type == "llama" else "")
        obstacles.append(f"rope_type={rope_type!r}: llama.cpp's {config.model_type} has {known}.")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        obstacles.append(f"partial_rotary_factor={rope['partial_rotary_factor']}: llama.cpp turns whole heads.")
    if rope_type == "yarn":
        defaults = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
        changed = {name: rope[name] for name in defaults if rope.get(name) not in (None, defaults[name])}
        if changed:
            obstacles.append(f"YaRN with {changed}: llama.cpp's {config.model_type} always uses {defaults}.")
    return obstacles


def _add_architecture(writer: Any, config: PreTrainedConfig) -> None:
    """The shape, by llama.cpp's names. transformers' GPT2Config has the common names as well."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner if config.n_inner is not None else 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    _add_rope(writer, config)


def _add_rope(writer: Any, config: PreTrainedConfig) -> None:
    """Frequencies and their scaling; llama3's scaling is a tensor, see `gguf_tensors`."""
    types = import_gguf().RopeScalingType
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(types.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "yarn":
        original_length = rope["original_max_position_embeddings"]
        factor = rope["factor"] or config.max_position_embeddings / original_length
        writer.add_rope_scaling_type(types.YARN)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_orig_ctx_len(original_length)
        # Both multiply cos and sin by a factor (Peng et al. 2023, section 3.4). llama.cpp computes the paper's factor
        # and multiplies it by this key; transformers' config may have another factor.
        _, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](config, device="cpu")
        writer.add_rope_scaling_attn_factors(attention_factor / (0.1 * math.log(factor) + 1))


def _add_tokenizer(writer: Any, tokenizer: GGUFTokenizer) -> None:
    writer.add_tokenizer_model("gpt2")  # any byte-level BPE
    writer.add_tokenizer_pre(tokenizer.pre)
    writer.add_token_list(tokenizer.tokens)
    writer.add_token_types(tokenizer.token_types)
    writer.add_token_merges(tokenizer.merges)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    if tokenizer.eot_id is not None:
        writer.add_eot_token_id(tokenizer.eot_id)
    if tokenizer.pad_id is not None:
        writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(tokenizer.add_bos)
    writer.add_add_eos_token(tokenizer.add_eos)
    if isinstance(tokenizer.chat_template, dict):
        writer.add_chat_template([{"name": name, "template": text} for name, text in tokenizer.chat_template.items()])
    elif tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def gguf_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the file, by its name there, in the layout of llama.cpp and the model's own dtype."""
    gguf = import_gguf()
    config = model.config
    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    head = model.get_output_embeddings().weight
    is_tied = head.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and is_tied:
            continue  # llama.cpp uses the embedding if there is no output.weight
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if gguf_name is None:
            raise ValueError(
                f"{name} has no name in llama.cpp's {config.model_type}. Merge a model with adapters first: "
                "model.merge_and_unload()."
            )
        if config.model_type == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            tensor = tensor.T  # Conv1D has (in, out), llama.cpp expects (out, in), as in Linear
        elif config.model_type == "llama" and "q_proj" in name:
            tensor = _interleave_halves(tensor, config.num_attention_heads)
        elif config.model_type == "llama" and "k_proj" in name:
            tensor = _interleave_halves(tensor, config.num_key_value_heads)
        yield gguf_name, tensor
    if config.model_type == "llama" and config.rope_parameters["rope_type"] == "llama3":
        yield "rope_freqs.weight", _llama3_frequency_divisors(config)


def _interleave_halves(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Reorder a projection's output channels, (H * D, C) or a bias (H * D,), for llama.cpp's llama.

    It rotates the pairs (2i, 2i + 1) of a head, where transformers and llama.cpp's qwen3 rotate (i, i + D/2).
    """
    halves = weight.unflatten(0, (num_heads, 2, -1))  # (H * D, ...) -> (H, 2, D/2, ...)
    return halves.transpose(1, 2).flatten(0, 2)


def _llama3_frequency_divisors(config: PreTrainedConfig) -> torch.Tensor:
    """The divisors (D/2,) of llama.cpp's frequencies, from transformers' own frequencies."""
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device="cpu")
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    return (config.rope_parameters["rope_theta"] ** -exponents / scaled.double()).float()


def _storage(gguf: ModuleType, name: str, shape: torch.Size, dtype: str) -> Any:
    """The storage type of a tensor. llama.cpp adds vectors and looks up positions in float32 only."""
    if len(shape) == 1 or name == "position_embd.weight":
        return gguf.GGMLQuantizationType.F32
    if dtype == "q8_0" and shape[-1] % Q8_BLOCK:
        return gguf.GGMLQuantizationType.F16  # as llama.cpp's own tools do
    return gguf.GGMLQuantizationType[dtype.upper()]


def _add_tensor_list(writer: Any, model: PreTrainedModel, dtype: str) -> int:
    """Write names, shapes and types, which come before all tensors; returns the bytes of the tensors."""
    gguf = import_gguf()
    total_bytes, halves = 0, []
    for name, tensor in gguf_tensors(model):
        storage = _storage(gguf, name, tensor.shape, dtype)
        block, block_bytes = gguf.GGML_QUANT_SIZES[storage]
        num_bytes = tensor.numel() // block * block_bytes
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), num_bytes, raw_dtype=storage)
        total_bytes += num_bytes
        if dtype == "q8_0" and storage == gguf.GGMLQuantizationType.F16:
            halves.append(name)
    if halves:
        logger.warning(
            "%d matrices have rows whose length is not a multiple of %d; these are stored as f16 instead of q8_0: %s.",
            len(halves),
            Q8_BLOCK,
            ", ".join(halves[:3]) + (", ..." if len(halves) > 3 else ""),
        )
    return total_bytes


def _stored(name: str, tensor: torch.Tensor, dtype: str) -> Any:
    """The tensor's bytes, as a numpy array."""
    gguf = import_gguf()
    array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
    largest = float(abs(array).max()) if array.size else 0.0
    if not math.isfinite(largest):
        raise ValueError(f"{name} holds a NaN or an infinity: the training went wrong. Take an earlier checkpoint.")
    storage = _storage(gguf, name, tensor.shape, dtype)
    # A block's scale, its largest weight / 127, is a float16 too.
    limit = {gguf.GGMLQuantizationType.F16: 65504.0, gguf.GGMLQuantizationType.Q8_0: 65504.0 * 127}.get(storage)
    if limit is not None and largest > limit:
        raise ValueError(
            f"{name} has the weight {largest:.3g}, and {storage.name} ends at {limit:.3g}. Use dtype='bf16'."
        )
    return gguf.quantize(array, storage)
