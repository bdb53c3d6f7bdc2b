"""A curve of any length as one line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

HISTORY = 512
"""Values of a sparkline; twice as many are averaged in pairs."""
LEVELS, ASCII_LEVELS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
"""Heights of a sparkline, where the terminal has these characters and where not."""


def sparkline(values: Sequence[float], width: int, levels: str = LEVELS) -> str:
    """A curve as text: one character for each value, or for the mean of several where there are more
    than columns.

    Args:
        values: finite ones, the oldest first.
        width: columns.
        levels: characters, the lowest first.
    """
    if not values or width < 1:
        return ""
    count = min(width, len(values))
    edges = [number * len(values) // count for number in range(count + 1)]
    means = [sum(values[begin:end]) / (end - begin) for begin, end in pairwise(edges)]
    low, high = min(means), max(means)
    if high <= low:
        return levels[len(levels) // 2] * count
    scale = (len(levels) - 1) / (high - low)
    return "".join(levels[round((value - low) * scale)] for value in means)


class Curve:
    """A curve of any length in bounded memory: each value is the mean of equally many."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.newest: float | None = None
        self._each = 1
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """Take the next value; one that is not finite is left out."""
        if not math.isfinite(value):
            return
        self.newest = value
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._each:
            return
        self.values.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self.values) >= 2 * HISTORY:
            pairs = zip(self.values[::2], self.values[1::2], strict=True)
            self.values = [(one + other) / 2 for one, other in pairs]
            self._each *= 2
