"""What a smoke check is: where it runs, what it gives, and how it says that it cannot run here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the checks run, and in what."""

    device: torch.device
    narrow: torch.dtype
    """bf16, or float32 where that is not known."""
    dry: bool

    @property
    def unit(self) -> float:
        """Relative error of one rounding."""
        return float(torch.finfo(self.narrow).eps)

    def random(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers that `dtype` holds exactly."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator).to(self.device, dtype or self.narrow)


class Unavailable(Exception):
    """Why a check does not run here."""


Check = Callable[[Place], dict[str, tuple[float, float]]]
"""Errors with their limits, by quantity."""
