"""How precisely the loss multiplies queries with keys, by the precision of the run."""

from __future__ import annotations

import pytest
import torch

from fastmoco.objectives import key_comparison


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize(
    ("dtype", "autocast", "expected"),
    [
        (torch.float32, False, "fp32"),
        (torch.float32, True, "auto"),
        (torch.bfloat16, True, "auto"),
        (torch.float64, False, "auto"),
    ],
)
def test_a_float32_run_multiplies_in_float32(monkeypatch, ring, dtype, autocast, expected):
    asked = []
    for name in ("symmetric_info_nce_loss", "info_nce_over_blocks"):
        monkeypatch.setattr(
            key_comparison, name, lambda *_, precision, **__: asked.append(precision)
        )
    rows = torch.ones(2, 4, 8, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        key_comparison.start_comparing(rows, temperature=0.2, ring=ring)(rows)
    assert asked == [expected]
