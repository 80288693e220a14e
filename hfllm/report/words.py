"""Names and numbers of a run as people read them, the same on its page and on its model card."""

import math
from typing import Any

from .run import Run


LABELS = {
    "loss": "loss, nats",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy",
    "f1_macro": "F1, mean over classes",
    "f1_micro": "F1, over all labels",
    "subset_accuracy": "texts with all labels right",
    "mse": "mean squared error",
    "mae": "mean absolute error",
    "r2": "R2",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
    "tokens": "tokens scored",
    "bytes": "bytes scored",
    "train_steps": "optimizer steps",
    "best_step": "step of the saved model",
    "train_tokens": "training tokens",
    "train_seconds": "training time",
    "save_seconds": "time for checkpoints",
    "skipped_updates": "updates skipped",
    "tokens_per_second": "tokens per second",
    "mfu": "model FLOPs utilization",
    "mfu_by_data_sheet": "model FLOPs utilization by the data sheet",
    "peak_flops_per_device": "FLOP/s a device reaches",
    "peak_memory_bytes": "highest memory",
    "num_parameters": "parameters",
    "trainable_parameters": "parameters trained",
    "memory_gib": "memory",
    "corpus_sha256": "corpus, sha256",
    "tokenizer_sha256": "tokenizer, sha256",
}
PARTS = {"eval_": "validation", "test_": "test"}
LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "train_seconds", "calibration_error", "brier", "mse", "mae")
HIGHER_IS_BETTER = (
    *("accuracy", "f1", "exact_match", "tokens_per_second", "mfu", "precision", "recall"),
    *("subset_accuracy", "r2", "pearson", "spearman"),
)


def label_of(name: str) -> str:
    """`eval_bits_per_byte` -> "validation bits per byte"; a name that is not known, with spaces."""
    for prefix, part in PARTS.items():
        if name.startswith(prefix):
            return f"{part} {label_of(name.removeprefix(prefix))}"
    return LABELS.get(name, name.replace("_", " "))


def format_value(value: Any, name: str = "") -> str:
    """A number with separators, and with a unit if its name has one; anything else as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(format_value(item) for item in value) or "none"
    if not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    base = name.split("_", 1)[1] if name.startswith(tuple(PARTS)) else name
    if name.endswith("seconds"):
        return format_seconds(value)
    if name.endswith("memory_bytes"):
        return f"{value / 2**30:.2f} GiB"
    if name.endswith("_gib"):
        return f"{value:g} GiB"
    if name == "peak_flops_per_device":
        return f"{value:.2e}"
    if base.startswith("mfu") or base.endswith("accuracy"):
        return f"{value:.1%}"
    if isinstance(value, int):
        return f"{value:,}" if name != "seed" else str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4f}" if abs(value) >= 0.01 else f"{value:.4g}"


def plain_value(value: Any) -> str:
    """An option's value as one would type it, with separators in large counts."""
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else format_value(value, "seed" if isinstance(value, int) and value < 10_000 else "")


def format_seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


def short_number(value: float) -> str:
    """Three digits and a letter: 2.56 M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g} {letter}"
    return f"{value:,.0f}"


def kind_of(run: Run) -> str:
    """What the run made, in a few words."""
    if run.adapter:
        return "LoRA adapter"
    if is_chat(run):
        return "chat model"
    architectures = run.config.get("architectures") or [""]
    if "SequenceClassification" in architectures[0]:
        return "text regression model" if run.config.get("problem_type") == "regression" else "text classifier"
    return "language model"


def is_classifier(run: Run) -> bool:
    """Whether it labels texts, or says a number of each."""
    return kind_of(run) in ("text classifier", "text regression model") or run.adapter.get("task_type") == "SEQ_CLS"


def problem_type_of(run: Run) -> str | None:
    """What a classifier learned, in transformers' words."""
    return run.config.get("problem_type") or run.adapter_base.get("problem_type")


def is_chat(run: Run) -> bool:
    """Whether a fine-tuning recipe for conversations made it: only these have such options."""
    return "train_on_prompt" in run.arguments or "beta" in run.arguments


def dataset_in_words(run: Run) -> str | None:
    """What the model was trained on, in words; `stdlib` means a different text in each recipe."""
    dataset = run.metrics.get("dataset") or run.arguments.get("dataset")
    if dataset != "stdlib":
        return None if dataset is None else str(dataset)
    if is_chat(run):
        return "questions about Python, answered by the Python that ran"
    if "label_column" in run.arguments:
        return "docstrings of Python's standard library, labelled with their packages"
    return "the source of Python's standard library"


def sentence_about(run: Run) -> str:
    """One sentence: what it is, what it was trained on, how long that took."""
    metrics, parts = run.metrics, []
    parameters = metrics.get("num_parameters")
    size = f" of {short_number(parameters)} parameters" if parameters else ""
    article = f"A {kind_of(run)}{size}"
    if dataset := dataset_in_words(run):
        base = run.arguments.get("model")
        parts.append(f"fine-tuned from {base} on {dataset}" if base else f"trained on {dataset}")
    if metrics.get("train_tokens"):
        parts.append(f"{short_number(metrics['train_tokens'])} tokens")
    if metrics.get("train_seconds"):
        parts.append(format_seconds(metrics["train_seconds"]))
    if not run.is_finished and run.log:
        parts.append(f"not finished: the log reaches step {run.log[-1]['step']:,}")
    return f"{article}, {', '.join(parts)}." if parts else f"{article}."
