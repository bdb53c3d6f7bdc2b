"""InfoNCE over keys that come in a ring of ranks, against gathered keys: equal results, memory and
CPU time.

Every number of ranks is one launch of gloo processes, in which both ways alternate on the same
rows. Memory is the growth of the peak resident set over what holds queries and own keys, of the
largest process. B rows of width D a rank and W ranks: gathered keys take `O(W B D)`, a ring takes
`O(B D)`.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.ranks import run_ranks, status_bytes
from benchmarks.shown import Chart, Lines, markdown, number
from fastmoco.distributed.gather import start_gathering
from fastmoco.distributed.mesh import group_rank, start_world, stop_world
from fastmoco.distributed.ring import start_ring
from fastmoco_kernels import KeyBlock, info_nce_over_blocks, symmetric_info_nce_loss

NAME = "ring"
DEFAULTS = {
    "ranks": "1,2,4,8",
    "rows": "512,1024,2048",
    "dim": 128,
    "temperature": 0.2,
    "rounds": 2,
    "checked_rows": 256,
}
QUICK = {"ranks": "2,4", "rows": "256,512", "rounds": 1, "checked_rows": 64}
LIMIT = 1e-12
"""Largest difference of loss and gradients in float64, over the largest element."""
WAYS = ("gathered", "ring")


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Measure.

    Args:
        options: `ranks` and `rows` of a rank, each a list with commas; `dim` D; `temperature`;
            `rounds` of the CPU time; `checked_rows` of a rank in the comparison in float64.

    Returns:
        By number of ranks: the largest difference of the loss and of a gradient between both ways
        in float64, over the largest element, and by rows of a rank the peak bytes, those over
        `rows * dim * 4`, and the CPU-seconds of a process for loss and backward. `cpu_ratio`: ring
        over gathered, median.
    """
    by_ranks: dict[str, Any] = {}
    failed: list[str] = []
    for ranks in map(int, options["ranks"].split(",")):
        # Freed memory goes back to the system at once, so that the peak is that of the tensors.
        found = run_ranks(
            "benchmarks.cases.ring",
            options,
            ranks,
            MALLOC_MMAP_THRESHOLD_="65536",
            MALLOC_TRIM_THRESHOLD_="65536",
        )
        largest = {
            name: max(rank["difference"][name] for rank in found) for name in ("loss", "gradient")
        }
        failed += [
            f"{ranks} ranks: {name} differs by {difference:.1e}, limit {LIMIT:.0e}"
            for name, difference in largest.items()
            if not difference <= LIMIT
        ]
        by_ranks[str(ranks)] = {
            "difference": largest,
            "rows": {
                rows: _largest_process([rank["rows"][rows] for rank in found])
                for rows in found[0]["rows"]
            },
        }
    ratios = [
        one["cpu_seconds"]["ring"] / one["cpu_seconds"]["gathered"]
        for side in by_ranks.values()
        for one in side["rows"].values()
    ]
    return {"ranks": by_ranks, "cpu_ratio": round(median(ratios), 3), "failed": failed}


def table(result: Mapping[str, Any]) -> str:
    """A row for each number of ranks and rows of a rank."""
    rows = [
        (
            ranks,
            count,
            *(number(one["peak_bytes"][way] / 1e6) for way in WAYS),
            *(number(one["cpu_seconds"][way]) for way in WAYS),
            f"{side['difference']['loss']:.1e}",
            f"{side['difference']['gradient']:.1e}",
        )
        for ranks, side in result.get("ranks", {}).items()
        for count, one in side["rows"].items()
    ]
    peaks, times = [f"peak MB, {w}" for w in WAYS], [f"CPU-seconds, {w}" for w in WAYS]
    head = ("ranks", "rows of a rank", *peaks, *times, "loss differs by", "gradient differs by")
    return markdown(head, rows)


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """Peak memory by ranks, for the most rows of a rank."""
    sides = {int(n): list(side["rows"].values())[-1] for n, side in result.get("ranks", {}).items()}
    lines = {w: [(n, one["peak_bytes"][w] / 1e6) for n, one in sides.items()] for w in WAYS}
    title = "Peak memory of a rank, loss and backward"
    return [Lines(title=title, x="ranks", y="MB", lines=lines)] if sides else []


def _largest_process(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The peaks of the largest process and the mean CPU time, of both ways."""
    unit = found[0]["unit_bytes"]
    peak = {way: max(rank["peak_bytes"][way] for rank in found) for way in WAYS}
    return {
        "peak_bytes": peak,
        "peak_over_rows": {way: round(size / unit, 1) for way, size in peak.items()},
        "cpu_seconds": {
            way: round(sum(rank["cpu_seconds"][way] for rank in found) / len(found), 4)
            for way in WAYS
        },
    }


def _child(options: dict[str, Any]) -> None:
    """Measure one rank of one launch and print the result as one JSON line."""
    torch.set_num_threads(1)
    world = start_world("cpu")
    temperature = options["temperature"]
    small = _Sides(options["checked_rows"], options["dim"], torch.float64)
    gathered, ring = (small.loss_and_gradients(way, temperature) for way in WAYS)
    result: dict[str, Any] = {
        "difference": {
            "loss": _difference(gathered[0], ring[0]),
            "gradient": max(map(_difference, gathered[1:], ring[1:])),
        },
        "rows": {},
    }
    for rows in map(int, options["rows"].split(",")):
        sides = _Sides(rows, options["dim"], torch.float32)
        calls: dict[str, Callable[[], object]] = {
            "gathered": lambda: sides.loss_and_gradients("gathered", temperature),  # noqa: B023
            "ring": lambda: sides.loss_and_gradients("ring", temperature),  # noqa: B023
        }
        # Libraries and connections start in the comparison above, and nothing is timed here.
        peak = {way: _peak(call) for way, call in calls.items()}
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(options["rounds"]):
            for way, call in calls.items():
                began = time.process_time()
                call()
                seconds[way].append(time.process_time() - began)
        result["rows"][str(rows)] = {
            "unit_bytes": rows * options["dim"] * 4,
            "peak_bytes": peak,
            "cpu_seconds": {way: median(times) for way, times in seconds.items()},
        }
    stop_world()
    print(json.dumps(result | {"rank": world.rank}))


class _Sides:
    """Queries and keys of both views of this rank, positives near their queries."""

    def __init__(self, rows: int, dim: int, dtype: torch.dtype) -> None:
        draws = torch.Generator().manual_seed(group_rank())
        self.queries = [torch.randn(rows, dim, generator=draws, dtype=dtype) for _ in range(2)]
        self.keys = torch.randn(rows, 2 * dim, generator=draws, dtype=dtype)
        for query, key in zip(self.queries, self.keys.chunk(2, dim=1), strict=True):
            key += 0.3 * query

    def loss_and_gradients(self, way: str, temperature: float) -> tuple[Tensor, ...]:
        """The loss of both directions, and the gradients of the queries."""
        q1, q2 = (query.detach().requires_grad_() for query in self.queries)
        offset = group_rank() * len(q1)
        if way == "ring":
            blocks = (
                KeyBlock(rank * len(q1), tuple(rows.chunk(2, dim=1)))
                for rank, rows in start_ring(self.keys)
            )
            loss = info_nce_over_blocks(
                (q1, q2), blocks, temperature=temperature, positive_offset=offset
            ).loss
        else:
            k1, k2 = start_gathering(self.keys)().chunk(2, dim=1)
            loss = symmetric_info_nce_loss(
                q1, k1, q2, k2, temperature=temperature, positive_offset=offset
            ).loss
        return (loss.detach(), *torch.autograd.grad(loss, (q1, q2)))


def _difference(one: Tensor, other: Tensor) -> float:
    """Largest difference, over the largest element."""
    return ((one - other).abs().max() / one.abs().max()).item()


def _peak(call: Callable[[], object]) -> int:
    """Growth of the peak resident set during a call."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    call()
    return status_bytes("VmHWM") - before


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
