"""The loss over a learning rate that grows, as an SVG file of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ssl_pipeline.eval.page.curves import number

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 48
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#556}.axis{fill:none;stroke:#889}.grid{stroke:#d8dbe0;stroke-width:.6}"
    ".loss{fill:none;stroke:#9bb8d8;stroke-width:1}.smooth{fill:none;stroke:#2563a8;stroke-width:2}"
    ".mark{stroke:#22863a;stroke-dasharray:5 3}.own{stroke:#c0392b;stroke-dasharray:2 3}"
)


def range_plot(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float], marks: Sequence[tuple[str, str, float]]
) -> str:
    """Loss and its moving average over the logarithm of the rate; marks: class, words and rate of upright lines.

    Losses far above the first ones are cut off, as they show nothing.
    """
    low, highest = min(smoothed), max(smoothed[: max(len(smoothed) // 2, 1)])
    margin = 0.15 * (highest - low) or max(abs(low), 1.0) * 0.05
    low, high = low - margin, highest + margin
    shown = [rate for _, _, rate in marks] + list(rates)
    first, last = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))

    def across(rate: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (math.log10(rate) - first) / max(last - first, 1)

    def down(loss: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (high - min(max(loss, low), high)) / (high - low)

    def line(kind: str, values: Sequence[float]) -> str:
        points = " ".join(f"{across(rate):.1f},{down(value):.1f}" for rate, value in zip(rates, values, strict=True))
        return f'<polyline class="{kind}" points="{points}"/>'

    bottom = HEIGHT - BOTTOM
    parts = [f'<path class="axis" d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}"/>']
    for power in range(first, last + 1):
        x = across(10.0**power)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">1e{power}</text>')
    for share in (0.0, 0.5, 1.0):
        value = low + (high - low) * share
        parts.append(f'<text x="{LEFT - 6}" y="{down(value) + 4:.1f}" text-anchor="end">{number(value)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">learning rate</text>')
    parts += [line("loss", losses), line("smooth", smoothed)]
    for place, (kind, words, rate) in enumerate(marks):
        x = across(rate)
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{x + 4:.1f}" y="{TOP + 12 + 16 * place}">{words} {number(rate)}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Loss over learning rate"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
