"""Pictures of a classifier's test: what it confuses, how well it finds each label, and numbers beside the true ones."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .escaping import plain_labels
from .pictures import EDGE, TEXT, TRAINING, VALIDATION, drawable, save_figure


@plain_labels()
def plot_confusion(scores: dict, names: Sequence[str], path: str | Path, *, title: str | None = None) -> Path:
    """Draw the confusion matrix and the reliability of `score_predictions`'s result into a PNG; returns its path.

    A cell's shade is its share of the true label's texts, its number counts them. The bars of the reliability diagram
    show the accuracy at each confidence; on the diagonal, confidence equals accuracy.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    confusion = np.array(scores["confusion"])
    num_labels = len(names)
    side = min(12.0, 3.2 + 0.45 * num_labels)
    figure = Figure(figsize=(side + 4.6, side), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[side, 3.8])
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    left.imshow(shares, cmap=LinearSegmentedColormap.from_list("share", ["#ffffff", TRAINING]), vmin=0, vmax=1)
    shown = [drawable(name) for name in names]
    every = range(0, num_labels, max(1, num_labels // 40))  # more names than that do not fit
    left.set_xticks(every, [shown[index] for index in every], rotation=45, ha="right", rotation_mode="anchor")
    left.set_yticks(every, [shown[index] for index in every])
    left.set_xlabel("the model says", color=TEXT)
    left.set_ylabel("it is", color=TEXT)
    if num_labels <= 20:
        for (row, column), count in np.ndenumerate(confusion):
            if count:
                color = "white" if shares[row, column] > 0.55 else TEXT
                left.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontsize=9)
    left.set_title(f"accuracy {scores['accuracy']:.1%}, macro-F1 {scores['f1_macro']:.3f}", color=TEXT, fontsize=10)

    right.plot([0, 1], [0, 1], color=EDGE, linestyle="--", linewidth=1)
    reliability = scores["reliability"]
    confidences = [row["confidence"] for row in reliability]
    right.bar(confidences, [row["accuracy"] for row in reliability], width=0.07, color=TRAINING)
    right.plot(confidences, confidences, "o", color=VALIDATION, markersize=4, label="confidence")
    for row in reliability:
        right.annotate(
            f"{row['texts']:,}",
            (row["confidence"], row["accuracy"]),
            textcoords="offset points",
            xytext=(0, 3),
            ha="center",
            fontsize=8,
            color=TEXT,
        )
    right.set(xlim=(0, 1.05), ylim=(0, 1.1))
    right.set_xlabel("confidence", color=TEXT)
    right.set_ylabel("accuracy", color=TEXT)
    right.set_title(f"expected calibration error {scores['ece']:.3f}", color=TEXT, fontsize=10)
    right.legend(frameon=False, loc="upper left", fontsize=8)
    for axes in (left, right):
        _finish(axes)
    if title:
        figure.suptitle(drawable(title, 80), color=TEXT)
    return save_figure(figure, path, dpi=120)


@plain_labels()
def plot_labels(scores: dict, path: str | Path, *, title: str | None = None) -> Path:
    """Draw each label's F1 as a bar, with its precision and recall on it, into a PNG; returns its path.

    `scores` is `score_label_sets`'s result. Labels are in the order of their number of texts, which stands beside them.
    """
    from matplotlib.figure import Figure

    rows = sorted(scores["per_label"].items(), key=lambda item: item[1]["texts"])[-40:]  # more of them do not fit
    figure = Figure(figsize=(8, 1.8 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [row["f1"] for _, row in rows], color=TRAINING, alpha=0.6, label="F1")
    axes.plot([row["precision"] for _, row in rows], places, "o", color=TEXT, markersize=5, label="precision")
    axes.plot([row["recall"] for _, row in rows], places, "s", color=VALIDATION, markersize=5, label="recall")
    axes.set_yticks(places, [f"{drawable(name)}, {row['texts']:,}" for name, row in rows])
    axes.set(xlim=(0, 1.02))
    axes.set_title(
        f"micro-F1 {scores['f1_micro']:.3f}, macro-F1 {scores['f1_macro']:.3f}, all labels right "
        f"{scores['subset_accuracy']:.1%}",
        color=TEXT,
        fontsize=10,
    )
    figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=9)
    _finish(axes)
    if title:
        figure.suptitle(drawable(title, 80), color=TEXT)
    return save_figure(figure, path, dpi=120)


@plain_labels()
def plot_numbers(
    true: np.ndarray, predicted: np.ndarray, path: str | Path, *, name: str, title: str | None = None
) -> Path:
    """Draw predicted numbers over the true ones into a PNG; returns its path. On the diagonal a prediction is right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
    axes.plot(ends, ends, color=EDGE, linestyle="--", linewidth=1)
    axes.axhline(true.mean(), color=VALIDATION, linewidth=1, label="mean of the true numbers")
    axes.plot(true, predicted, "o", color=TRAINING, markersize=4, alpha=max(0.15, min(0.8, 100 / len(true))))
    axes.set_xlabel(f"{drawable(name)}, true", color=TEXT)
    axes.set_ylabel(f"{drawable(name)}, predicted", color=TEXT)
    axes.legend(frameon=False, loc="upper left", fontsize=8)
    _finish(axes)
    if title:
        figure.suptitle(drawable(title, 80), color=TEXT)
    return save_figure(figure, path, dpi=120)


def _finish(axes: Any) -> None:
    axes.tick_params(colors=TEXT, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(EDGE)
