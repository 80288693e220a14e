"""Load a causal language model from a folder or the Hub, without any random weights."""

import re
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from ..model import GPTConfig, GPTForCausalLM


NATIVE_TYPES = ("gpt2", "llama", "qwen3")


def native_class(native_type: str) -> type[PreTrainedModel]:
    """transformers' causal language model class of that type."""
    from transformers import GPT2LMHeadModel, LlamaForCausalLM, Qwen3ForCausalLM  # here: each takes time to import

    return {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM, "qwen3": Qwen3ForCausalLM}[native_type]


def load_causal_lm(name: str | PathLike, **kwargs: Any) -> PreTrainedModel:
    """The causal language model of a folder or an id of the Hub, if it is ours or a native gpt2, llama or qwen3.

    Unlike with `from_pretrained`, no weight is ever random: missing weights, surplus ones and other shapes are an error
    that names them. `kwargs` go to `from_pretrained`.
    """
    name = str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else str(name)
    config = _read_config(name, kwargs)
    model_type = config.get("model_type")
    if model_type not in (GPTConfig.model_type, *NATIVE_TYPES):
        pattern = r"(num|n)_(local_|routed_)?experts"
        experts = next((key for key in config if re.fullmatch(pattern, key) and config[key]), None)
        what = f"a mixture of experts ({experts}={config[experts]})" if experts else f"of the type {model_type!r}"
        raise ValueError(
            f"{name!r} is {what}. Conversion knows our own models and the dense {', '.join(NATIVE_TYPES)} classes of "
            "transformers. AutoModelForCausalLM opens the others as they are."
        )
    model_class = GPTForCausalLM if model_type == GPTConfig.model_type else native_class(model_type)
    base_names = {f"{model_class.__name__.removesuffix('ForCausalLM').removesuffix('LMHeadModel')}Model"}
    other = set(config.get("architectures") or []) - {model_class.__name__} - base_names
    if other:
        raise ValueError(
            f"{name!r} is a {', '.join(sorted(other))}; only causal language models ({model_class.__name__}) are "
            "converted. Give the model that it was trained from."
        )
    if config.get("quantization_config") or kwargs.get("quantization_config"):
        raise ValueError(
            f"{name!r} is quantized; only weights in full precision (float32, bfloat16, float16) are converted. Give "
            "the checkpoint that it was quantized from."
        )
    try:
        model, info = model_class.from_pretrained(
            name, output_loading_info=True, **{"ignore_mismatched_sizes": True, **kwargs}
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"The weights of {name!r} could not be loaded: {error}") from error
    _check_loading(name, model_class, info)
    return model


def _read_config(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The content of a checkpoint's config.json, before any class is chosen for it."""
    path = Path(name) / kwargs.get("subfolder", "")
    adapter = (
        f"{name!r} is a LoRA adapter, not a whole model. Merge it into the model it was trained on "
        "(`AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload()`), save that, and give its folder."
    )
    if path.is_dir():
        if (path / "adapter_config.json").exists():
            raise ValueError(adapter)
        if not (path / "config.json").exists():
            found = sorted(child.name for child in path.iterdir())[:10]
            raise ValueError(
                f"{name!r} is a folder without a config.json, so there is no model in it; it holds {found}."
            )
    elif path.exists() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ValueError(
            f"{name!r} is not a folder. Give a model's folder, or an id of the Hub such as 'openai-community/gpt2'."
        )
    hub_options = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, **{key: kwargs[key] for key in hub_options if key in kwargs})
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{name!r} is neither a model's folder nor a model that the Hub sent: {reason} A private one needs "
            "`hf auth login`."
        ) from error
    if not config:
        raise ValueError(f"{name!r} has no config.json, so there is no model in it.")
    return config


def _check_loading(name: str, model_class: type[PreTrainedModel], info: dict[str, Any]) -> None:
    mismatched = [f"{key} {tuple(found)} for {tuple(expected)}" for key, found, expected in info["mismatched_keys"]]
    for faults, what in (
        (info["missing_keys"], "has no weights for"),
        (mismatched, "has weights of another shape:"),
        (info["unexpected_keys"], "has weights without a place:"),
    ):
        if faults:
            names = ", ".join(sorted(faults)[:5]) + (f" and {len(faults) - 5:,} more" if len(faults) > 5 else "")
            raise ValueError(
                f"{name!r} {what} {names}. It is not the {model_class.__name__} that its config.json says; nothing was "
                "converted."
            )
