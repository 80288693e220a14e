"""A picture of a classifier's confusion matrix and calibration."""

from collections.abc import Sequence
from pathlib import Path

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
        axes.tick_params(colors=TEXT, labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(EDGE)
    if title:
        figure.suptitle(drawable(title, 80), color=TEXT)
    return save_figure(figure, path, dpi=120)
