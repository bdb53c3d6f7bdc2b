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
EPOCHS_300 = 300 * 1.281e6
"""Images of 300 epochs of ImageNet."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """The goal for one figure of one row.

    Attributes:
        name: G1 to G12.
        row: name of the row.
        figure: path into its result: `milliseconds.triton`, `speedup.naive.median`,
            `images_per_s.fastmoco`. A star at the end stands for the largest of all names that
            begin so.
        over: the goal is for the ratio of the figure to the one of this path.
        over_row: the row of that path, if it is another one.
        hours_of: the goal is for the hours that these images take at the rate of the figure.
        at_least: the goal, if more is better; otherwise `at_most`.
        compute: share of the time of products, which scales with their rate; the rest scales with
            copies. None: not scaled.
    """

    name: str
    row: str
    figure: str
    over: str = ""
    over_row: str = ""
    hours_of: float = 0.0
    at_least: float | None = None
    at_most: float | None = None
    compute: float | None = None

    def __str__(self) -> str:
        if self.hours_of:
            return f"hours of {self.hours_of:.3g} images at {self.figure}"
        of_row = f" of {self.over_row}" if self.over_row else ""
        return f"{self.figure} / {self.over}{of_row}" if self.over else self.figure


LOSS_ERROR = "errors.{}.gradient*"
JPEG, SYNTHETIC = "JPEG shards to kNN", "JPEG over synthetic, {}"
"""Lines of `benchmarks.gpu.end_to_end`."""

GOALS = (
    Goal(name="G1", row="loss 16384", figure="milliseconds.triton", at_most=1.0, compute=1.0),
    Goal(name="G1", row="loss 16384", figure="speedup.naive.median", at_least=7),
    Goal(name="G1", row="loss 16384", figure="speedup.compiled.median", at_least=2.5),
    Goal(name="G1", row="loss 16384", figure="speedup.sdpa_v_is_k.median", at_least=1.5),
    Goal(name="G1", row="loss 16384", figure="peak_bytes.triton", at_most=80e6),
    Goal(
        name="G1",
        row="loss 16384",
        figure="peak_bytes.naive",
        over="peak_bytes.triton",
        at_least=60,
    ),
    Goal(name="G2", row="loss 65536", figure="milliseconds.triton", at_most=16, compute=1.0),
    Goal(name="G2", row="loss 65536", figure="peak_bytes.triton", at_most=0.5e9),
    Goal(name="G3", row="loss 4096", figure="milliseconds.triton", at_most=0.09, compute=1.0),
    Goal(name="G3", row="loss 4096", figure="speedup.naive.median", at_least=5),
    Goal(name="G3", row="loss 512 x 4096", figure="milliseconds.triton", at_most=0.03, compute=1.0),
    Goal(name="G3", row="loss 512 x 4096", figure="speedup.naive.median", at_least=10),
    *(
        goal
        for row in ("loss 4096", "loss 16384")
        for goal in (
            Goal(name="G4", row=row, figure=LOSS_ERROR.format("triton"), at_most=5e-4),
            Goal(
                name="G4",
                row=row,
                figure=LOSS_ERROR.format("triton"),
                over=LOSS_ERROR.format("naive"),
                at_most=1.0,
            ),
        )
    ),
    Goal(name="G5", row="AdamW ViT-S", figure="speedup.fused_then_lerp.median", at_least=1.07),
    Goal(name="G5", row="AdamW ViT-B", figure="milliseconds.fastmoco", at_most=1.08, compute=0.0),
    Goal(name="G5", row="AdamW ViT-B", figure="share.copy", at_least=0.85),
    Goal(name="G5", row="EMA ViT-S", figure="speedup.foreach_mul_add.median", at_least=1.6),
    Goal(name="G5", row="EMA ViT-S", figure="speedup.formula.median", at_least=2.3),
    Goal(name="G6", row="attention d=32", figure="speedup.sdpa.median", at_least=1.5),
    Goal(name="G6", row="attention d=64", figure="speedup.sdpa.median", at_least=1.2),
    Goal(name="G7", row="ViT-S 4096", figure="images_per_s.fastmoco", at_least=5000, compute=0.6),
    Goal(name="G8", row="ViT-B 4096", figure="images_per_s.fastmoco", at_least=1600, compute=0.75),
    *(
        Goal(
            name=name,
            row=f"{model} 4096",
            figure="images_per_s.fastmoco",
            over=f"images_per_s.{side}",
            over_row=f"{model} peer, {side}",
            at_least=ratio,
        )
        for name, model, side, ratio in (
            ("G7", "ViT-S", "eager", 3),
            ("G7", "ViT-S", "compiled", 1.25),
            ("G8", "ViT-B", "eager", 1.8),
        )
    ),
    Goal(name="G9", row="ViT-L 1024", figure="images_per_s.fastmoco", at_least=430, compute=0.8),
    Goal(name="G10", row="equality", figure="bf16.largest_difference", at_most=1e-3),
    Goal(name="G10", row="equality", figure="fp32.largest_difference", at_most=1e-5),
    Goal(name="G11", row=SYNTHETIC.format("ViT-S"), figure="ratio", at_least=0.90),
    Goal(name="G11", row=SYNTHETIC.format("ViT-B"), figure="ratio", at_least=0.95),
    Goal(name="G11", row=JPEG, figure="loader_gb", at_most=2),
    Goal(name="G11", row="loader", figure="images_per_s.fastmoco exact", at_least=4500),
    Goal(name="G11", row="color", figure="us_per_image", at_most=3.0, compute=0.0),
    Goal(
        name="G12",
        row="ViT-S 4096",
        figure="images_per_s.fastmoco",
        hours_of=EPOCHS_300,
        at_most=22,
        compute=0.6,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A goal for this card, and the measured figure."""

    goal: Goal
    wanted: float | None
    """None: the goal cannot be scaled, because a ceiling is missing."""
    measured: float | None
    """None: not measured."""

    @property
    def met(self) -> bool | None:
        """Whether it is reached; None if unknown."""
        if self.wanted is None or self.measured is None:
            return None
        return (
            self.measured >= self.wanted
            if self.goal.at_least is not None
            else self.measured <= self.wanted
        )

    def __str__(self) -> str:
        if self.measured is None:
            return f"{self.goal.name} not measured: {self.goal}"
        if self.wanted is None:
            return (
                f"{self.goal.name} unscaled: {self.goal} {self.measured:.4g}, "
                "no ceilings of this card"
            )
        sign = ">=" if self.goal.at_least is not None else "<="
        word = "met" if self.met else "MISSED"
        measured = f"{self.measured:.4g} {sign} {self.wanted:.4g}"
        return f"{self.goal.name} {word}: {self.goal} {measured}"


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
    """The goals of a row with figures that this row alone measured."""
    return [
        _outcome(goal, measured, card, ceilings)
        for goal in GOALS
        if goal.row == row and (measured := _measured(goal, {row: result})) is not None
    ]


def all_outcomes(
    lines: Mapping[str, Mapping[str, Any]], card: str, ceilings: Mapping[str, float]
) -> list[Outcome]:
    """Every goal, measured or not, in the order of their names.

    Args:
        lines: of `gpu.jsonl` by name.
        card: its name.
        ceilings: of the card.
    """
    results = {name: result_of(line) for name, line in lines.items()}
    ordered = sorted(GOALS, key=lambda goal: int(goal.name[1:]))
    return [_outcome(goal, _measured(goal, results), card, ceilings) for goal in ordered]


def result_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a line: its result and its own entries; none of a dry run."""
    if line.get("dry"):
        return {}
    result = line.get("result")
    return {**line, **(result if isinstance(result, Mapping) else {})}


def _outcome(
    goal: Goal, measured: float | None, card: str, ceilings: Mapping[str, float]
) -> Outcome:
    factor = 1.0 if goal.compute is None else slower(card, ceilings, goal.compute)
    wanted = None
    if factor is not None:
        wanted = (
            goal.at_least / factor if goal.at_least is not None else (goal.at_most or 0.0) * factor
        )
    return Outcome(goal=goal, wanted=wanted, measured=measured)


def _measured(goal: Goal, results: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The figure of a goal; None if a part of it was not measured."""
    value = figure(results.get(goal.row, {}), goal.figure)
    if value is None or not (goal.over or goal.hours_of):
        return value
    if goal.hours_of:
        return goal.hours_of / value / 3600 if value else None
    over = figure(results.get(goal.over_row or goal.row, {}), goal.over)
    return value / over if over else None


def figure(result: Mapping[str, Any], path: str) -> float | None:
    """A number of a result by its path, the median of several; None if not measured."""
    value: Any = result
    for name in path.split("."):
        if not isinstance(value, Mapping):
            return None
        if name.endswith("*"):
            value = max((v for key, v in value.items() if key.startswith(name[:-1])), default=None)
        else:
            value = value.get(name)
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
