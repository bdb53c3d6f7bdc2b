"""The moving average one tensor at a time: the oracle of the tests."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def ema_update_reference_(averages: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    """``average += (1 - momentum) * (source - average)``, tensor by tensor, in place."""
    for average, source in zip(averages, sources, strict=True):
        average.lerp_(source.to(average.dtype), 1 - momentum)
