"""Classifiers' logits, their scores, and the baselines beside them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn


NUM_BINS = 10  # of confidence, as in Guo et al. 2017


TF_IDF_STRENGTHS = (1.0, 10.0, 100.0)  # the inverse regularizations of which the validation texts choose one


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


Texts = tuple[Sequence[str], Sequence[int]]  # and their labels' ids


def score_beside_baselines(
    logits: Mapping[str, np.ndarray], parts: Mapping[str, Texts], names: Sequence[str]
) -> dict[str, Any]:
    """The numbers of metrics.json: `eval_...` and `test_...` of the logits of these parts, and of what costs nothing.

    The baselines are the logistic regression on the same parts, `test_logistic_regression_...`, and always saying the
    label that is commonest in the part `train`, `test_majority_accuracy`.
    """
    scores = {part: score_predictions(logits[part], np.array(parts[part][1]), names) for part in ("eval", "test")}
    metrics = {f"eval_{name}": scores["eval"][name] for name in ("loss", "accuracy", "f1_macro")}
    metrics |= {f"test_{name}": value for name, value in scores["test"].items()}
    labels = np.array(parts["test"][1])
    majority = np.bincount(parts["train"][1]).argmax()
    metrics |= {"test_texts": len(labels), "test_majority_accuracy": float((labels == majority).mean())}
    baseline_logits, strength = logistic_regression(
        parts["train"], parts["eval"], parts["test"][0], num_labels=len(names)
    )
    baseline = score_predictions(baseline_logits, labels, names)
    metrics |= {f"test_logistic_regression_{name}": baseline[name] for name in ("accuracy", "f1_macro", "loss", "ece")}
    return metrics | {"test_logistic_regression_strength": strength}


def describe_scores(metrics: Mapping[str, Any]) -> str:
    """What `score_beside_baselines` found as two small tables, and a word if the logistic regression is better."""
    labels, num_texts = metrics["test_per_label"], metrics["test_texts"]
    rows = {"this model": "test", "logistic regression, TF-IDF": "test_logistic_regression"}
    width = max(map(len, (*labels, *rows)))
    lines = [f"Test, {num_texts:,} texts that were never trained on:"]
    lines.append(f"{'':{width}}  accuracy  macro-F1   loss    ECE")
    for name, prefix in rows.items():
        accuracy, f1, loss, ece = (metrics[f"{prefix}_{score}"] for score in ("accuracy", "f1_macro", "loss", "ece"))
        lines.append(f"{name:{width}}  {accuracy:8.2%}  {f1:8.3f}  {loss:.3f}  {ece:.3f}")
    lines.append(f"{'always the commonest label':{width}}  {metrics['test_majority_accuracy']:8.2%}")
    lines += ["", f"{'':{width}}  precision  recall     F1  texts"]
    for name, row in labels.items():
        lines.append(
            f"{name:{width}}  {row['precision']:9.2%}  {row['recall']:6.1%}  {row['f1']:.3f}  {row['texts']:5,}"
        )
    behind = metrics["test_logistic_regression_accuracy"] - metrics["test_accuracy"]
    if (num_fewer := round(behind * num_texts)) > 0:
        lines += [
            "",
            f"The logistic regression is right on {num_fewer:,} texts more than this model, at no cost: use it, or "
            "give the model more pretraining, more labelled texts, another method or learning rate.",
        ]
    return "\n".join(lines)
