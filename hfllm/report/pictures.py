"""Pictures: a run's curves, and what a model does with a prompt."""

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runs.files import replacing
from .escaping import plain_labels


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.colors import Colormap
    from matplotlib.ft2font import FT2Font


TRAINING, VALIDATION, TEXT, GRID = "#31688e", "#d1603d", "#3d4650", "#e3e6e9"
EDGE, FUTURE = "#b8bec4", "#eceef0"
SMALLEST_FONT = 5.5  # points: smaller labels of tokens cannot be read
LARGEST_PICTURE = 24  # inches of attention maps, at 120 pixels an inch
SMALL_PANELS = (
    ("eval_bits_per_byte", "validation bits per byte"),
    ("learning_rate", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_second", "tokens per second"),
)


@plain_labels()
def plot_curves(log: list[dict[str, Any]], path: str | Path, *, title: str | None = None) -> Path:
    """Draw a log (from `read_log`) into a PNG: the losses, and below them each other logged number."""
    if not log:
        raise ValueError("There is nothing to draw: the log has no entries. Was the run stopped before logging_steps?")
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    panels = [(key, label) for key, label in SMALL_PANELS if np.isfinite(_series(log, key)[1]).any()]
    num_rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(10, 4.2 + 2.1 * num_rows), dpi=120, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.08, hspace=0.03, wspace=0.03)
    grid = figure.add_gridspec(1 + num_rows, 2, height_ratios=[2] + [1] * num_rows)
    if title:
        figure.suptitle(drawable(title, 80), fontsize=13, color=TEXT)

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
    return save_figure(figure, path)


@plain_labels()
def plot_attention(
    maps: np.ndarray,
    titles: Sequence[str],
    tokens: Sequence[str],
    path: str | Path,
    *,
    num_columns: int,
    title: str | None = None,
) -> Path:
    """Draw attention weights (N, T, T) into a PNG, one map for each title, row after row of `num_columns`.

    A map's row is a token that looks, its columns are the tokens it looks at, up to itself. Maps grow until each token
    can be written beside its row; where the picture would be wider or higher than `LARGEST_PICTURE`, only every second,
    third, ... token is written, and the title says so. In a single small map, the cells also show the weights as
    numbers.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    num_tokens, num_rows = len(tokens), math.ceil(len(maps) / num_columns)
    is_alone = len(maps) == 1
    size = min(max(0.3 * num_tokens, 4.5), 12) if is_alone else min(max(8.5 / num_columns, 0.9), 2.8)  # inches of a map
    largest = LARGEST_PICTURE / max(num_columns, num_rows)
    size = min(max(size, SMALLEST_FONT * num_tokens / (0.75 * 72)), max(size, largest))
    every = max(1, math.ceil(SMALLEST_FONT * num_tokens / (0.75 * 72 * size) - 1e-9))  # how many rows a label takes
    font_size = min(7.5, 0.75 * 72 * size * every / num_tokens)  # points, of which an inch has 72
    labels = {position: drawable(tokens[position]) for position in range(0, num_tokens, every)}
    if every > 1:
        title = f"{title or ''} (1 token of {every} is labelled)".strip()
    margin = 0.07 * max(map(len, labels.values()), default=1)  # inches, below and on the left
    figure = Figure(
        figsize=(max(num_columns * size + margin + 1.2, 5), num_rows * (size + 0.2) + margin + 0.8),
        dpi=120,
        facecolor="white",
    )
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.01)
    if title:
        figure.suptitle(drawable(title, 80), fontsize=12, color=TEXT)
    grid = figure.add_gridspec(num_rows, num_columns)
    # A weight's colour is its square root, because most of a head's weights are small, and some of these matter.
    norm = PowerNorm(0.5, 0, 1)
    colors = ScalarMappable(norm, _attention_colors())
    panels = []
    for index, weights in enumerate(maps):
        axes = figure.add_subplot(grid[index // num_columns, index % num_columns])
        seen = np.ma.masked_array(weights, mask=np.triu(np.ones_like(weights, dtype=bool), 1))
        axes.imshow(seen, cmap=colors.cmap, norm=norm, interpolation="nearest")
        title_size = 11 if is_alone else 8 if size > 1.5 else 6
        axes.set_title(titles[index], fontsize=title_size, color=TEXT, pad=4)
        axes.spines[:].set_color(EDGE)
        is_lowest = index + num_columns >= len(maps)
        _label_tokens(axes.yaxis, labels if index % num_columns == 0 else {}, size=font_size)
        _label_tokens(axes.xaxis, labels if is_lowest else {}, size=font_size, rotation=90)
        panels.append(axes)
    if is_alone:
        panels[0].set_ylabel("this token", color=TEXT)
        panels[0].set_xlabel("looks at these", color=TEXT)
        if num_tokens <= 16:
            _write_weights(panels[0], maps[0])
    bar = figure.colorbar(colors, ax=panels, shrink=min(1, 3 / (num_rows * size)), aspect=18, pad=0.02)
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    bar.set_label("attention weight", color=TEXT, fontsize=8)
    bar.ax.tick_params(colors=TEXT, labelsize=7)
    bar.outline.set_edgecolor(EDGE)
    return save_figure(figure, path)


@plain_labels()
def plot_probabilities(
    tokens: Sequence[str],
    probabilities: Sequence[float],
    ranks: Sequence[int],
    candidates: Sequence[Sequence[tuple[str, float]]],
    path: str | Path,
    *,
    title: str | None = None,
) -> Path:
    """Draw into a PNG how likely each token was, and which tokens were likelier.

    `tokens` (N) are those that had a prediction, with their ranks (1: the likeliest) and probabilities. `candidates` (N
    + 1) are the likeliest tokens with their probabilities, best first, at each of those places, and last, after them
    all.
    """
    from matplotlib.figure import Figure, FigureBase

    heights = [0.3 * len(tokens) + 0.7, 0.3 * len(candidates[-1]) + 0.7]  # inches
    figure = Figure(figsize=(5 + 1.3 * len(candidates[-1]), sum(heights) + 0.5), dpi=120, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.08)
    if title:
        figure.suptitle(drawable(title, 80), fontsize=12, color=TEXT)
    below: FigureBase = figure
    if len(tokens) > 0:
        halves = figure.add_gridspec(2, 1, height_ratios=heights)
        above, below = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
        left, right = above.subplots(1, 2, width_ratios=[1, 2.6], sharey=True)
        texts = [f"{_percent(p)}, rank {rank:,}" if rank > 1 else _percent(p) for p, rank in zip(probabilities, ranks)]
        _draw_bars(left, tokens, probabilities, texts, color=TRAINING)
        left.set_xlim(0, 1.5)  # room for the texts
        left.set_title("probability of the actual token", fontsize=9, color=TEXT)
        _draw_candidates(right, ranks, candidates[:-1])
        right.set_title("likeliest tokens there (outlined: the actual token)", fontsize=9, color=TEXT)

    axes = below.subplots()
    labels, values = zip(*candidates[-1])
    _draw_bars(axes, labels, values, [_percent(p) for p in values], color=VALIDATION)
    axes.set_xlim(0, max(1.12 * max(values), 0.2))
    axes.set_title("what comes next, likeliest first", fontsize=9, color=TEXT)
    return save_figure(figure, path)


def save_figure(figure: Any, path: str | Path, **options: Any) -> Path:
    """Write a picture in one stroke; its ending says its format."""
    with replacing(path) as beside:
        figure.savefig(beside, format=Path(path).suffix.removeprefix("."), **options)
    return Path(path)


def _draw_bars(
    axes: "Axes", tokens: Sequence[str], probabilities: Sequence[float], texts: Sequence[str], *, color: str
) -> None:
    """A bar for each token, the first on top, with a text to its right."""
    axes.barh(range(len(tokens)), probabilities, color=color, height=0.7)
    for row, (probability, text) in enumerate(zip(probabilities, texts)):
        axes.text(probability, row, f" {text}", va="center", fontsize=8, color=TEXT)
    axes.set_ylim(len(tokens) - 0.5, -0.5)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color(EDGE)
    _label_tokens(axes.yaxis, {row: drawable(token) for row, token in enumerate(tokens)}, size=9)


def _attention_colors() -> "Colormap":
    """White to the blue of the curves to nearly black; grey where a token cannot look."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("attention", ["#ffffff", "#a9cbe0", TRAINING, "#0b2239"])
    return colors.with_extremes(bad=FUTURE)


def drawable(label: str, longest: int = 18) -> str:
    """A label in characters that the font has (others as \\u4e2d), cut if it is long."""
    font = _font()
    known = (
        c if c.isprintable() and font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in label
    )
    text = "".join(known)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


@functools.cache
def _font() -> "FT2Font":
    from matplotlib.font_manager import FontProperties, findfont
    from matplotlib.ft2font import FT2Font

    return FT2Font(findfont(FontProperties()))


def _label_tokens(axis: "Axis", labels: Mapping[int, str], *, size: float, rotation: float = 0) -> None:
    axis.set_ticks(list(labels), labels=list(labels.values()), rotation=rotation, fontsize=size, color=TEXT)
    axis.set_tick_params(length=0)


def _write_weights(axes: "Axes", weights: np.ndarray) -> None:
    for (row, column), weight in np.ndenumerate(np.tril(weights)):
        text = "1" if weight >= 0.995 else f"{weight:.2f}".removeprefix("0") if weight >= 0.005 else ""
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if weight > 0.25 else TEXT)


def _draw_candidates(axes: "Axes", ranks: Sequence[int], candidates: Sequence[Sequence[tuple[str, float]]]) -> None:
    """A table with a row for each token, a column for each rank, and a cell's colour for its probability."""
    from matplotlib.patches import Rectangle

    colors = _attention_colors()
    for row, (rank, cells) in enumerate(zip(ranks, candidates)):
        for column, (label, probability) in enumerate(cells):
            axes.add_patch(
                Rectangle((column - 0.5, row - 0.5), 1, 1, color=colors(math.sqrt(probability)), linewidth=0)
            )
            if column == rank - 1:
                corner = (column - 0.47, row - 0.42)
                axes.add_patch(Rectangle(corner, 0.94, 0.84, edgecolor=VALIDATION, linewidth=2, fill=False, zorder=3))
            axes.text(
                column,
                row,
                f"{drawable(label, 12)}  {_percent(probability)}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if probability > 0.25 else TEXT,
            )
    axes.set_xlim(-0.5, len(candidates[0]) - 0.5)
    axes.set_ylim(len(ranks) - 0.5, -0.5)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _percent(probability: float) -> str:
    return f"{probability:.0%}" if probability >= 0.095 else f"{probability:.1%}" if probability >= 0.0005 else "<0.1%"


def _series(log: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one number; NaN where it was logged as None."""
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
        # The first steps fall from log(vocab_size); on a linear axis they would take most of the height.
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
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
    elif key == "tokens_per_second":
        axes.set_ylim(0, 1.15 * finite.max())
    elif key == "learning_rate":
        axes.set_ylim(bottom=0)
    _dress(axes, label)
    if key == "tokens_per_second":
        axes.yaxis.set_major_formatter("{x:,.0f}")
    elif key == "learning_rate":
        axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _marker(steps: np.ndarray) -> str | None:
    return "o" if len(steps) < 60 else None  # few points get markers; a single one would not make a line


def _dress(axes: "Axes", label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_ylabel(label, color=TEXT)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(EDGE)
    axes.tick_params(colors=TEXT, labelsize=9)
