"""LoRA by PEFT (Hu et al. 2021): which layers it adapts, what is saved with it, and the base that it belongs to.

Importing this module tells PEFT the layers of our model type, so that a plain `LoraConfig()` works on it. It is not
part of `import hfllm`, because PEFT takes time to import.
"""

import hashlib
import importlib.util
import json
import logging
import re
import tempfile
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model, prepare_model_for_kbit_training
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, load_peft_weights
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file

from .model import GPTConfig


logger = logging.getLogger(__name__)

# All linear layers of a block, of either preset. The head is not among them: a classifier's is trained and saved whole,
# and a language model's is the token embedding.
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(GPTConfig.model_type, LINEAR_LAYERS)

HEADS = ("score", "classifier")  # the names that PEFT trains and saves whole for a classifier
BASE_FILE = "base_model.json"  # beside adapter_config.json, which accepts none of our keys
SAMPLES_PER_WEIGHT = 4096


def lora_targets(model: nn.Module) -> list[str]:
    """The linear layers of the model's blocks, by their last names: `["q_proj", "k_proj", ...]`.

    Unlike PEFT's "all-linear", this never includes a head, whatever its name. It is empty for a model that has no list
    of blocks.
    """
    inside = re.compile(r"\.\d+\.")  # a name such as model.layers.0.mlp.up_proj
    names = [
        name.removesuffix(".base_layer").rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and inside.search(name) and ".lora_" not in name
    ]
    return list(dict.fromkeys(names))


def lora_config(
    model: PreTrainedModel,
    *,
    r: int = 16,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    trainable_token_indices: list[int] | None = None,
) -> LoraConfig:
    """A LoraConfig for this model: by default all linear layers of its blocks, and the task that its head is for.

    `alpha / r * B A x` is added to each target's output, with A and B of rank `r`. The head of a classifier is trained
    and saved whole. `trainable_token_indices` are ids whose embeddings are trained as well, for tokens that the base
    has never seen; a tied head follows them.
    """
    if r < 1:
        raise ValueError(f"r={r}: the rank of LoRA is at least 1.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout}: it is at least 0 and less than 1.")
    targets = list(target_modules) if target_modules is not None else lora_targets(model)
    chosen = _modules_named(model, targets)
    _check_targets(model, chosen)
    return LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        lora_dropout=dropout,
        target_modules=targets or "all-linear",
        trainable_token_indices=trainable_token_indices,
        task_type=_task_type(model),
        # GPT-2's own class keeps its weights transposed. PEFT finds out by itself, with a warning.
        fan_in_fan_out=bool(chosen) and all(isinstance(module, Conv1D) for module in chosen.values()),
    )


def add_lora(
    model: PreTrainedModel | PeftModel,
    *,
    r: int = 16,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] | None = None,
    trainable_token_indices: list[int] | None = None,
    adapter_name: str = "default",
    gradient_checkpointing: bool = False,
) -> PeftModel:
    """The model, changed in place, with a new adapter, the only part that is trained; at first it changes no logit.

    A PeftModel gets a further adapter of another name, which becomes the active one. If the base is quantized, its
    other parameters become float32 (Dettmers et al. 2023, QLoRA).
    """
    wrapped = isinstance(model, PeftModel)
    base: PreTrainedModel = model.get_base_model() if wrapped else model  # type: ignore[operator, assignment]
    if wrapped and adapter_name in model.peft_config:
        raise ValueError(
            f"The model has an adapter {adapter_name!r} already, beside {sorted(model.peft_config)}: choose another "
            "adapter_name."
        )
    if not wrapped and getattr(base, "is_quantized", False):
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    config = lora_config(
        base,
        r=r,
        alpha=alpha,
        dropout=dropout,
        target_modules=target_modules,
        trainable_token_indices=trainable_token_indices,
    )
    if gradient_checkpointing:
        enable_gradient_checkpointing(base)
    if not wrapped:
        return get_peft_model(base, config, adapter_name=adapter_name)
    model.add_adapter(adapter_name, config)
    model.set_adapter(adapter_name)
    return model


def enable_gradient_checkpointing(model: PreTrainedModel | PeftModel) -> None:
    """Compute each block's activations again in the backward pass instead of keeping them, embeddings frozen or not.

    A checkpointed block whose input needs no gradient computes none for its weights either, so the output of the frozen
    embeddings is made to require one.
    """
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def quantization_for_qlora(*, bits: int = 4) -> BitsAndBytesConfig:
    """The quantization_config of QLoRA for `from_pretrained`: NormalFloat4, or 8 bits; heads stay as they are."""
    if bits not in (4, 8):
        raise ValueError(f"bits={bits}: QLoRA quantizes the base to 4 or 8 bits.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            "QLoRA quantizes the base with bitsandbytes, which is not installed. `pip install bitsandbytes`, or train "
            "LoRA on the base as it is."
        )
    heads = [*HEADS, "lm_head"]
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=heads)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=heads,
    )


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters are trained, and how many there are; tied weights count once, and quantized ones unpacked."""
    trained = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)  # of bitsandbytes, which packs two weights into a byte
        number = state.shape.numel() if state is not None else parameter.numel()
        trained += number * parameter.requires_grad
        total += number
    return trained, total


def describe_trained(model: nn.Module) -> str:
    """A sentence on what is trained.

    "Trained: 231,936 of 2,790,080 parameters (8.3 %): LoRA of rank 16 on down_proj, q_proj, v_proj; score."
    """
    trained, total = count_parameters(model)
    adapted, whole = set(), set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        path, _, kind = name.removeprefix("base_model.model.").partition(".lora_")
        if kind:
            adapted.add(path.rpartition(".")[2])
        elif ".token_adapter." in path:
            whole.add("some tokens of " + path.partition(".token_adapter.")[0])
        elif block := re.match(r".*?\.\d+(?=\.)", path):
            whole.add(block[0])
        else:
            whole.add(path.partition(".modules_to_save.")[0].removesuffix(".weight").removesuffix(".bias"))
    parts = [", ".join(sorted(whole))] if whole else []
    if adapted and isinstance(model, PeftModel):
        rank = model.peft_config[model.active_adapters[0]].r
        parts.insert(0, f"LoRA of rank {rank} on {', '.join(sorted(adapted))}")
    what = "everything" if trained == total else "; ".join(parts) or "nothing"
    return f"Trained: {trained:,} of {total:,} parameters ({100 * trained / total:.1f} %): {what}."


def save_adapter(
    model: PeftModel, folder: str | PathLike, *, adapter_name: str = "default", base_model_id: str | None = None
) -> None:
    """Write one adapter as PEFT does, directly into the folder, and beside it a file that identifies its base.

    For a classifier, that file also has the labels, the `problem_type`, and the base's `classifier_pooling`.

    `base_model_name_or_path` is what other programs open the base by: `base_model_id` if given, else the name that the
    base was opened by. A base from the Hub's cache is written by its id. A folder's path is valid on this machine only,
    which is logged.
    """
    config = model.peft_config[adapter_name]
    base = model.get_base_model()
    name = base_model_id or _portable_name(config.base_model_name_or_path or base.name_or_path)
    config.base_model_name_or_path = name or None
    if not name or Path(name).exists():
        logger.info(
            "The adapter's base is %s, which other machines do not have. Put the base on the Hub and give its id as "
            "base_model_id, or send merged weights.",
            f"the folder {name!r}" if name else "a model without a name",
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as there:
        model.save_pretrained(there, selected_adapters=[adapter_name], save_embedding_layers=False)
        # PEFT puts an adapter into a folder of its name, unless that is "default".
        for file in [path for path in Path(there).rglob("*") if path.is_file()]:
            file.replace(folder / file.name)
    describe_base(model, folder, adapter_name=adapter_name)


def describe_base(model: PeftModel, folder: str | PathLike, *, adapter_name: str = "default") -> None:
    """Write into an adapter's folder what its base is known by, and a classifier's labels; see `save_adapter`."""
    config, base = model.peft_config[adapter_name], model.get_base_model()
    known_by = {
        "base_model_name_or_path": config.base_model_name_or_path or None,
        "weights_sha256": base_fingerprint(model),
    }
    if config.task_type == "SEQ_CLS":
        known_by |= {"id2label": base.config.id2label, "problem_type": base.config.problem_type}
        if hasattr(base.config, "classifier_pooling"):
            known_by["classifier_pooling"] = base.config.classifier_pooling
    (Path(folder) / BASE_FILE).write_text(json.dumps(known_by, indent=2) + "\n", encoding="utf-8")


def read_adapter_config(adapter: str | PathLike) -> PeftConfig:
    """PEFT's config of an adapter, by its folder or Hub id.

    Raises:
        ValueError: there is no such adapter.
    """
    folder = Path(adapter).expanduser()
    if folder.is_dir() and not (folder / "adapter_config.json").exists():
        raise ValueError(f"adapter {adapter} is a folder without an adapter_config.json, so not a PEFT adapter.")
    try:
        return PeftConfig.from_pretrained(str(folder if folder.is_dir() else adapter))
    except (OSError, ValueError) as error:
        raise ValueError(f"adapter {str(adapter)!r} is not a PEFT adapter: {str(error).splitlines()[0]}") from error


def head_of_adapter(adapter: str | PathLike) -> dict[str, Any]:
    """A classifier's `id2label`, `label2id` and `problem_type`, by its adapter or the config.json beside or above it.

    Raises:
        ValueError: none of them has an id2label.
    """
    folder = Path(adapter).expanduser()
    for path in (folder / BASE_FILE, folder / "config.json", folder.absolute().parent / "config.json"):
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if "id2label" in config:
            id2label = {int(index): label for index, label in config["id2label"].items()}
            label2id = {label: index for index, label in id2label.items()}
            return {"id2label": id2label, "label2id": label2id, "problem_type": config.get("problem_type")}
    raise ValueError(
        f"adapter {adapter} is a classifier's, but nothing says its labels: there is no config.json with id2label in "
        "its folder or the one above. Put the run's config.json there, or give the merged model as model."
    )


def load_adapter(
    base: PreTrainedModel | PeftModel,
    adapter: str | PathLike,
    *,
    adapter_name: str = "default",
    is_trainable: bool = False,
) -> PeftModel:
    """The base, changed in place, with an adapter from a folder or the Hub; in evaluation mode unless it is trainable.

    An adapter that was trained on another base is refused: its task, layers or shapes differ, or (if `save_adapter`
    wrote it) its base had other weights. A PeftModel gets a further adapter, which becomes the active one. A
    classifier's base takes the `classifier_pooling` that the adapter's head was trained on.
    """
    name = str(adapter)
    wrapped = isinstance(base, PeftModel)
    model: PreTrainedModel = base.get_base_model() if wrapped else base  # type: ignore[operator, assignment]
    try:
        config = PeftConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        is_model = (Path(name) / "config.json").exists()
        what = "it holds a whole model, which needs no base" if is_model else str(error).splitlines()[0]
        raise ValueError(
            f"{name!r} is not an adapter: {what}. An adapter's folder holds adapter_config.json and "
            "adapter_model.safetensors."
        ) from error
    if wrapped and adapter_name in base.peft_config:
        raise ValueError(f"The model has an adapter {adapter_name!r} already: choose another adapter_name.")
    known_by = _read_base_file(name)
    reason = _why_another_base(model, config, name) or _why_other_weights(base, known_by)
    if reason:
        raise ValueError(
            f"The adapter {name!r} belongs to another base: {reason} It was trained on "
            f"{config.base_model_name_or_path!r}; this model is {model.name_or_path or type(model).__name__!r}."
        )
    if (pooling := known_by.get("classifier_pooling")) and pooling != getattr(model.config, "classifier_pooling", None):
        if wrapped:
            raise ValueError(
                f"The adapter {name!r} has classifier_pooling={pooling!r}, those on the model already have another. "
                "Open the base again for it."
            )
        model.config.classifier_pooling = pooling
    if not wrapped:
        return PeftModel.from_pretrained(model, name, adapter_name=adapter_name, is_trainable=is_trainable)
    base.load_adapter(name, adapter_name=adapter_name, is_trainable=is_trainable)
    base.set_adapter(adapter_name)
    return base


def tokenizer_source(model: str, adapter: str | PathLike | None) -> str:
    """Where the tokenizer is: with the adapter, if that has a chat template of its own, or else with the model."""
    if adapter is not None and _find_file(str(adapter), "tokenizer_config.json"):
        return str(adapter)
    return model


def merge_adapter(
    model: PeftModel, *, adapter_name: str | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The base alone, changed in place, with the adapter (by default the active one) added to its weights.

    The sum is computed in float32 and rounded once, to `dtype` or else the base's own: in bfloat16 most of what LoRA
    adds is smaller than the last digit of the weight. An adapter from elsewhere that trained only the embedding of a
    tied model gives a model with an untied head, as PEFT warns.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(f"merge_adapter takes a model with an adapter on it, not a {type(model).__name__}.")
    base = model.get_base_model()
    if getattr(base, "is_quantized", False):
        raise ValueError(
            "The base is quantized, and a quantized weight has no room for what the adapter adds. Load the base in "
            "full precision, put the adapter on it with load_adapter, and merge that."
        )
    dtype = dtype or base.dtype
    if adapter_name is not None:
        model.set_adapter(adapter_name)
    return model.to(torch.float32).merge_and_unload(safe_merge=True).to(dtype)


def base_fingerprint(model: nn.Module) -> str | None:
    """A sha256 of the weights below the head, without any adapter; the same in float32 and bfloat16.

    It reads some thousand values of each matrix, so it takes seconds at most. None if the weights are in another
    precision (quantized, float16), where the values differ.
    """
    whole = model.get_base_model() if isinstance(model, PeftModel) else model
    body = getattr(whole, "base_model", whole)
    digest = hashlib.sha256()
    for name, parameter in sorted(body.named_parameters()):
        if "lora_" in name or "trainable_tokens_" in name:
            continue
        if parameter.dtype not in (torch.float32, torch.bfloat16) or parameter.is_meta:
            return None
        name = re.sub(r"\.(base_layer|original_module|token_adapter)\b", "", name)
        values = parameter.detach().flatten()[:: 1 + parameter.numel() // SAMPLES_PER_WEIGHT]
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(values.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return digest.hexdigest()


def _task_type(model: PreTrainedModel) -> str | None:
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    return "CAUSAL_LM" if model.get_output_embeddings() is not None else None


def _modules_named(model: nn.Module, targets: list[str]) -> dict[str, nn.Module]:
    """The modules whose name ends with one of the targets; a target that names none is an error."""
    chosen: dict[str, nn.Module] = {}
    for target in targets:
        found = {name: module for name, module in model.named_modules() if f".{name}".endswith(f".{target}")}
        if not found:
            names = lora_targets(model)
            raise ValueError(f"target_modules: the model has no layer {target!r}. Those of its blocks are {names}.")
        chosen |= found
    return chosen


def _check_targets(model: PreTrainedModel, chosen: dict[str, nn.Module]) -> None:
    """Refuse adapters on the token embedding or the head: merged, they would untie the two, or be saved twice."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, module in chosen.items():
        if module is embeddings or module is head or name in HEADS:
            raise ValueError(
                f"target_modules: {name!r} is the token embedding or the head, which LoRA leaves alone here. A "
                "classifier's head is trained whole by itself; for tokens that the base has never seen, give their ids "
                "as trainable_token_indices."
            )


def _portable_name(name: str) -> str:
    """A base's name; of a snapshot in the Hub's cache (models--OWNER--NAME/snapshots/COMMIT) the id OWNER/NAME."""
    match = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\][0-9a-f]+[/\\]?$", name)
    return match[1].replace("--", "/") if match else name


def _why_another_base(model: PreTrainedModel, config: PeftConfig, adapter: str) -> str:
    """What about the adapter does not fit this model; empty if it fits."""
    task = _task_type(model)
    if task is not None and config.task_type is not None and config.task_type != task:
        opened_by = {"SEQ_CLS": "AutoModelForSequenceClassification", "CAUSAL_LM": "AutoModelForCausalLM"}
        with_class = opened_by.get(config.task_type, f"the class for {config.task_type}")
        return f"it is for {config.task_type}, the model is a {type(model).__name__}; open the base by {with_class}."
    if config.peft_type != PeftType.LORA:
        return ""
    modules = dict(model.named_modules())
    for key, weight in load_peft_weights(adapter, device="cpu").items():
        path, _, kind = key.removeprefix("base_model.model.").rpartition(".lora_")
        if kind in ("A.weight", "B.weight"):
            if path not in modules:
                return f"it adapts {path}, which this model does not have."
            has, takes = _features(modules[path]), weight.shape[1] if kind == "A.weight" else weight.shape[0]
            here = has[0] if kind == "A.weight" else has[1]
            if here is not None and here != takes:
                side = "inputs" if kind == "A.weight" else "outputs"
                return f"its {path} has {takes:,} {side}, this model's has {here:,}."
        head = key.removeprefix("base_model.model.").removesuffix(".weight")
        if head in HEADS and head in modules:
            labels, here = weight.shape[0], _features(modules[head])[1]
            if here not in (None, labels):
                return f"its head has {labels} labels, this model's {here}; open the base with num_labels={labels}."
        head = key.removeprefix("base_model.model.").removesuffix(".bias")
        if head in HEADS and head in modules and getattr(modules[head], "bias", None) is None:
            return "its head has a bias; open the base with problem_type='regression'."
    return ""


def _features(module: nn.Module) -> tuple[int | None, int | None]:
    """Inputs and outputs of a linear layer, also of one that an adapter sits on already."""
    module = getattr(module, "base_layer", getattr(module, "original_module", module))
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return getattr(module, "in_features", None), getattr(module, "out_features", None)


def _read_base_file(adapter: str) -> dict[str, Any]:
    path = _find_file(adapter, BASE_FILE)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}


def _why_other_weights(base: PreTrainedModel | PeftModel, known_by: dict[str, Any]) -> str:
    trained_on, here = known_by.get("weights_sha256"), base_fingerprint(base)
    if trained_on and here and trained_on != here:
        return "the shapes agree, but the weights that it was trained on are not these."
    return ""


def _find_file(folder_or_id: str, name: str) -> str | None:
    try:
        return cached_file(
            folder_or_id,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except OSError as error:  # not a folder, and not of the form of a Hub id
        raise ValueError(
            f"{folder_or_id!r} is not an adapter: there is no such folder. Give the folder of an adapter, such as "
            "`adapter` in the output_dir of a run with method=lora, or its Hub id."
        ) from error
