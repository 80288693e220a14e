"""Open a recipe's model; a folder or id without such a model is rejected before any weight is loaded."""

import copy
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)


def open_config(name: str, *, adapter: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model, by its folder or Hub id; for a LoRA adapter's folder, the config of its base.

    With the adapter of a classifier, as `adapter` or in that folder, it is that of the classifier which the two make.

    Raises:
        ValueError: there is no such model; says what there is instead.
    """
    if adapter is None and (base := base_of_adapter(name)):
        return open_config(base, adapter=name, trust_remote_code=trust_remote_code)
    if base := base_of_adapter(name):
        config = open_config(base, trust_remote_code=trust_remote_code)
    else:
        config = _read_config(name, trust_remote_code=trust_remote_code)
    if adapter is not None:
        from ..adapters import head_of_adapter, read_adapter_config  # PEFT takes time to import

        if read_adapter_config(adapter).task_type == "SEQ_CLS":
            config.update(head_of_adapter(adapter))
            config.architectures = [AutoModelForSequenceClassification._model_mapping[type(config)].__name__]
    return config


def _read_config(name: str, *, trust_remote_code: bool) -> PreTrainedConfig:
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        found = sorted(path.name for path in folder.iterdir())[:10]
        raise ValueError(
            f"model={name} is a folder without a config.json, so there is no model in it yet; it holds {found}. "
            "A run writes its model when it ends: start it again with the same command to resume it."
        )
    if not (folder / "model.safetensors").exists() and any(folder.glob("model.shard-*")):
        raise ValueError(
            f"model={name} is a checkpoint in pieces, one for each process of a sharded run. Make it whole, and give "
            f"that folder: python recipes/export.py --model {name} --to whole --output_dir out/whole"
        )
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if folder.is_dir():
            raise ValueError(f"model={name} cannot be opened: {error}") from error
        raise ValueError(
            f"model={name!r} is neither a folder nor a model that the Hub sent: {str(error).splitlines()[0]} "
            "A private one needs `hf auth login`. Train one with recipes/pretrain.py, or give the folder of a run."
        ) from error


def check_fit(config: PreTrainedConfig, *, num_ids: int, block_size: int | None = None) -> None:
    """Raise a ValueError if the model has too few embeddings for a tokenizer's ids, or rows are too long for it."""
    if num_ids > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {num_ids:,} ids, but the model's vocab_size is {config.vocab_size:,}: it has no "
            "embedding for the last ones. Give the model's own tokenizer."
        )
    context = getattr(config, "max_position_embeddings", None)
    if block_size is not None and context is not None and block_size > context:
        raise ValueError(f"block_size={block_size} is longer than the model's context of {context:,} tokens.")


def open_causal_lm(name: str, *, trust_remote_code: bool = False, **options: Any) -> PreTrainedModel:
    """A causal language model, by its folder or Hub id; `options` go to `from_pretrained`.

    For a LoRA adapter's folder, such as a checkpoint of a fine-tuning run, it is the base with the adapter merged into
    it. A classifier is rejected: transformers would open it without its head, as a model that writes text.

    Raises:
        ValueError: there is no such model, its weights cannot be read, or it is not a causal language model.
    """
    if base := base_of_adapter(name):
        if _read_adapter_config(name).get("task_type") == "SEQ_CLS":
            raise ValueError(f"model={name} is the adapter of a classifier. Give the model that it was made from.")
        return _merged(open_causal_lm(base, trust_remote_code=trust_remote_code, **options), name)
    config = open_config(name, trust_remote_code=trust_remote_code)
    if other := [kind for kind in config.architectures or [] if kind.endswith("Classification")]:
        raise ValueError(
            f"model={name} is a {other[0]}, which was trained to label texts and not to write them. Give the model "
            "that it was made from."
        )
    try:
        return AutoModelForCausalLM.from_pretrained(name, config=config, trust_remote_code=trust_remote_code, **options)
    except SafetensorError as error:
        raise ValueError(f"model={name}: its weights cannot be read, save or download them again: {error}") from error


def open_classifier(name: str, *, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """A classifier of whole texts with this config; with a new head if the model has none for the config's labels.

    `name` is a folder or Hub id, or a LoRA adapter's folder, which is merged into its base. `options` are those of
    `from_pretrained`.

    Raises:
        ValueError: there is no such model, or its weights cannot be read.
    """
    source = open_config(name, trust_remote_code=options.get("trust_remote_code", False))
    is_classifier, keeps_head = _is_classifier(source), has_head_for(source, config)
    base = base_of_adapter(name)
    try:
        if keeps_head and base:
            return _merged(open_classifier(base, config=config, **options), name)
        if keeps_head or not (is_classifier or base):
            config = copy.deepcopy(config)
            config.architectures = source.architectures  # what was saved, and so whether a head is missing from it
            return AutoModelForSequenceClassification.from_pretrained(name, config=config, **options)
    except SafetensorError as error:
        raise ValueError(f"model={name}: its weights cannot be read, save or download them again: {error}") from error
    # Its weights without its head, under a new one.
    trained = open_classifier(name, config=source, **options) if is_classifier else open_causal_lm(name, **options)
    model = AutoModelForSequenceClassification.from_config(config, dtype=options.get("dtype"))
    model.base_model.load_state_dict(trained.base_model.state_dict())
    model.name_or_path = name
    return model


def has_head_for(source: PreTrainedConfig, config: PreTrainedConfig) -> bool:
    """Whether the model of `source` is a classifier with the labels and the problem_type of `config`."""
    is_same = source.id2label == config.id2label and source.problem_type in (None, config.problem_type)
    return _is_classifier(source) and is_same


def _is_classifier(config: PreTrainedConfig) -> bool:
    return any(kind.endswith("ForSequenceClassification") for kind in config.architectures or [])


def _merged(base: PreTrainedModel, adapter: str) -> PreTrainedModel:
    from ..adapters import load_adapter, merge_adapter  # PEFT takes time to import

    model = merge_adapter(load_adapter(base, adapter)).requires_grad_(True)  # PEFT froze the base's weights
    model.name_or_path = adapter  # an adapter that is trained on this model has it as its base
    return model


def base_of_adapter(name: str) -> str | None:
    """The base of the LoRA adapter in a folder; None if there is no folder, or a whole model in it."""
    folder = Path(name)
    if (folder / "config.json").exists() or not (folder / "adapter_config.json").exists():
        return None
    base = _read_adapter_config(name).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"model={name} is a LoRA adapter that does not name its base. Give the base as `model` and it as "
            "`adapter`, where there is that option."
        )
    return str(base)


def _read_adapter_config(name: str) -> dict[str, Any]:
    return json.loads((Path(name) / "adapter_config.json").read_text(encoding="utf-8"))
