"""Accuracy, F1 and calibration of a classifier, from its probabilities. Only NumPy is needed."""

from typing import Any

import numpy as np


def classification_scores(probabilities: np.ndarray, labels: np.ndarray, *, num_bins: int = 10) -> dict[str, Any]:
    """Scores of the probabilities (N, C) for the right classes (N,), each row counted once.

    Precision, recall and F1 of a class are 0 where the divisor is 0. `f1_macro` is the mean of F1 over the classes that
    occur among the labels or the predictions, as in scikit-learn. `reliability` has, for each bin of the confidence
    that is not empty, the mean confidence, the accuracy and the number of rows; the expected calibration error is the
    mean of their distances, weighted by rows (Guo et al. 2017, equation 5).
    """
    num_classes = probabilities.shape[1]
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    is_right = predicted == labels

    confusion = np.zeros((num_classes, num_classes), dtype=np.int64)  # row: the right class; column: the predicted one
    np.add.at(confusion, (labels, predicted), 1)
    hits, num_true, num_predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    f1 = 2 * hits / np.maximum(num_true + num_predicted, 1)

    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    reliability = [
        {
            "confidence": float(confidence[bins == index].mean()),
            "accuracy": float(is_right[bins == index].mean()),
            "rows": int((bins == index).sum()),
        }
        for index in np.unique(bins)
    ]
    gaps = [row["rows"] * abs(row["confidence"] - row["accuracy"]) for row in reliability]
    return {
        "accuracy": float(is_right.mean()),
        "f1_macro": float(f1[num_true + num_predicted > 0].mean()),
        "precision": (hits / np.maximum(num_predicted, 1)).tolist(),
        "recall": (hits / np.maximum(num_true, 1)).tolist(),
        "f1": f1.tolist(),
        "confusion_matrix": confusion.tolist(),
        "reliability": reliability,
        "expected_calibration_error": sum(gaps) / len(labels),
        "brier_score": float(((probabilities - np.eye(num_classes)[labels]) ** 2).sum(axis=1).mean()),
    }
