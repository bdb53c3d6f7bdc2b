"""What a complete collapse is: when features no longer tell one image from another."""

from __future__ import annotations

SPREAD = 0.1
"""Share of the healthy deviation 1/sqrt(D) below which features are looked at."""
POINT = 0.01
"""The same below which all images have one feature, whatever is left between them."""
APART = 0.03
"""`apart` below which the images differ no more than two views of one image do."""
PAIRS = ("cosine/positive", "cosine/negative")
"""The metrics of `apart`."""


def apart(positive: float, negative: float) -> float:
    """How much closer the two views of an image are than two images: 0 if no closer, 1 if they have
    one feature. All that features have in common drops out.

    Args:
        positive: mean cosine of the pairs of an image's views.
        negative: that of pairs of different images.
    """
    return (positive - negative) / max(1 - negative, 1e-12)


def has_collapsed(spread: float, images_apart: float | None = None) -> bool:
    """Whether features have collapsed.

    Args:
        spread: their deviation over the batch as a share of the healthy one; NaN counts as collapsed.
        images_apart: `apart`; None if it is unknown, where the spread alone counts.
    """
    if images_apart is None or not spread >= POINT:
        return not spread >= SPREAD
    return spread < SPREAD and not images_apart >= APART
