"""The model of a step on several ranks against real steps on 1, 2 and 4 CPU ranks.

Calibration takes no step on several ranks: the rates of compute are fitted to steps of one rank, the
slowdown of ranks that share the cores to processes that compute at the same time, each alone, and
lines for collectives and for FSDP2 units to each of these by itself. The checked steps have other
widths, depths, image sizes, batches and heads. An error is predicted over measured seconds, minus 1;
one above `largest_error` fails.

Seconds are medians. `cpu_s` compares CPU-seconds of a rank instead, which load on the machine
changes less.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.ranks import run_ranks
from benchmarks.scale_child import UNITS, config_of
from benchmarks.shown import Bars, Chart, markdown, number
from fastmoco.planning.costs import StepCosts, measure_costs
from fastmoco.planning.plan import StepPlan
from fastmoco.planning.scale.layout import Layout, layout_of
from fastmoco.planning.scale.messages import Ranks, step_messages
from fastmoco.planning.scale.network import Line, MeasuredLines, fit_line
from fastmoco.planning.scale.step import SWEEP_BYTES, Machine, Work, step_time

NAME = "scale"
DEFAULTS = {
    "ranks": "1,2,4",
    "calibrate": "vit_nano/16/64/128 vit_micro/16/48/256 vit_micro/32/12/256 vit_tiny/32/16/512 "
    "vit_nano/8/128/512 vit_tiny/64/8/128",
    "together": "vit_micro/16/48/256 vit_tiny/32/16/512",
    "check": "vit_micro/24/32/384 vit_tiny/48/24/256",
    "strategies": "ddp,fsdp",
    "sizes": "512,16384,262144,2097152",
    "widths": "64,512",
    "rounds": 5,
    "seconds": 0.25,
    "largest_error": 0.2,
}
QUICK = {
    "ranks": "1,2",
    "calibrate": "vit_nano/16/32/128",
    "together": "vit_nano/16/32/128",
    "check": "vit_nano/16/48/64",
    "strategies": "ddp",
    "sizes": "512,262144",
    "widths": "",
    "rounds": 1,
    "seconds": 0.05,
    "largest_error": 9.0,
}
CLOCKS = ("wall_s", "cpu_s")
KINDS = ("all_gather", "reduce_scatter", "all_reduce")
MOVED_WHOLE = 24
"""Bytes per trained parameter that a step moves on every rank, sharded or not: weights in the
forward and the two products of the backward, those of the momentum encoder, and the gradient,
written and read."""
MOVED_IN_SHARDS = SWEEP_BYTES
"""The update of weights and averages."""
MOVED = MOVED_WHOLE + MOVED_IN_SHARDS
Times = Mapping[str, Mapping[str, float]]


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Calibrate, measure and compare.

    Args:
        options: `ranks`; names of steps to `calibrate` on one rank, to run `together` in
            unconnected processes and to `check`, each `architecture/pixels/images/hidden`;
            `strategies`; `sizes` of collectives in bytes; `widths` of FSDP2 units; `rounds` of
            `seconds` for each measurement; `largest_error` that passes.

    Returns:
        Fitted numbers; by checked step and number of ranks predicted and measured seconds, parts,
        and the error; the largest error.
    """
    counts = [int(ranks) for ranks in options["ranks"].split(",")]
    calibrated = [f"{name}/ddp" for name in options["calibrate"].split()]
    together = [f"{name}/ddp" for name in options["together"].split()]
    checked = options["check"].split()
    shared = {"rounds": options["rounds"], "seconds": options["seconds"]}
    nothing = {"collectives": [], "stacks": [], "steps": [], "connected": False}

    # One rank: what calibrates, and the checked steps.
    alone = _measured(
        shared | nothing | {"steps": calibrated + [f"{name}/ddp" for name in checked]}, 1
    )
    costs = {name: _costs(name) for name in (*calibrated, *(f"{name}/ddp" for name in checked))}
    fitted = {clock: fit_rates(calibrated, costs, alone, clock) for clock in CLOCKS}
    rows = [_row(f"{name}/ddp", 1, costs, fitted, None, alone) for name in checked]

    # Several ranks: slowdown, collectives and FSDP2 units; then the checked steps.
    networks: dict[str, Any] = {}
    for ranks in (count for count in counts if count > 1):
        beside = _measured(shared | nothing | {"steps": together}, ranks)
        names = {
            "collectives": [f"{k}/{size}" for k in KINDS for size in options["sizes"].split(",")],
            "stacks": [
                f"stack/{width}/{how}/{what}"
                for width in options["widths"].split(",")
                if width
                for how in ("sharded", "whole")
                for what in ("train", "forward")
            ],
            "steps": [
                f"{name}/{strategy}"
                for name in checked
                for strategy in options["strategies"].split(",")
            ],
        }
        joined = _measured(shared | names | {"connected": True}, ranks)
        network = {
            clock: {
                "slowdown": statistics.median(
                    beside[name][clock] / alone[name][clock] for name in together
                ),
                "lines": fit_lines(options, joined, clock, ranks),
            }
            for clock in CLOCKS
        }
        networks[str(ranks)] = network
        rows += [_row(name, ranks, costs, fitted, network, joined) for name in names["steps"]]

    errors = {clock: max(abs(row[clock]["error"]) for row in rows) for clock in CLOCKS}
    return {
        "fitted": fitted,
        "networks": networks,
        "steps": rows,
        "largest_error": errors,
        "failed": [
            f"{row['step']} on {row['ranks']} ranks: {row['wall_s']['error']:+.0%}"
            for row in rows
            if abs(row["wall_s"]["error"]) > options["largest_error"]
        ],
    }


def table(result: Mapping[str, Any]) -> str:
    """A row for each checked step."""
    rows = [
        (
            row["step"],
            row["strategy"],
            str(row["ranks"]),
            number(sum(row["wall_s"]["predicted_ms"].values())),
            number(row["wall_s"]["measured_ms"]),
            f"{100 * row['wall_s']['error']:.1f}",
        )
        for row in result.get("steps", [])
    ]
    return markdown(
        ("step", "strategy", "ranks", "predicted, ms", "measured, ms", "error, %"), rows
    )


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """The error of each checked step."""
    bars = {
        f"{row['step']} {row['strategy']}, {row['ranks']} ranks": abs(100 * row["wall_s"]["error"])
        for row in result.get("steps", [])
    }
    spread = {name: (error, error, error) for name, error in bars.items()}
    return [Bars(title="Error of the model of a step", unit="%", bars=spread)] if bars else []


def _measured(options: dict[str, Any], ranks: int) -> dict[str, dict[str, float]]:
    """Means over ranks."""
    found = run_ranks("benchmarks.scale_child", options, ranks)
    return {
        name: {clock: statistics.mean(rank[name][clock] for rank in found) for clock in CLOCKS}
        for name in found[0]
    }


def _costs(name: str) -> StepCosts:
    return measure_costs(config_of(name, 1), "fp32")


def _work(name: str, costs: StepCosts, shards: int = 1) -> Work:
    return Work(
        images=int(name.split("/")[2]),
        flops=costs.step_flops,
        activation_bytes=costs.graph.per_image,
        again=0.0,
        forward_share=2 * costs.query_flops / costs.step_flops,
        parameters=costs.trainable * (MOVED_WHOLE + MOVED_IN_SHARDS / shards) / MOVED,
    )


def fit_rates(
    names: list[str], costs: Mapping[str, StepCosts], times: Times, clock: str
) -> dict[str, float]:
    """The numbers of `Machine` that fit steps of one rank best, none of them negative.

    Least squares of relative errors over every subset of the terms, of which the best with no
    negative number counts.

    Args:
        names: of the steps.
        costs: by name.
        times: by name and clock.
        clock: "wall_s" or "cpu_s".
    """
    terms = ("s_per_flop", "s_per_activation_byte", "s_per_parameter", "fixed_s")
    table = []
    for name in names:
        work = _work(name, costs[name])
        row = (work.images * work.flops, work.images * work.activation_bytes, work.parameters, 1.0)
        table.append(np.array(row) / times[name][clock])
    matrix, ones = np.array(table), np.ones(len(names))
    best: tuple[float, dict[str, float]] | None = None
    for count in range(1, min(len(terms), len(names)) + 1):
        for chosen in combinations(range(len(terms)), count):
            found, *_ = np.linalg.lstsq(matrix[:, chosen], ones, rcond=None)
            left = float(np.square(matrix[:, chosen] @ found - 1).sum())
            if (found >= 0).all() and (best is None or left < 0.99 * best[0]):
                numbers = dict.fromkeys(terms, 0.0)
                numbers.update({terms[i]: float(x) for i, x in zip(chosen, found, strict=True)})
                best = (left, numbers)
    assert best is not None  # noqa: S101 - a type: a term alone fits with a factor above 0
    return best[1]


def fit_lines(options: dict[str, Any], times: Times, clock: str, ranks: int) -> dict[str, Line]:
    """Lines for collectives, and for what FSDP2 sends with its copies and hooks.

    A pass without gradient through a stack gathers every unit once; one with gradient gathers it
    twice and reduces it once.
    """
    lines = {
        kind: fit_line(
            {float(size): times[f"{kind}/{size}"][clock] for size in options["sizes"].split(",")}
        )
        for kind in KINDS
    }
    gathers, reductions = {}, {}
    for width in filter(None, options["widths"].split(",")):
        taken = {
            what: times[f"stack/{width}/sharded/{what}"][clock]
            - times[f"stack/{width}/whole/{what}"][clock]
            for what in ("train", "forward")
        }
        size = 4.0 * -(-int(width) // ranks) * ranks * int(width)
        gathers[size] = max(1e-6, taken["forward"] / UNITS)
        reductions[size] = max(1e-6, (taken["train"] - 2 * taken["forward"]) / UNITS)
    if gathers:
        lines |= {"weights": fit_line(gathers), "gradients": fit_line(reductions)}
    return lines


def _row(
    name: str,
    ranks: int,
    costs: Mapping[str, StepCosts],
    fitted: Mapping[str, Mapping[str, float]],
    network: Mapping[str, Any] | None,
    times: Times,
) -> dict[str, Any]:
    """Predicted and measured seconds of one step."""
    step, strategy = name.rsplit("/", 1)
    row: dict[str, Any] = {"step": step, "strategy": strategy, "ranks": ranks}
    config = config_of(name, ranks)
    layout = layout_of(config, "fp32")
    for clock in CLOCKS:
        predicted = _predicted(
            config,
            layout,
            _work(name, costs[f"{step}/ddp"], ranks if strategy == "fsdp" else 1),
            ranks,
            strategy,
            fitted[clock],
            network[clock] if network else None,
        )
        measured = times[name][clock]
        row[clock] = {
            "predicted_ms": {part: round(1e3 * value, 3) for part, value in predicted.items()},
            "measured_ms": round(1e3 * measured, 3),
            "error": round(sum(predicted.values()) / measured - 1, 4),
        }
    return row


def _predicted(
    config: Any,
    layout: Layout,
    work: Work,
    ranks: int,
    strategy: str,
    fitted: Mapping[str, float],
    network: Mapping[str, Any] | None,
) -> dict[str, float]:
    """Seconds by part."""
    plan = StepPlan(chunk=0, kept=0, chunks=1, overhead=0.0, peak_bytes=0.0, reason="")
    spread = Ranks(total=ranks, shards=ranks if strategy == "fsdp" else 1, on_cpu=True)
    machine = Machine(**fitted, overlaps=False)
    lines: dict[str, Line] = {}
    if network:
        machine = replace(machine, slowdown=network["slowdown"])
        lines = network["lines"]
    messages = step_messages(config, layout, spread, plan, "fp32")
    time = step_time(work, machine, messages, MeasuredLines(lines), spread)
    return {part: one.exposed_s for part, one in time.parts.items()}
