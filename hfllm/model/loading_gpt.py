"""Loading a checkpoint: weights that do not fit the config are an error, an untested transformers is a warning.

This file travels with every checkpoint: it imports third-party packages only.
"""

import os
import re
from typing import Any

import transformers
from packaging import version
from transformers.utils import logging


logger = logging.get_logger(__name__)

# The newest release that the tests compare cached with uncached text on.
NEWEST_TESTED_TRANSFORMERS = "5.24"


def warn_if_transformers_is_untested() -> None:
    """Say once that a newer transformers is installed than these files were tested with, and what to check."""
    tested, installed = version.parse(NEWEST_TESTED_TRANSFORMERS), version.parse(transformers.__version__)
    if installed.release[:2] > tested.release[:2]:
        logger.warning_once(
            f"The code of this GPT was tested with transformers {tested} and older, and transformers {installed} is "
            "installed. A new release can change what `generate` passes to a model without an error: check that "
            "generate(..., do_sample=False) writes the same text with use_cache=True and use_cache=False, or install "
            f"'transformers<{tested.major}.{tested.minor + 1}'."
        )


class StrictLoadingMixin:
    """`from_pretrained` that raises an error where a checkpoint and its config do not fit, instead of warning."""

    config: Any
    base_model_prefix: str

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs,
    ):
        """transformers' own, except that weights which do not fit the config raise an error that names them.

        transformers draws missing weights at random and leaves surplus ones out, with a warning. That is right for a
        new head and for layers that a smaller `num_hidden_layers` leaves out; anywhere else the model would be broken.
        `output_loading_info=True` returns the lists instead.
        """
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        if "float8" in str(dtype):
            raise ValueError(
                f"dtype={dtype}: torch only stores numbers in it. Load with torch.bfloat16 or torch.float16; weights "
                "of 8 bits need a quantization_config, e.g. transformers.TorchAoConfig."
            )
        loaded: Any = super()  # a mixin: `from_pretrained` is PreTrainedModel's
        model, loading_info = loaded.from_pretrained(
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
                "Saved with tied weights, it has none. Load it with tied weights; to untie them then, copy the "
                "embedding: model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone()), "
                "model.config.tie_word_embeddings = False."
            )
        raise ValueError(
            f"The checkpoint {str(name)!r} does not fit: {'; '.join(parts)}. {reason} "
            "from_pretrained(..., output_loading_info=True) returns the model as it is, and the lists."
        )

    def _is_left_out_layer(self, key: str) -> bool:
        match = re.match(rf"(?:{self.base_model_prefix}\.)?layers\.(\d+)\.", key)
        return match is not None and int(match[1]) >= self.config.num_hidden_layers
