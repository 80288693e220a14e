"""Other forms of a model to push: an adapter merged into its base, and transformers' own class."""

import json
import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from ..conversion import to_native
from ..conversion.folder import save_model
from ..conversion.loading import load_causal_lm
from .errors import PushError


# The run's files, for the card and the page of its other form.
RUN_FILES = (
    *("arguments.yaml", "metrics.json", "log.jsonl", "samples.txt", "environment.json", "curves.png"),
    *("confusion.png", "labels.png", "predictions.png"),
    *("tokenizer_report.json", "README.md"),
)


def save_merged(folder: str | Path, target: str | Path) -> None:
    """Write into `target` the whole model of an adapter and its base, merged in float32."""
    from ..adapters import head_of_adapter, load_adapter, merge_adapter  # PEFT takes time to import

    folder, target = Path(folder).expanduser(), Path(target)
    adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = adapter.get("base_model_name_or_path")
    is_classifier = adapter.get("task_type") == "SEQ_CLS"
    auto_class = AutoModelForSequenceClassification if is_classifier else AutoModelForCausalLM
    head = head_of_adapter(folder) if is_classifier else {}
    try:
        model: PreTrainedModel = auto_class.from_pretrained(base, dtype="float32", **head)
        dtype = getattr(model.config, "dtype", None) or model.dtype
        merged = merge_adapter(load_adapter(model, folder), dtype=dtype)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PushError(f"The adapter in {folder} could not be merged into its base {base!r}: {reason}") from error
    tokenizer = AutoTokenizer.from_pretrained(folder if (folder / "tokenizer.json").exists() else base)
    save_model(merged, tokenizer, target)
    _copy_run(folder, target)


def save_adapter_alone(folder: str | Path, target: str | Path) -> None:
    """Write into `target` the adapter of a fine-tuning run, from `adapter/`, with the run's files."""
    folder, target = Path(folder).expanduser(), Path(target)
    for path in folder.iterdir():
        if path.name.startswith(("tokenizer", "chat_template", "special_tokens")) and path.is_file():
            shutil.copyfile(path, target / path.name)
    _copy_run(folder, target)
    (target / "README.md").unlink(missing_ok=True)  # the merged model's
    for path in (folder / "adapter").iterdir():
        shutil.copyfile(path, target / path.name)


def save_native(folder: str | Path, target: str | Path) -> None:
    """Write into `target` our model as a gpt2, llama or qwen3, see `to_native`."""
    folder = Path(folder).expanduser()
    save_model(to_native(load_causal_lm(folder)), AutoTokenizer.from_pretrained(folder), target)
    _copy_run(folder, Path(target))


def _copy_run(folder: Path, target: Path) -> None:
    for name in RUN_FILES:
        if (folder / name).exists():
            shutil.copyfile(folder / name, target / name)
