"""Kinds of models that can be measured: causal models and classifiers, whole or as an adapter on a base."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import PretrainedConfig


Kind = Literal["causal", "classifier"]


def find_kind(configs: Mapping[str, PretrainedConfig], *, adapter: str | None = None) -> Kind:
    """The kind of the models with these names and configs, which must all be of one kind.

    `adapter` is a PEFT adapter for them. If it is a classifier's, its labels are written into the configs, in place.

    Raises:
        ValueError: a model cannot be measured, or the models are of different kinds.
    """
    kinds = {name: _kind_of(name, config) for name, config in configs.items()}
    if adapter is not None and adapter_config(adapter).task_type == "SEQ_CLS":
        for name, config in configs.items():
            if kinds[name] == "causal":
                config.id2label = adapter_labels(adapter)
                config.label2id = {label: index for index, label in config.id2label.items()}
            kinds[name] = "classifier"
    if len(set(kinds.values())) > 1:
        listing = ", ".join(f"{name} is a {kind} model" for name, kind in kinds.items())
        raise ValueError(
            f"Only models of one kind can be compared, and these are of two: {listing}. Measure each separately."
        )
    kind = next(iter(kinds.values()))
    if kind == "classifier":
        for name, config in configs.items():
            if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
                raise ValueError(
                    f"model {name} has {config.num_labels} outputs for {config.problem_type or 'regression'}. Only "
                    "classifiers that choose one of several labels can be measured."
                )
    return kind


def _kind_of(name: str, config: PretrainedConfig) -> Kind:
    architecture = next(iter(config.architectures or []), "causal model")
    if architecture.endswith("ForSequenceClassification"):
        return "classifier"
    if "Classification" in architecture:
        raise ValueError(
            f"model {name} is a {architecture}. Only causal models and classifiers of whole texts can be measured."
        )
    return "causal"


def adapter_config(adapter: str) -> Any:
    """PEFT's config of the adapter."""
    from peft import PeftConfig  # takes seconds to import

    folder = Path(adapter).expanduser()
    if folder.is_dir() and not (folder / "adapter_config.json").exists():
        raise ValueError(f"adapter {adapter} is a folder without an adapter_config.json, so not a PEFT adapter.")
    try:
        return PeftConfig.from_pretrained(str(folder) if folder.is_dir() else adapter)
    except (OSError, ValueError) as error:
        raise ValueError(f"adapter {adapter!r} is not a PEFT adapter: {str(error).splitlines()[0]}") from error


def adapter_labels(adapter: str) -> dict[int, str]:
    """A classifier's labels: from its adapter, or from the config.json beside it or one folder above."""
    folder = Path(adapter).expanduser()
    for path in (folder / "base_model.json", folder / "config.json", folder.absolute().parent / "config.json"):
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if "id2label" in config:
            return {int(index): label for index, label in config["id2label"].items()}
    raise ValueError(
        f"adapter {adapter} is a classifier's, but nothing says its labels: there is no config.json with id2label in "
        "its folder or the one above. Put the run's config.json there, or give the merged model as model."
    )


def check_labels(name: str, config: PretrainedConfig, labels: list[str]) -> None:
    """Raise a ValueError if the classifier `name` does not know one of the labels."""
    if unknown := sorted(set(labels) - set(config.label2id)):
        raise ValueError(
            f"The texts have the labels {unknown[:5]}, which model {name} does not know; it knows "
            f"{list(config.label2id)[:20]}. Check label_column, or rename the labels."
        )
