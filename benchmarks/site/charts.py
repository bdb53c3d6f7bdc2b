"""Small line charts as SVG within a page, so that they take the colors of its theme, light or dark."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 34
"""Room around the curves, for labels, in the units of the drawing."""


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: above it: what is drawn, with its unit.
        x: label of the horizontal axis.
        lines: name of each line, and its points (x, y) with x ascending. A single name is not shown.
    """

    title: str
    x: str
    lines: Mapping[str, Points]


def figure(panels: Sequence[Panel], caption: str) -> str:
    """Panels beside each other, one below the other on a phone, as one block of HTML.

    Args:
        panels: at least one.
        caption: below them, and what a screen reader says.
    """
    drawn = "".join(_panel(panel) for panel in panels)
    said = html.escape(caption)
    return f'<figure class="fm-charts">{drawn}<figcaption>{said}</figcaption></figure>'


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at most `most`; one number if both are the same."""
    if high <= low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _panel(panel: Panel) -> str:
    points = [point for line in panel.lines.values() for point in line]
    lows, highs = (_bounds(values) for values in zip(*points, strict=True))
    inner = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - lows[0]) / (lows[1] - lows[0]) * inner[0]
        up = (y - highs[0]) / (highs[1] - highs[0]) * inner[1]
        return round(LEFT + right, 1), round(HEIGHT - BOTTOM - up, 1)

    parts = [f'<text class="t" x="{LEFT}" y="14">{html.escape(panel.title)}</text>']
    for value in ticks(*highs):
        y = place(lows[0], value)[1]
        parts.append(f'<path class="g" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 3.5}">{_number(value)}</text>')
    for value in ticks(*lows):
        x = place(value, highs[0])[0]
        parts.append(f'<text class="x" x="{x}" y="{HEIGHT - BOTTOM + 14}">{_number(value)}</text>')
    parts.append(f'<text class="x" x="{LEFT + inner[0] / 2}" y="{HEIGHT - 4}">{panel.x}</text>')

    for number, line in enumerate(panel.lines.values()):
        path = "L".join("{} {}".format(*place(*point)) for point in line)
        parts.append(f'<path class="c c{number % 6}" d="M{path}"/>')

    keys = "".join(
        f'<span class="c{number % 6}">{html.escape(name)}</span>'
        for number, name in enumerate(panel.lines)
        if len(panel.lines) > 1
    )
    return (
        f'<div><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(panel.title, quote=True)}">{"".join(parts)}</svg>'
        f'<p class="fm-keys">{keys}</p></div>'
    )


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    """From the smallest to the largest; of equal ones a range about them."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def _number(value: float) -> str:
    """A tick as few characters."""
    if abs(value) >= 1e4:
        return f"{value / 1000:g}k"
    return f"{value:.6g}"
