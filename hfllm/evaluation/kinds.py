"""Kinds of models that can be measured: causal models and classifiers."""

from collections.abc import Mapping
from typing import Literal

from transformers import PretrainedConfig


Kind = Literal["causal", "classifier"]


def find_kind(configs: Mapping[str, PretrainedConfig]) -> Kind:
    """The kind of the models with these names and configs, which must all be of one kind.

    Raises:
        ValueError: a model cannot be measured, or the models are of different kinds.
    """
    kinds = {name: _kind_of(name, config) for name, config in configs.items()}
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


def check_labels(name: str, config: PretrainedConfig, labels: list[str]) -> None:
    """Raise a ValueError if the classifier `name` does not know one of the labels."""
    if unknown := sorted(set(labels) - set(config.label2id)):
        raise ValueError(
            f"The texts have the labels {unknown[:5]}, which model {name} does not know; it knows "
            f"{list(config.label2id)[:20]}. Check label_column, or rename the labels."
        )
