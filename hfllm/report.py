"""A run's page: its curves."""

import json
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np


if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

TRAINING, VALIDATION, TEXT, GRID = "#31688e", "#d1603d", "#3d4650", "#e3e6e9"
SMALL_PANELS = (
    ("eval_bits_per_byte", "validation bits per byte"),
    ("learning_rate", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_second", "tokens per second"),
)


def append_to_log(path: str | Path, entry: dict[str, Any]) -> None:
    """Add a line to a run's `log.jsonl`; one that a kill has torn is ended first, so that it takes no other with it."""
    with Path(path).open("a+b") as file:
        is_torn = False
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            is_torn = file.read(1) != b"\n"
        file.write(("\n" if is_torn else "").encode() + json.dumps(entry).encode() + b"\n")


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The entries of a run's `log.jsonl` in the order of their steps, as the model that came out of it saw them.

    A run that was killed starts again from its last checkpoint and goes back in its log: what stood there from that
    step on no longer counts. A torn line, as a kill leaves it, is left out with a warning.
    """
    entries: dict[int, dict[str, Any]] = {}
    lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            step = int(entry["step"])
        except (ValueError, KeyError, TypeError):
            logger.warning("%s, line %d is torn or no entry of a log, and left out: %.60r", path, number, line)
            continue
        while entries and (last := next(reversed(entries))) > step:
            del entries[last]
        entries[step] = entries.get(step, {}) | entry
    return list(entries.values())


def plot_curves(log: list[dict[str, Any]], path: str | Path, *, title: str | None = None) -> Path:
    """Draw into a PNG what `read_log` returned: the losses, and below them each other number that was logged."""
    if not log:
        raise ValueError("There is nothing to draw: the log has no entries. Was the run stopped before logging_steps?")
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    panels = [(key, label) for key, label in SMALL_PANELS if np.isfinite(_series(log, key)[1]).any()]
    num_rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(10, 4.2 + 2.1 * num_rows), dpi=120, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08, hspace=0.03, wspace=0.03)
    grid = figure.add_gridspec(1 + num_rows, 2, height_ratios=[2] + [1] * num_rows)
    if title:
        figure.suptitle(title, fontsize=13, color=TEXT)

    loss_axes = figure.add_subplot(grid[0, :])
    _draw_losses(loss_axes, log)
    loss_axes.set_xlim(0, 1.02 * max(1, log[-1]["step"]))
    loss_axes.set_xlabel("step", color=TEXT)
    for index, (key, label) in enumerate(panels):
        axes = figure.add_subplot(grid[1 + index // 2, index % 2], sharex=loss_axes)
        _draw_small(axes, *_series(log, key), key=key, label=label)
        if index >= len(panels) - 2:
            axes.set_xlabel("step", color=TEXT)
    figure.align_ylabels()
    figure.savefig(path)
    return Path(path)


def _series(log: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one number; NaN where it was logged and was none."""
    pairs = [(entry["step"], math.nan if entry[key] is None else entry[key]) for entry in log if key in entry]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean over a fiftieth of the run around each point, so that it does not lag; NaN is passed over."""
    index = np.arange(len(values))
    reach = np.minimum(np.minimum(index, index[::-1]), len(values) // 100)  # shorter towards both ends
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    first, end = index - reach, index + reach + 1
    num_finite = counts[end] - counts[first]
    return np.where(num_finite > 0, sums[end] - sums[first], np.nan) / np.maximum(num_finite, 1)


def _draw_losses(axes: "Axes", log: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    drawn = []
    steps, losses = _series(log, "loss")
    finite = np.isfinite(losses)
    if finite.any():
        drawn.append(losses[finite])
        label = f"training, {losses[finite][-1]:.3f} at the end"
        if len(steps) < 100:
            axes.plot(steps, losses, color=TRAINING, linewidth=1.6, marker=_marker(steps), markersize=4, label=label)
        else:
            width = 2 * (len(losses) // 100) + 1
            label = f"training (mean over {width} points), {losses[finite][-width:].mean():.3f} at the end"
            axes.plot(steps, losses, color=TRAINING, linewidth=0.6, alpha=0.4)
            axes.plot(steps, _smooth(losses), color=TRAINING, linewidth=1.6, label=label)
    steps_without, num_steps = steps[~finite], len(steps)

    steps, losses = _series(log, "eval_loss")
    finite = np.isfinite(losses)
    if finite.any():
        drawn.append(losses[finite])
        label = f"validation, {losses[finite][-1]:.3f} at the end"
        axes.plot(steps, losses, color=VALIDATION, linewidth=1.4, marker=_marker(steps), markersize=4, label=label)

    if len(steps_without):
        label = f"training loss not finite ({len(steps_without):,} of {num_steps:,} points)"
        bottom = axes.get_xaxis_transform()  # y counts from 0 at the bottom to 1 at the top
        axes.plot(steps_without, np.full(len(steps_without), 0.03), "k|", transform=bottom, label=label)
    _dress(axes, "loss (nats per token)")
    if not drawn:
        axes.set_yticks([])
    elif 0 < 2 * np.concatenate(drawn).min() < np.concatenate(drawn).max():
        # The first steps fall from log(vocab_size); on a linear axis they would take the room of all the others.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=[1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8]))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper right", frameon=False, labelcolor=TEXT)


def _draw_small(axes: "Axes", steps: np.ndarray, values: np.ndarray, *, key: str, label: str) -> None:
    finite = values[np.isfinite(values)]
    is_validation = key.startswith("eval_")
    axes.plot(
        steps,
        values,
        color=VALIDATION if is_validation else TRAINING,
        linewidth=1.4 if len(steps) < 300 else 0.8,
        marker=_marker(steps) if is_validation or len(steps) == 1 else None,
        markersize=3,
    )
    if key == "grad_norm" and finite.min() > 0 and finite.max() > 20 * np.median(finite):
        axes.set_yscale("log")
    elif key == "tokens_per_second":
        axes.set_ylim(0, 1.15 * finite.max())
    elif key == "learning_rate":
        axes.set_ylim(bottom=0)
    _dress(axes, label)
    if key == "tokens_per_second":
        axes.yaxis.set_major_formatter("{x:,.0f}")
    elif key == "learning_rate":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)


def _marker(steps: np.ndarray) -> str | None:
    return "o" if len(steps) < 60 else None  # few points are seen one by one; a single one would make no line


def _dress(axes: "Axes", label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylabel(label, color=TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b8bec4")
    axes.tick_params(colors=TEXT, labelsize=9)
