"""Table and pictures of a benchmark: bars side by side, and the cost of a token by size and context."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .escaping import plain_labels
from .pictures import EDGE, GRID, TEXT, TRAINING, VALIDATION, save_figure


if TYPE_CHECKING:
    from matplotlib.axes import Axes


# The part of the results, the key, the label, the unit, and the number format.
COLUMNS = (
    ("training", "tokens_per_second", "training, tokens/s", 1, "{:,.0f}"),
    ("training", "mfu", "of the machine's measured peak (MFU)", 0.01, "{:.0f} %"),
    ("memory", "bytes", "memory of training, MiB", 2**20, "{:,.0f}"),
    ("decoding", "tokens_per_second", "decoding, tokens/s", 1, "{:,.0f}"),
)
OTHERS = "#8a939c"


def benchmark_table(results: Mapping[str, Any]) -> str:
    """The measurements of each model, as a Markdown table."""
    columns = [column for column in COLUMNS if column[0] in results]
    lines = [["model", *(words for _, _, words, _, _ in columns)], ["---"] + ["---:"] * len(columns)]
    for name in _models(results, columns):
        numbers = [(results[part].get(name, {}).get(key), unit, form) for part, key, _, unit, form in columns]
        lines.append([name, *("" if value is None else form.format(value / unit) for value, unit, form in numbers)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


@plain_labels()
def plot_benchmark(results: Mapping[str, Any], path: str | Path, *, title: str) -> Path:
    """Draw into a PNG a panel of bars for each measured number, ours in colour."""
    from matplotlib.figure import Figure  # not pyplot: no window, no global state

    columns = [column for column in COLUMNS if column[0] in results]
    names = {column[:2]: list(results[column[0]]) for column in columns}
    heights = [max(len(names[column[:2]]) for column in columns[row : row + 2]) for row in range(0, len(columns), 2)]
    size = (7 if len(columns) == 1 else 13, 0.9 + sum(0.34 * height + 0.7 for height in heights))
    figure = Figure(figsize=size, dpi=120, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.1, hspace=0.03, wspace=0.03)
    figure.suptitle(title, fontsize=12, color=TEXT)
    grid = figure.add_gridspec(len(heights), min(2, len(columns)), height_ratios=heights)
    for index, (part, key, words, unit, form) in enumerate(columns):
        axes = figure.add_subplot(grid[index // 2, index % 2])
        models = names[part, key]
        values = [results[part][name][key] / unit for name in models]
        colors = [TRAINING if name.startswith("hfllm") else OTHERS for name in models]
        bars = axes.barh(range(len(models)), values, color=colors, height=0.68)
        axes.bar_label(bars, [form.format(value) for value in values], padding=4, color=TEXT, fontsize=9)
        axes.set_yticks(range(len(models)), models)
        axes.invert_yaxis()
        axes.set_xlim(0, 1.18 * max(values))
        axes.set_title(words, fontsize=10, color=TEXT, loc="left")
        _dress(axes)
        axes.grid(axis="y", visible=False)
        axes.xaxis.set_major_formatter("{x:,.0f}")
    return save_figure(figure, path)


def plot_scaling(points: list[dict[str, Any]], path: str | Path, *, title: str) -> Path:
    """Draw into a PNG the milliseconds of a token, in training and in decoding, by model size and by context.

    A point has `model`, `axis` ("num_parameters" or "context"), its place on that axis by that name, and
    `training_seconds_per_token` and `decoding_seconds_per_token`.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    models = list(dict.fromkeys(point["model"] for point in points))
    colors = dict(zip(models, (TRAINING, VALIDATION, OTHERS, "#3f9c78", "#8c6bb1")))
    styles: dict[str, tuple[Literal["-", "--"], str]] = {"training": ("-", "o"), "decoding": ("--", "s")}
    figure = Figure(figsize=(12, 5.2), dpi=120, facecolor="white")
    figure.set_layout_engine("constrained", h_pad=0.08, w_pad=0.1)
    figure.suptitle(title, fontsize=12, color=TEXT)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (axis, words) in zip(panels, (("num_parameters", "parameters"), ("context", "context, tokens"))):
        own = [point for point in points if point["axis"] == axis]
        for model in models:
            line = sorted((point for point in own if point["model"] == model), key=lambda point: point[axis])
            for kind, (style, marker) in styles.items():
                seconds = [1e3 * point[f"{kind}_seconds_per_token"] for point in line]
                places = [point[axis] for point in line]
                axes.plot(places, seconds, style, marker=marker, markersize=4, linewidth=1.6, color=colors[model])
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(words, color=TEXT)
        if axis == "context":
            axes.xaxis.set_major_locator(FixedLocator(sorted({point[axis] for point in own})))
            axes.xaxis.set_major_formatter("{x:,.0f}")
        else:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:,.3g} M")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")
        _dress(axes)
    panels[0].set_ylabel("milliseconds per token", color=TEXT)
    legend = [Line2D([], [], color=colors[model], linewidth=2.5, label=model) for model in models]
    legend += [
        Line2D([], [], color=TEXT, linestyle=style, marker=marker, markersize=4, label=kind)
        for kind, (style, marker) in styles.items()
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False, labelcolor=TEXT)
    return save_figure(figure, path)


def _models(results: Mapping[str, Any], columns: list[tuple[str, str, str, float, str]]) -> list[str]:
    return list(dict.fromkeys(name for part, *_ in columns for name in results[part]))


def _dress(axes: "Axes") -> None:
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(EDGE)
    axes.tick_params(colors=TEXT, labelsize=9)
