"""Whether two settings train the same model: the losses of the first steps, and the gradient norm
of the very first."""

from __future__ import annotations

import math
from collections.abc import Sequence

STEPS = 3
"""Steps whose losses are compared. AdamW turns the rounding of gradients near zero into steps of
full size, so losses drift apart after some steps whatever is right."""
LOSSES = {"fp64": 1e-9, "fp32": 1e-5, "bf16": 1e-2}
"""Largest relative difference of a loss by precision. Over three steps of a small ViT other threads,
chunks and fused blocks differ by 2e-7 in fp32; another attention by 7e-3 in bf16, where products are
rounded to 8 bits."""
NORMS = {"fp64": 1e-6, "fp32": 1e-3, "bf16": 0.5}
"""The same of the gradient norm of the first step, which finds a backward that is wrong while the
learning rate is still almost 0. In fp32 it differs by 4e-7; in bf16 by 25 % between two kinds of
attention, of which fp32 is in the middle. Those of later steps differ by more than half in bf16."""


def difference(
    precision: str,
    losses: Sequence[float],
    other_losses: Sequence[float],
    norms: Sequence[float],
    other_norms: Sequence[float],
) -> str:
    """What differs in the first steps; empty if it is rounding.

    Args:
        precision: of both.
        losses: of the defaults, step by step.
        other_losses: of the settings to judge.
        norms: gradient norms of the defaults.
        other_norms: of the settings to judge.
    """
    for name, mine, theirs, most in (
        ("loss", losses[:STEPS], other_losses[:STEPS], LOSSES[precision]),
        ("gradient norm", norms[:1], other_norms[:1], NORMS[precision]),
    ):
        for step, (one, other) in enumerate(zip(mine, theirs, strict=False)):
            finite = math.isfinite(one) and math.isfinite(other)
            if not finite or abs(other - one) > most * abs(one):
                return (
                    f"{name} of step {step} is {other:.7g}, with the defaults {one:.7g}: "
                    f"more than {most:g} apart"
                )
    return ""
