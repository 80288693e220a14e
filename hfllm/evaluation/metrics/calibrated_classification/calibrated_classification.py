"""Accuracy, F1 and calibration of a classifier, from its probabilities."""

import datasets
import evaluate
import numpy as np

from .scores import classification_scores


SCORES = (
    *("accuracy", "f1_macro", "precision", "recall", "f1", "confusion_matrix"),
    *("expected_calibration_error", "brier_score"),
)

_DESCRIPTION = """
Accuracy, macro-averaged F1, precision, recall and F1 of each class, the confusion matrix; and whether probabilities
mean what they say: the expected calibration error (the gap of confidence and accuracy, over bins of equal width) and
the Brier score (the squared distance between the probabilities and the truth, summed over classes).
"""

_KWARGS_DESCRIPTION = """
Args:
    predictions (list of list of float): for each text the probabilities of all classes; they sum to 1.
    references (list of int): the right class of each text, from 0.
    num_bins (int): bins of the confidence, for the calibration error. Defaults to 10.

Returns:
    accuracy (float), f1_macro (float): the mean of F1 over the classes that occur or are predicted.
    precision, recall, f1 (list of float): for each class; 0 where the divisor is 0.
    confusion_matrix (list of list of int): row: the right class; column: the predicted one.
    expected_calibration_error (float): from 0, right, to 1.
    brier_score (float): from 0, right, to 2.

Examples:
    >>> metric = evaluate.load("hfllm/evaluation/metrics/calibrated_classification")
    >>> probabilities = [[0.9, 0.1], [0.9, 0.1], [0.2, 0.8], [0.2, 0.8]]
    >>> results = metric.compute(predictions=probabilities, references=[0, 1, 1, 1])
    >>> print(results["accuracy"], results["confusion_matrix"], round(results["brier_score"], 3))
    0.75 [[1, 0], [1, 2]] 0.45
    >>> print(round(results["expected_calibration_error"], 3))  # 0.9 - 1 / 2 for two, 1 - 0.8 for two
    0.3
"""

_CITATION = """
@inproceedings{guo2017calibration,
  title={On Calibration of Modern Neural Networks},
  author={Guo, Chuan and Pleiss, Geoff and Sun, Yu and Weinberger, Kilian Q.},
  booktitle={International Conference on Machine Learning},
  year={2017}
}
@article{brier1950verification,
  title={Verification of forecasts expressed in terms of probability},
  author={Brier, Glenn W.},
  journal={Monthly Weather Review},
  year={1950}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class CalibratedClassification(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
            reference_urls=["https://arxiv.org/abs/1706.04599"],
        )

    def _compute(self, predictions, references, num_bins=10):
        probabilities, labels = np.array(predictions, dtype=np.float64), np.array(references)
        if probabilities.ndim != 2 or not np.allclose(probabilities.sum(-1), 1, atol=1e-3) or (probabilities < 0).any():
            raise ValueError("The predictions must be probabilities: for each text one per class, which sum to 1.")
        num_classes = probabilities.shape[1]
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"The references run from {labels.min()} to {labels.max()}; there are {num_classes} classes."
            )
        scores = classification_scores(probabilities, labels, num_bins=num_bins)
        return {name: scores[name] for name in SCORES}
