"""Which number format a run multiplies in, by device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch


def choose_precision(
    precision: Literal["auto", "bf16", "fp32", "fp64"], device: torch.device
) -> Literal["bf16", "fp32", "fp64"]:
    """What `precision` means on a device: `auto` takes bf16 only where the hardware multiplies it natively."""
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # Older torch cannot be asked; fp32 is right everywhere.
            ask: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
            known = ask()
            native = any(known.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        return "bf16" if native else "fp32"
    return precision
