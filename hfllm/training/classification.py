"""What is fine-tuned for classification, and how good it is, beside what costs nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel


NUM_BINS = 10  # of confidence, as in Guo et al. 2017
TF_IDF_STRENGTHS = (1.0, 10.0, 100.0)  # the inverse regularizations of which the validation texts choose one


def freeze_all_but(model: PreTrainedModel, method: str) -> None:
    """Freeze, in place, what the method does not train: `full`, `last_block` (with last norm and head), `head`."""
    if method not in ("full", "last_block", "head"):
        raise ValueError(f"method={method!r}: it is 'full', 'last_block' or 'head'.")
    body = model.base_model
    body.requires_grad_(method == "full")
    if method != "last_block":
        return
    lists = [module for module in body.modules() if isinstance(module, nn.ModuleList) and len(module)]
    if not lists:
        raise ValueError(f"A {type(model).__name__} has no list of blocks: choose --method full or head.")
    blocks = max(lists, key=lambda module: sum(parameter.numel() for parameter in module.parameters()))
    blocks[-1].requires_grad_(True)
    inside = {id(parameter) for parameter in blocks.parameters()}
    for parameter in body.parameters():
        if parameter.ndim == 1 and id(parameter) not in inside:  # the norm behind the blocks
            parameter.requires_grad_(True)


@torch.no_grad()
def predict_logits(
    model: nn.Module,
    texts: Sequence[Sequence[int]],
    *,
    num_labels: int,
    batch_size: int,
    pad_token_id: int,
    accelerator: Accelerator,
) -> np.ndarray:
    """The classifier's logits (N, labels) in float64 for the token ids of N texts, cut among the processes.

    Each process gets those of all. Texts of about equal lengths share a batch, padded on the right under an attention
    mask, which says where a text ends; none is read twice.
    """
    order = sorted(range(len(texts)), key=lambda row: -len(texts[row]))
    order = order[accelerator.process_index :: accelerator.num_processes]
    device = accelerator.device
    # MPS has no float64, so there the sums live on the CPU.
    logits = torch.zeros(len(texts), num_labels, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            length = max(len(texts[row]) for row in rows)
            input_ids = [[*texts[row], *[pad_token_id] * (length - len(texts[row]))] for row in rows]
            mask = [[1] * len(texts[row]) + [0] * (length - len(texts[row])) for row in rows]
            output = model(
                input_ids=torch.tensor(input_ids, device=device), attention_mask=torch.tensor(mask, device=device)
            )
            logits[rows] = output.logits.to(logits)
    finally:
        model.train(was_training)
    # The rows of the other processes are zeros here.
    logits = accelerator.reduce(logits, reduction="sum").cpu()
    if not logits.isfinite().all():
        raise FloatingPointError("The model's logits are not finite on some texts.")
    return logits.numpy()


def score_predictions(logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """How good logits (N, labels) are for the labels (N,), every row counted once.

    `accuracy`, `f1_macro` (the mean of the labels' F1, of those that occur), `loss` (nats a text), `ece` (the expected
    calibration error: how far confidence and accuracy lie apart, averaged over the texts in ten bins of confidence),
    `majority_accuracy` (of always saying the most frequent label), `per_label`, `confusion` (rows are the true labels),
    and `reliability` (a bin's confidence, accuracy and number of texts).
    """
    logits = logits.astype(np.float64)
    log_probabilities = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    predicted = logits.argmax(axis=1)
    confusion: np.ndarray = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(confusion, (labels, predicted), 1)
    hits, num_true, num_said = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    with np.errstate(invalid="ignore"):
        precision, recall = np.nan_to_num(hits / num_said), np.nan_to_num(hits / num_true)
        f1 = np.nan_to_num(2 * hits / (num_true + num_said))
    confidence, is_right = np.exp(log_probabilities.max(axis=1)), predicted == labels
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    reliability = [
        {
            "confidence": float(confidence[bins == index].mean()),
            "accuracy": float(is_right[bins == index].mean()),
            "texts": int((bins == index).sum()),
        }
        for index in np.unique(bins)
    ]
    return {
        "accuracy": float(is_right.mean()),
        "f1_macro": float(f1[(num_true + num_said) > 0].mean()),
        "loss": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        "ece": sum(row["texts"] * abs(row["confidence"] - row["accuracy"]) for row in reliability) / len(labels),
        "majority_accuracy": float(num_true.max() / len(labels)),
        "per_label": {
            name: {
                "precision": float(precision[index]),
                "recall": float(recall[index]),
                "f1": float(f1[index]),
                "texts": int(num_true[index]),
            }
            for index, name in enumerate(names)
        },
        "confusion": confusion.tolist(),
        "reliability": reliability,
    }


def logistic_regression(
    train: tuple[Sequence[str], Sequence[int]],
    validation: tuple[Sequence[str], Sequence[int]],
    test: Sequence[str],
    *,
    num_labels: int,
) -> tuple[np.ndarray, float]:
    """Log-probabilities (N, labels) of the test texts by scikit-learn's logistic regression, and its strength C.

    It sees words and pairs of words by TF-IDF with sublinear counts. The strength is the one of three that is best on
    the validation texts, as the neural model's epoch is.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\b\w+\b|[^\w\s]")
    features = vectorizer.fit_transform(train[0])
    models = [LogisticRegression(C=strength, max_iter=1000).fit(features, train[1]) for strength in TF_IDF_STRENGTHS]
    if len(validation[0]):
        held_out = vectorizer.transform(validation[0])
        best = int(np.argmax([model.score(held_out, validation[1]) for model in models]))
    else:
        best = 1
    log_probabilities = np.full((len(test), num_labels), -1e4)
    log_probabilities[:, models[best].classes_] = models[best].predict_log_proba(vectorizer.transform(test))
    return log_probabilities, TF_IDF_STRENGTHS[best]
