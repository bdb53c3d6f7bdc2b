"""Whether two settings train the same model: their losses and gradient norms of the first steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

STEPS = 3
"""Steps that are compared. The first one shows the forward and the norm of its gradient the
backward; later ones the update. AdamW turns the rounding of gradients near zero into steps of full
size, so losses drift apart after some steps whatever is right."""
LOSSES = {"fp64": 1e-9, "fp32": 1e-5, "bf16": 1e-2}
"""Largest relative difference of a loss by precision. Over three steps of a small ViT other threads,
chunks and fused blocks differ by 2e-7 in fp32; another attention by 7e-3 in bf16, where products are
rounded to 8 bits."""
NORMS = {"fp64": 1e-6, "fp32": 1e-2, "bf16": 0.5}
"""The same of a gradient norm, which finds a backward that is wrong while the learning rate is still
almost 0. In bf16 it differs by 25 % between two kinds of attention, in fp32 by 1e-3."""


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
        ("loss", losses, other_losses, LOSSES[precision]),
        ("gradient norm", norms, other_norms, NORMS[precision]),
    ):
        for step, (one, other) in enumerate(zip(mine[:STEPS], theirs[:STEPS], strict=False)):
            if not math.isfinite(other) or abs(other - one) > most * abs(one):
                return (
                    f"{name} of step {step} is {other:.7g}, with the defaults {one:.7g}: "
                    f"more than {most:g} apart"
                )
    return ""
