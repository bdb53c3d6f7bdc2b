"""What torch's products in float8 can do on a CPU."""

from __future__ import annotations

import pytest
import torch


def require_scales_of_rows() -> None:
    """Skip where such a product takes one scale for a whole matrix alone, as that of torch 2.11 does;
    on a GPU it takes one for each row."""
    ones, scales = torch.ones(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(ones, ones.T, scales, scales.T, out_dtype=torch.bfloat16)
    except RuntimeError as error:
        if "numel() == 1" not in str(error):
            raise
        pytest.skip("on a CPU this torch multiplies float8 with one scale alone, not one a row")
