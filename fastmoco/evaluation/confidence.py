"""How far a measured share may be from the true one."""

from __future__ import annotations

import math
from typing import NamedTuple

Z_95 = 1.959963984540054
"""Quantile of the normal distribution for 95 % between both sides."""


class Interval(NamedTuple):
    """Bounds of a share, both in [0, 1]."""

    low: float
    high: float


def wilson(correct: float, total: int, *, z: float = Z_95) -> Interval:
    """The confidence interval of a share of independent images (Wilson 1927).

    `(p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)`. It has sensible bounds
    for shares near 0 and 1 and for few images, where the normal approximation has none. It is about
    the choice of the images, not about the seed of a training.

    Args:
        correct: images classified correctly, in [0, total].
        total: images, at least 1.
        z: quantile of the normal distribution; the default gives 95 %.

    Raises:
        ValueError: if the numbers are out of range.
    """
    if total < 1 or not 0 <= correct <= total:
        raise ValueError(
            f"correct={correct}, total={total}: needs 0 <= correct <= total, total > 0"
        )
    share = correct / total
    centre = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return Interval(max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale))
