"""Goals as data. They were set for an H200 and are scaled to other cards by measured ceilings.

A goal is a share of the ceilings of a card. Its figure is for an H200 with the ceilings `SET_FOR`.
For another card it is scaled by that card's measured ceilings: a compute-bound time by the rate of
products, a memory-bound one by that of copies, a training step by both, in the proportion that
`benchmarks.roofline` counts. Speed-ups are not scaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastmoco.planning.chips import CHIPS

_H200 = CHIPS["H200"]
SET_FOR = {
    "matmul_tflops": _H200.ceiling_flops_per_s / 1e12,
    "copy_gb_per_s": _H200.ceiling_bytes_per_s / 1e9,
}
"""Ceilings of the H200 for which the goals were set."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The goal for one figure of one row.

    Attributes:
        name: G1 to G11.
        row: name of the row.
        figure: path into its result: `milliseconds.triton`, `speedup.naive.median`,
            `images_per_s.fastmoco`.
        at_least: the goal, if more is better; otherwise `at_most`.
        compute: share of the time of products, which scales with their rate; the rest scales with
            copies. None: not scaled.
    """

    name: str
    row: str
    figure: str
    at_least: float | None = None
    at_most: float | None = None
    compute: float | None = None


GOALS = (
    Goal(name="G1", row="loss 16384", figure="milliseconds.triton", at_most=1.0, compute=1.0),
    Goal(name="G1", row="loss 16384", figure="speedup.naive.median", at_least=7),
    Goal(name="G1", row="loss 16384", figure="speedup.compiled.median", at_least=2.5),
    Goal(name="G1", row="loss 16384", figure="peak_bytes.triton", at_most=80e6),
    Goal(name="G2", row="loss 65536", figure="milliseconds.triton", at_most=16, compute=1.0),
    Goal(name="G2", row="loss 65536", figure="peak_bytes.triton", at_most=0.5e9),
    Goal(name="G3", row="loss 4096", figure="milliseconds.triton", at_most=0.09, compute=1.0),
    Goal(name="G3", row="loss 4096", figure="speedup.naive.median", at_least=5),
    Goal(name="G3", row="loss 512 x 4096", figure="milliseconds.triton", at_most=0.03, compute=1.0),
    Goal(name="G3", row="loss 512 x 4096", figure="speedup.naive.median", at_least=10),
    Goal(name="G5", row="AdamW ViT-S", figure="speedup.fused_then_lerp.median", at_least=1.07),
    Goal(name="G5", row="AdamW ViT-B", figure="milliseconds.fastmoco", at_most=1.08, compute=0.0),
    Goal(name="G5", row="AdamW ViT-B", figure="share.copy", at_least=0.85),
    Goal(name="G5", row="EMA ViT-S", figure="speedup.foreach_mul_add.median", at_least=1.6),
    Goal(name="G5", row="EMA ViT-S", figure="speedup.formula.median", at_least=2.3),
    Goal(name="G6", row="attention d=32", figure="speedup.sdpa.median", at_least=1.5),
    Goal(name="G6", row="attention d=64", figure="speedup.sdpa.median", at_least=1.2),
    Goal(name="G7", row="ViT-S 4096", figure="images_per_s.fastmoco", at_least=5000, compute=0.6),
    Goal(name="G8", row="ViT-B 4096", figure="images_per_s.fastmoco", at_least=1600, compute=0.75),
    Goal(name="G11", row="loader", figure="images_per_s.fastmoco exact", at_least=4500),
    Goal(name="G11", row="color", figure="us_per_image", at_most=3.0, compute=0.0),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A goal for this card, and the measured figure."""

    goal: Goal
    wanted: float | None
    """None: the goal cannot be scaled, because a ceiling is missing."""
    measured: float

    @property
    def met(self) -> bool | None:
        """Whether it is reached; None if unknown."""
        if self.wanted is None:
            return None
        return (
            self.measured >= self.wanted
            if self.goal.at_least is not None
            else self.measured <= self.wanted
        )

    def __str__(self) -> str:
        if self.wanted is None:
            return (
                f"{self.goal.name} unscaled: {self.goal.figure} {self.measured:.4g}, "
                "no ceilings of this card"
            )
        sign = ">=" if self.goal.at_least is not None else "<="
        word = "met" if self.met else "MISSED"
        measured = f"{self.measured:.4g} {sign} {self.wanted:.4g}"
        return f"{self.goal.name} {word}: {self.goal.figure} {measured}"


def slower(card: str, ceilings: Mapping[str, float], compute: float) -> float | None:
    """Time of a card relative to the card of the goals; 1 on an H200, None
    without measured ceilings.

    Args:
        card: its name.
        ceilings: measured, by the names of `SET_FOR`.
        compute: share of the time of products.
    """
    if "H200" in card:
        return 1.0
    if any(not ceilings.get(name) for name in SET_FOR):
        return None
    products, copies = (
        SET_FOR[name] / ceilings[name] for name in ("matmul_tflops", "copy_gb_per_s")
    )
    return compute * products + (1 - compute) * copies


def outcomes(
    row: str, result: Mapping[str, Any], card: str, ceilings: Mapping[str, float]
) -> list[Outcome]:
    """The goals of a row with measured figures."""
    found = []
    for goal in GOALS:
        measured = figure(result, goal.figure)
        if goal.row != row or measured is None:
            continue
        factor = 1.0 if goal.compute is None else slower(card, ceilings, goal.compute)
        wanted = None
        if factor is not None:
            wanted = (
                goal.at_least / factor
                if goal.at_least is not None
                else (goal.at_most or 0.0) * factor
            )
        found.append(Outcome(goal=goal, wanted=wanted, measured=measured))
    return found


def figure(result: Mapping[str, Any], path: str) -> float | None:
    """A number of a result by its path, the median of several; None if not measured."""
    value: Any = result
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    if isinstance(value, list):
        value = sorted(value)[len(value) // 2] if value else None
    return float(value) if isinstance(value, int | float) else None


def shares(result: Mapping[str, Any], ceilings: Mapping[str, float]) -> dict[str, float]:
    """Shares of this card's ceilings that a result reached: `matmul` by its
    FLOPs, `copy` by its bytes.

    Args:
        result: with `work`: `flops` and `bytes` of one call or image of the
            subject, and `ms`, its time.
        ceilings: of this card.
    """
    work = result.get("work") or {}
    if not work.get("ms"):
        return {}
    found = {}
    if work.get("flops") and ceilings.get("matmul_tflops"):
        found["matmul"] = round(work["flops"] / work["ms"] / 1e9 / ceilings["matmul_tflops"], 3)
    if work.get("bytes") and ceilings.get("copy_gb_per_s"):
        found["copy"] = round(work["bytes"] / work["ms"] / 1e6 / ceilings["copy_gb_per_s"], 3)
    return found
