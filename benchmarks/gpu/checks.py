"""Types of a smoke check: its device and dtype, its result, and the reason for skipping it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Place:
    """Device and dtype of the checks."""

    device: torch.device
    narrow: torch.dtype
    """bf16, or float32 if that is not supported."""
    dry: bool

    @property
    def unit(self) -> float:
        """Relative error of one rounding."""
        return float(torch.finfo(self.narrow).eps)

    def random(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal random numbers that are exact in `dtype`."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(self.device, dtype or self.narrow)


class Unavailable(Exception):
    """The reason why a check does not run here."""


Check = Callable[[Place], dict[str, tuple[float, float]]]
"""Errors with their limits, by quantity."""
