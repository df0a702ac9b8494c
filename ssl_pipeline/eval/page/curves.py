"""Curves as inline SVG, without a library; colours are those of the page, light or dark."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ssl_pipeline.eval.page.html import colour, text
from ssl_pipeline.eval.page.metrics import Series

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 24
MOST_POINTS = 400  # of a curve; more lie closer than pixels


def curve(lines: Sequence[tuple[int, str, Series]]) -> str:
    """An SVG of one metric of several runs over the steps, with the figure at the start of each as a dashed line.

    lines: the place of the run among all runs, which decides its colour, its name, and its series.
    """
    low, high = _range([value for _, _, series in lines for value in series.values])
    first = min(series.steps[0] for _, _, series in lines)
    last = max(*(series.steps[-1] for _, _, series in lines), first + 1)

    def place(step: float, value: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    parts = [_axes(low, high, first, last)]
    for number_of_run, name, series in lines:
        shade = colour(number_of_run)
        if series.start is not None:
            _, y = place(first, series.start)
            ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
            parts.append(f'<line class="start" stroke="{shade}" {ends}/>')
        points = [place(step, value) for step, value in thinned(series)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        told = text(f"{name}: {number(series.values[-1])} at step {series.steps[-1]:,}")
        parts.append(f'<polyline class="curve" stroke="{shade}" points="{line}"><title>{told}</title></polyline>')
        dots = points if len(points) < 40 else points[-1:]
        parts += [f'<circle fill="{shade}" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in dots]
    label = text(f"{lines[0][2].title} from step {first} to {last}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def thinned(series: Series) -> list[tuple[int, float]]:
    """The points of a series, of many the lowest and the highest of each stretch, so that no peak is lost."""
    points = list(zip(series.steps, series.values, strict=True))
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil(len(points) / (MOST_POINTS // 2))
    kept: list[tuple[int, float]] = []
    for first in range(0, len(points), size):
        stretch = points[first : first + size]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or max(abs(high), 1.0) * 0.05
    return low - margin, high + margin


def _axes(low: float, high: float, first: int, last: int) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{right}"/>']
    for value in _round_values(low, high):
        y = bottom - (bottom - TOP) * (value - low) / (high - low)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{number(value)}</text>')
    for share, anchor in ((0.0, "start"), (1.0, "end")):
        x, step = LEFT + (right - LEFT) * share, first + (last - first) * share
        unit = "step " if share == 0 else ""
        parts.append(f'<text x="{x}" y="{bottom + 15}" text-anchor="{anchor}">{unit}{step:,.0f}</text>')
    return "".join(parts)


def _round_values(low: float, high: float) -> list[float]:
    """Three to six numbers between the two that are short to write: 0.2, 0.4, 0.6."""
    if not math.isfinite(high - low):
        return [low, high]
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    counts = range(math.ceil(low / step), int(high // step) + 1)
    return [float(f"{count * step:.12g}") for count in counts]


def number(value: float) -> str:
    """A number in four digits."""
    return f"{value:.4g}"
