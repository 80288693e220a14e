"""Kinds of models that can be measured: causal models and classifiers, whole or as an adapter on a base."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import PretrainedConfig

from ..data.labelled_texts import LabelledTexts, ProblemType, words_of


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
                config.id2label, config.problem_type = adapter_labels(adapter)
                config.label2id = {label: index for index, label in config.id2label.items()}
            kinds[name] = "classifier"
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
            raise ValueError(f"Only models of one problem_type can be compared, and {listing}. Measure each apart.")
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


def adapter_labels(adapter: str) -> tuple[dict[int, str], ProblemType | None]:
    """A classifier's labels and problem_type: from its adapter, or from the config.json beside it or a folder above."""
    folder = Path(adapter).expanduser()
    for path in (folder / "base_model.json", folder / "config.json", folder.absolute().parent / "config.json"):
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if "id2label" in config:
            return {int(index): label for index, label in config["id2label"].items()}, config.get("problem_type")
    raise ValueError(
        f"adapter {adapter} is a classifier's, but nothing says its labels: there is no config.json with id2label in "
        "its folder or the one above. Put the run's config.json there, or give the merged model as model."
    )


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
