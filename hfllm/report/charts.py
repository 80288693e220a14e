"""Line charts for the page: SVG for the lines, text for the numbers around them, so that both fit any width.

Labels inside a scaled SVG would be too small to read on a phone. So only the drawing is stretched, with lines that keep
their thickness, and the labels are text beside it.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .escaping import html_text
from .pictures import _series, _smooth


MAX_POINTS = 800  # of a line: more than a screen has columns for
MANY_POINTS = 100  # from this many on, a line is drawn pale under its running mean
COLORS = 8  # the classes s0 to s7 of the page's style


@dataclasses.dataclass(frozen=True)
class Line:
    """Numbers over steps; `color` is the number of a colour of the page, `is_dotted` is for few, separate points."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    color: int
    is_dotted: bool = False


def line_of(log: list[dict[str, Any]], key: str, label: str, *, color: int, is_dotted: bool = False) -> Line | None:
    """One number of a log as a line; None if it was never logged, or never finite."""
    steps, values = _series(log, key)
    return Line(label, steps, values, color, is_dotted) if np.isfinite(values).any() else None


def chart(
    title: str, lines: Sequence[Line], *, unit: str = "", can_be_logarithmic: bool = False, from_zero: bool = False
) -> str:
    """A chart as HTML, or nothing if there are no lines. Values that are not finite leave a gap.

    If allowed, an axis is logarithmic when the largest value is more than twice the smallest; it begins at zero if the
    values come near it, or always (`from_zero`).
    """
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return ""
    finite = np.concatenate([line.values[np.isfinite(line.values)] for line in lines])
    low, high = float(finite.min()), float(finite.max())
    # The first steps fall from log(vocab_size); on a linear axis they would take most of the height.
    is_logarithmic = can_be_logarithmic and 0 < 2 * low < high
    ticks = (
        _log_ticks(low, high)
        if is_logarithmic
        else _ticks(min(low, 0.0) if from_zero or low < 0.4 * high else low, high)
    )
    bottom, top = min(low, ticks[0]), max(high, ticks[-1])
    first = float(min(line.steps[0] for line in lines))
    last = float(max(line.steps[-1] for line in lines))
    first = 0.0 if first < 0.1 * last else first
    x_ticks = _step_ticks(first, last)

    def x_of(step: float) -> float:
        return 100 * (step - first) / ((last - first) or 1)

    def y_of(value: float) -> float:
        if is_logarithmic:
            return 100 * (1 - math.log(value / bottom) / math.log(top / bottom))
        return 100 * (1 - (value - bottom) / ((top - bottom) or 1))

    drawing = "".join(f'<path class="grid" d="M0 {y_of(tick):.2f}H100"/>' for tick in ticks)
    drawing += "".join(_draw(line, x_of, y_of) for line in lines)
    y_labels = "".join(f'<span style="top:{y_of(tick):.2f}%">{_number(tick)}</span>' for tick in ticks)
    x_labels = "".join(
        f'<span style="left:{x_of(tick):.2f}%">{"step " if tick == x_ticks[0] else ""}{tick:,.0f}</span>'
        for tick in x_ticks
    )
    legend = "".join(
        f'<span class="key s{line.color % COLORS}">{html_text(line.label)} <b>{_last(line.values)}</b></span>'
        for line in lines
    )
    scale = {"first": first, "last": last, "bottom": bottom, "top": top, "log": is_logarithmic}
    data = [{"label": line.label, "color": line.color % COLORS, "points": _points(line, digits=5)} for line in lines]
    subtitle = ", ".join([unit] * bool(unit) + ["logarithmic"] * is_logarithmic)
    numbers = f'data-scale="{html_text(json.dumps(scale))}" data-lines="{html_text(json.dumps(data))}"'
    return f"""<figure class="chart" {numbers}>
<figcaption>{html_text(title)}{f" <small>{html_text(subtitle)}</small>" if subtitle else ""}</figcaption>
<div class="legend">{legend}</div>
<div class="frame"><div class="y">{y_labels}</div><div class="plot">
<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="{html_text(title)}">{drawing}</svg>
<div class="cursor" hidden></div><div class="tip" hidden></div></div><div class="x">{x_labels}</div></div>
</figure>"""


def _draw(line: Line, x_of: Any, y_of: Any) -> str:
    style = f"s{line.color % COLORS}"
    if len(line.steps) >= MANY_POINTS and not line.is_dotted:
        mean = dataclasses.replace(line, values=_smooth(line.values))
        return f'<path class="line pale {style}" d="{_path(line, x_of, y_of)}"/>' + (
            f'<path class="line {style}" d="{_path(mean, x_of, y_of)}"/>'
        )
    drawn = f'<path class="line {style}" d="{_path(line, x_of, y_of)}"/>'
    if line.is_dotted or len(line.steps) == 1:
        # A path of length zero with a round end is a dot that stretching does not bend.
        dots = "".join(f"M{x_of(x):.2f} {y_of(y):.2f}h0" for x, y in _points(line))
        drawn += f'<path class="dots {style}" d="{dots}"/>'
    return drawn


def _path(line: Line, x_of: Any, y_of: Any) -> str:
    """The line as SVG; where a value is not finite, it is interrupted."""
    parts, is_drawing = [], False
    for step, value in _thinned(line):
        if not math.isfinite(value):
            is_drawing = False
            continue
        parts.append(f"{'L' if is_drawing else 'M'}{x_of(step):.2f} {y_of(value):.2f}")
        is_drawing = True
    return "".join(parts)


def _points(line: Line, digits: int | None = None) -> list[tuple[float, float]]:
    pairs = [(step, value) for step, value in _thinned(line) if math.isfinite(value)]
    return pairs if digits is None else [(step, float(f"{value:.{digits}g}")) for step, value in pairs]


def _thinned(line: Line) -> list[tuple[float, float]]:
    """About `MAX_POINTS` points at most: the lowest and highest of each stretch, so that no spike is lost."""
    pairs = list(zip(line.steps.tolist(), line.values.tolist()))
    if len(pairs) <= MAX_POINTS:
        return pairs
    stretch = math.ceil(2 * len(pairs) / MAX_POINTS)
    kept = []
    for start in range(0, len(pairs), stretch):
        part = pairs[start : start + stretch]
        finite = [pair for pair in part if math.isfinite(pair[1])]
        if not finite:
            kept.append(part[0])
            continue
        ends = {min(finite, key=lambda pair: pair[1]), max(finite, key=lambda pair: pair[1])}
        kept += sorted(ends | ({pairs[-1]} if start + stretch >= len(pairs) else set()))
    return kept


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that cover the values."""
    span = (high - low) or abs(high) or 1.0
    size = 10 ** math.floor(math.log10(span / count))
    size *= next(factor for factor in (1, 2, 2.5, 5, 10) if span / (size * factor) <= count)
    first, end = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [round(index * size, 12) for index in range(first, max(end, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    digits = (1, 1.5, 2, 3, 4, 5, 6, 8) if high < 4 * low else (1, 2, 5) if high < 500 * low else (1,)
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**exponent for exponent in exponents for digit in digits]
    below = max((tick for tick in ticks if tick <= low), default=low)
    above = min((tick for tick in ticks if tick >= high), default=high)
    return [tick for tick in ticks if below <= tick <= above]


def _step_ticks(first: float, last: float) -> list[float]:
    ticks = [tick for tick in _ticks(first, last, 4) if first <= tick <= last and tick == int(tick)]
    return ticks or [first]


def _number(value: float) -> str:
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e")
    return f"{value:,.6g}" if abs(value) < 1e4 else f"{value:,.0f}"


def _last(values: np.ndarray) -> str:
    value = float(values[np.isfinite(values)][-1])
    return _number(float(f"{value:.4g}"))
