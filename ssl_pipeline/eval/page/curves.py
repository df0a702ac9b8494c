"""Curves as inline SVG, without a library; colours are those of the page, light or dark."""

from __future__ import annotations

import math
from html import escape

from ssl_pipeline.eval.page.metrics import Series

WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 24
MOST_POINTS = 400  # of a curve; more lie closer than pixels


def curve(series: Series) -> str:
    """An SVG of a series over the steps, with the figure at the start as a dashed line."""
    low, high = _range(series.values)
    first, last = series.steps[0], max(series.steps[-1], series.steps[0] + 1)

    def place(step: float, value: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * (step - first) / (last - first)
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low)

    points = [place(step, value) for step, value in thinned(series)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts = [_axes(low, high, first, last)]
    if series.start is not None:
        _, y = place(first, series.start)
        parts.append(f'<line class="start" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts.append(f'<polyline class="curve" points="{line}"/>')
    if len(points) < 40:
        parts += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in points]
    label = escape(f"{series.title} from step {first} to {series.steps[-1]}")
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
    for share in (0.0, 0.5, 1.0):
        y = bottom - (bottom - TOP) * share
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text x="{LEFT - 4}" y="{y + 3.5:.1f}" text-anchor="end">{number(low + (high - low) * share)}</text>'
        )
    for share, anchor in ((0.0, "start"), (1.0, "end")):
        x = LEFT + (right - LEFT) * share
        parts.append(
            f'<text x="{x}" y="{bottom + 15}" text-anchor="{anchor}">{first + (last - first) * share:g}</text>'
        )
    return "".join(parts)


def number(value: float) -> str:
    """A number in four digits."""
    return f"{value:.4g}"
