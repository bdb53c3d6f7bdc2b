"""Upper bound of the speed of a training step on a card, counted on a CPU in seconds.

`python -m benchmarks.roofline` runs the pieces of a training step on fake tensors and adds up the
bytes and FLOPs of every operation. A card computes products at 650 TFLOP/s, attention at 35 % of
that, and everything else at its memory bandwidth, one operation after the other. Real kernels are
slower: expect 75 to 85 % of these images/s.

Eager steps are counted operation by operation (`op_counts`). Compiled ones go through Dynamo and
AOT autograd; the graphs that come out are counted by a model of fusion (`fusion`), everything
outside of them operation by operation.

"recomputed 0" keeps every graph; "planned" takes the chunks and kept graphs that the planner
chooses for the card's memory.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from benchmarks.op_counts import ATTENTION, FLOAT8, PRODUCTS, Cost, Counts
from benchmarks.step_counts import count_step
from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.objectives.build import build_model
from fastmoco.planning import choose
from fastmoco.planning.chips import CHIPS
from fastmoco.planning.plan import StepPlan, busy_chunk
from fastmoco.recipes import get_recipe
from fastmoco_pipelines.loading.memory import loader_bytes
from fastmoco_pipelines.text import first_sentence

ATTENTION_SHARE = 0.35
"""Rate of attention relative to products, for heads of 32 and 64 channels and 197 tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Rates and memory of a card."""

    flops_per_s: float
    """Products in bf16."""
    bytes_per_s: float
    """Everything else."""
    memory: float
    """Bytes."""

    def seconds(self, kind: str, cost: Cost) -> float:
        """Lower bound of the time of one kind of operation."""
        if kind == PRODUCTS:
            return cost.flops / self.flops_per_s
        if kind == FLOAT8:
            return cost.flops / (2 * self.flops_per_s)
        if kind == ATTENTION:
            return cost.flops / (ATTENTION_SHARE * self.flops_per_s)
        return cost.bytes / self.bytes_per_s

    def seconds_of(self, counts: Counts) -> float:
        """Lower bound of the time of all operations, one after the other."""
        return sum(self.seconds(kind, cost) for kind, cost in counts.by_kind.items())


CARDS = {
    name: Card(
        bytes_per_s=chip.step_bytes_per_s,
        flops_per_s=chip.step_flops_per_s,
        memory=chip.memory_bytes,
    )
    for name, chip in CHIPS.items()
    if chip.measured
}
"""Chips whose rates of large copies and products are measured, not those of a data sheet."""


def plan_for(config: Config, card: Card, *, compiled: bool, levels: bool = True) -> StepPlan:
    """The plan of one process on its own card, with only the model and a loader on it."""
    with torch.device("meta"):
        objective = build_model(config)
    free = card.memory - sum(p.nbytes for p in objective.parameters())
    # A background save copies to memory of the host, not of the card.
    config = replace(config, checkpoint=replace(config.checkpoint, async_save=False))
    shards = replace(config.data, shards=config.data.shards or "not read")
    spec = replace(
        replace(config, data=shards).loader_spec(device="gpu", threads=14), view_dtype="uint8"
    )
    reserved = loader_bytes(spec).beside_batch_bytes
    with mock.patch.object(choose, "free_bytes", return_value=free):
        return choose.choose_plan(
            config, objective, World(), "bf16", compiled=compiled, levels=levels, reserved=reserved
        )


def report(
    config: Config,
    *,
    chunk: int,
    compiled: bool,
    kept: int | None,
    budget: float | None,
    views: torch.dtype,
) -> dict[str, Any]:
    """Counts of a step and images/s on every card.

    Args:
        config: model, heads and batch.
        chunk: images of a chunk; 0: the planner's choice.
        compiled: whether blocks go through torch.compile.
        kept: images whose graphs are kept, instead of the planner's choice.
        budget: share of the activations that compiled blocks keep; None: all, or the planner's
            choice for the plan.
        views: dtype of the views.
    """
    tokens = (config.model.image_size // config.model.patch_size) ** 2 + 1
    images = config.global_batch_size
    count = functools.cache(
        lambda chunk, budget: count_step(
            config, chunk=chunk, compiled=compiled, budget=budget, views=views
        )
    )
    remade = replace(config, model=replace(config.model, checkpointing="full"))
    lean = functools.cache(
        lambda chunk: count_step(remade, chunk=chunk, compiled=False, views=views)
    )

    counted = count(chunk or busy_chunk(tokens), 1.0 if budget is None else budget)
    whole = counted.step(images / counted.chunk, images / counted.chunk)

    # Images/s on every card: without recomputation, and as planned for its memory.
    cards = {}
    for name, card in CARDS.items():
        plan = plan_for(config, card, compiled=compiled, levels=views == torch.uint8)
        size = chunk or plan.chunk or counted.chunk
        keeps = kept if kept is not None else plan.kept_images if plan.chunk else images
        within = plan.activation_budget if budget is None else budget
        planned = count(size, within).step(images / size, keeps / size)
        if plan.lean and kept is None:
            planned = count(size, within).step(keeps / size, keeps / size)
            planned.merge(lean(size).trunk((images - keeps) / size))
        cards[name] = {
            "nothing_recomputed": round(images / card.seconds_of(whole)),
            "planned": round(images / card.seconds_of(planned)),
            "plan": (
                f"chunks of {size}, {keeps} of {images} images kept"
                f"{', the rest lean' * plan.lean}, budget {within:g}"
            ),
            "ms_a_chunk": {
                part: round(1e3 * card.seconds_of(getattr(counted, part)), 2)
                for part in ("query", "keys", "backward")
            },
        }
    return {
        "model": config.model.architecture,
        "blocks": config.model.blocks,
        "compiled": compiled,
        "chunk": counted.chunk,
        "operations_a_chunk": sum(
            part.total.operations
            for part in (counted.first, counted.query, counted.keys, counted.backward)
        ),
        "step": {
            kind: {
                "operations": cost.operations,
                "gb": round(cost.bytes / 1e9, 1),
                "tflop": round(cost.flops / 1e12, 2),
                "ms": {
                    name: round(1e3 * card.seconds(kind, cost), 1) for name, card in CARDS.items()
                },
            }
            for kind, cost in sorted(
                whole.by_kind.items(), key=lambda item: -CARDS["H200"].seconds(*item)
            )
        },
        "cards": cards,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns 0."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.roofline", description=first_sentence(__doc__)
    )
    parser.add_argument(
        "--recipes", default="vit_s16_e300_b4096,vit_b16_e300_b4096", help="comma between them"
    )
    parser.add_argument("--mode", choices=("both", "eager", "compiled"), default="both")
    parser.add_argument(
        "--chunk", type=int, default=0, help="images of a chunk; 0: as the planner would"
    )
    parser.add_argument(
        "--kept",
        type=int,
        default=None,
        help="images that keep their graphs, instead of the plan's",
    )
    parser.add_argument("--views", default="uint8", help="dtype of the views, as torch names it")
    parser.add_argument("--momentum-linears", choices=("native", "float8"), default="native")
    parser.add_argument("--checkpointing", choices=("none", "selective", "full"), default="")
    parser.add_argument(
        "--blocks",
        choices=("modules", "fused"),
        default="modules",
        help="fused: counted as it runs",
    )
    parser.add_argument(
        "--memory-budget",
        type=float,
        default=None,
        help="share of activations that compiled blocks keep",
    )
    parser.add_argument("--json", action="store_true")

    given = parser.parse_args(arguments)
    for recipe in given.recipes.split(","):
        config = get_recipe(recipe)
        if given.checkpointing:
            config = replace(config, model=replace(config.model, checkpointing=given.checkpointing))
        config = replace(
            config,
            model=replace(
                config.model, blocks=given.blocks, momentum_linears=given.momentum_linears
            ),
        )
        modes = (
            (False,)
            if given.blocks == "fused"
            else {"both": (False, True), "eager": (False,), "compiled": (True,)}[given.mode]
        )
        for compiled in modes:
            found = report(
                config,
                chunk=given.chunk,
                compiled=compiled,
                kept=given.kept,
                budget=given.memory_budget,
                views=getattr(torch, given.views),
            )
            print(
                json.dumps({"recipe": recipe, **found}) if given.json else table(found), flush=True
            )
    return 0


def table(found: dict[str, Any]) -> str:
    """A report as text."""
    kind = (
        "fused blocks"
        if found["blocks"] == "fused"
        else "compiled"
        if found["compiled"]
        else "eager"
    )
    lines = [
        f"{found['model']}, {kind}, chunks of {found['chunk']}: "
        f"{found['operations_a_chunk']} operations a chunk with its second forward"
    ]
    for name, card in found["cards"].items():
        parts = ", ".join(f"{part} {ms}" for part, ms in card["ms_a_chunk"].items())
        lines.append(
            f"  {name}: {card['nothing_recomputed']} images/s with nothing recomputed, "
            f"{card['planned']} as planned "
            f"({card['plan']}); ms a chunk: {parts}"
        )
    lines.append(
        f"  a step, nothing recomputed   {'operations':>10} {'GB':>8} {'TFLOP':>8}   ms: "
        f"{' '.join(CARDS)}"
    )
    for kind, cost in found["step"].items():
        times = " ".join(f"{ms:7.1f}" for ms in cost["ms"].values())
        lines.append(
            f"  {kind:28} {cost['operations']:10} {cost['gb']:8.1f} {cost['tflop']:8.2f}   {times}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
