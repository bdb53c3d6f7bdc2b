"""The dtype of matrix products in a run, by device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch


def choose_precision(
    precision: Literal["auto", "bf16", "fp32", "fp64"], device: torch.device
) -> Literal["bf16", "fp32", "fp64"]:
    """Resolve `precision` for a device: `auto` selects bf16 only if the
    hardware multiplies it natively.
    """
    if precision == "auto":
        if device.type == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            # Older torch does not report this; fp32 is correct everywhere.
            ask: Callable[[], Mapping[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
            found = ask()
            native = any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        return "bf16" if native else "fp32"
    return precision
