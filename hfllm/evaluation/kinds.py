"""Kinds of models that can be measured: causal models and classifiers."""

from collections.abc import Mapping
from typing import Literal

from transformers import PretrainedConfig

from ..data.labelled_texts import LabelledTexts, ProblemType, words_of


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
        learned = {name: problem_type_of(config) for name, config in configs.items()}
        for name, config in configs.items():
            if learned[name] == "regression" and config.num_labels > 1:
                raise ValueError(
                    f"model {name} says {config.num_labels} numbers of each text. Only models that say one number, or "
                    "labels, can be measured."
                )
        if len(set(learned.values())) > 1:
            listing = ", ".join(f"{name} has {problem_type}" for name, problem_type in learned.items())
            raise ValueError(
                f"Only models of one problem_type can be compared, and {listing}. Measure each separately."
            )
    return kind


def problem_type_of(config: PretrainedConfig) -> ProblemType:
    """What a classifier says of a text; a config that does not tell is read as transformers' loss and pipeline do."""
    if config.problem_type is not None:
        return config.problem_type
    return "regression" if config.num_labels == 1 else "single_label_classification"


def _kind_of(name: str, config: PretrainedConfig) -> Kind:
    architecture = next(iter(config.architectures or []), "causal model")
    if architecture.endswith("ForSequenceClassification"):
        return "classifier"
    if "Classification" in architecture:
        raise ValueError(
            f"model {name} is a {architecture}. Only causal models and classifiers of whole texts can be measured."
        )
    return "causal"


def check_labels(name: str, config: PretrainedConfig, data: LabelledTexts) -> None:
    """Raise a ValueError if the classifier `name` does not know one of the labels."""
    if data.problem_type == "regression":
        return
    labels = {word for label in data.labels for word in words_of(label)}
    if unknown := sorted(labels - set(config.label2id)):
        raise ValueError(
            f"The texts have the labels {unknown[:5]}, which model {name} does not know; it knows "
            f"{list(config.label2id)[:20]}. Check label_column, or rename the labels."
        )
