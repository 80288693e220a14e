"""Scores of classifiers, and of two baselines."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.labelled_texts import LabelledTexts
from .metrics.calibrated_classification.scores import classification_scores


TF_IDF_STRENGTHS = (1.0, 10.0, 100.0)  # inverse regularization; the validation texts choose one


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
    """The classifier's logits (N, labels) in float64 for the token ids of N texts, split among the processes.

    Each process gets the logits of all texts. Texts of similar lengths share a batch, padded on the right; the
    attention mask says where a text ends. No text is read twice.
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


def score_labelled_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: LabelledTexts,
    *,
    block_size: int,
    batch_size: int,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """The `test_...` scores that recipes/finetune_classification.py writes, of these texts and the model's labels."""
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    model.config.pad_token_id = tokenizer.pad_token_id  # by which transformers' own classes find the end of a text
    texts = [row[:block_size] for row in tokenizer(data.texts, truncation=False, verbose=False)["input_ids"]]
    logits = predict_logits(
        model,
        texts,
        num_labels=len(names),
        batch_size=batch_size,
        pad_token_id=tokenizer.pad_token_id,
        accelerator=accelerator,
    )
    labels = np.array([model.config.label2id[label] for label in data.labels])
    scores = score_predictions(logits, labels, names) | {"texts": len(texts)}
    return {f"test_{name}": value for name, value in scores.items()}


def score_predictions(logits: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """The scores of logits (N, labels) for the labels (N,), with the numbers of `metrics/calibrated_classification`.

    `accuracy`, `f1_macro` (over the labels that occur or are predicted), `loss` (nats per text), `ece` (the expected
    calibration error), `majority_accuracy` (of always predicting the most frequent label), `per_label`, `confusion`
    (rows are the true labels), and `reliability` (a bin's confidence, accuracy and number of texts).
    """
    logits = logits.astype(np.float64)
    log_probabilities = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    scores = classification_scores(np.exp(log_probabilities), labels)
    num_true = np.bincount(labels, minlength=len(names))
    return {
        "accuracy": scores["accuracy"],
        "f1_macro": scores["f1_macro"],
        "loss": float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        "ece": scores["expected_calibration_error"],
        "majority_accuracy": float(num_true.max() / len(labels)),
        "per_label": {
            name: {
                "precision": scores["precision"][index],
                "recall": scores["recall"][index],
                "f1": scores["f1"][index],
                "texts": int(num_true[index]),
            }
            for index, name in enumerate(names)
        },
        "confusion": scores["confusion_matrix"],
        "reliability": [
            {"confidence": row["confidence"], "accuracy": row["accuracy"], "texts": row["rows"]}
            for row in scores["reliability"]
        ],
    }


def logistic_regression(
    train: tuple[Sequence[str], Sequence[int]],
    validation: tuple[Sequence[str], Sequence[int]],
    test: Sequence[str],
    *,
    num_labels: int,
) -> tuple[np.ndarray, float]:
    """Log-probabilities (N, labels) of the test texts by scikit-learn's logistic regression, and its strength C.

    Its features are words and pairs of words, by TF-IDF with sublinear counts. Of three strengths, it takes the best on
    the validation texts, just as the neural model's epoch is chosen.
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
    """The numbers of metrics.json: `eval_...` and `test_...` of the logits of these parts, and of two baselines.

    The baselines are a logistic regression on the same parts, `test_logistic_regression_...`, and the most frequent
    label of the part `train` as the answer to every text, `test_majority_accuracy`.
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
    """Two tables of the numbers of `score_beside_baselines`, and a sentence if the logistic regression is better."""
    labels, num_texts = metrics["test_per_label"], metrics["test_texts"]
    rows = {"this model": "test", "logistic regression, TF-IDF": "test_logistic_regression"}
    width = max(map(len, (*labels, *rows)))
    lines = [f"Test, {num_texts:,} texts that were not trained on:"]
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
            f"The logistic regression is right on {num_fewer:,} texts more than this model, at almost no cost: use "
            "it, or give the model more pretraining, more labelled texts, another method or learning_rate.",
        ]
    return "\n".join(lines)
