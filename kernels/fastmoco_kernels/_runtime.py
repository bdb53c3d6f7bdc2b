"""What every op shares: the choice of a backend, and the arithmetic type."""

from __future__ import annotations

import torch
from torch import Tensor


def choose_backend(op: str, requested: str, default: str, available: tuple[str, ...]) -> str:
    """The backend an op runs on.

    Args:
        op: name of the op, for the error text.
        requested: ``"auto"`` or one of ``available``.
        default: what ``"auto"`` means for this call.
        available: every backend of the op.

    Raises:
        ValueError: if ``requested`` is neither.
    """
    if requested == "auto":
        return default
    if requested not in available:
        raise ValueError(f"{op}: backend={requested!r} is none of {('auto', *available)}")
    return requested


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays; everything narrower is computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
