"""kNN search of one rank and of several: seconds, processor time and peak memory of each process.

Each rank is a process with one thread, connected by gloo, with its part of a synthetic bank and of
the queries. The neighbours and the accuracy of some queries are compared with the plain formula
before anything is timed. At the size of ImageNet: `queries=50000 bank=1280000 rounds=1`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.measure import interleave, quantiles, ratios
from benchmarks.ranks import TIMEOUT_S, run_ranks, status_bytes
from benchmarks.shown import Bars, Chart, markdown, number
from fastmoco.distributed.mesh import World, start_world, stop_world
from fastmoco.evaluation.embed import LabelledRows
from fastmoco.evaluation.knn import shared_knn_accuracy, shared_neighbours
from fastmoco.evaluation.reference import plain_knn_accuracy, plain_neighbours
from fastmoco.evaluation.rows import FileRows, MemoryRows, Rows

NAME = "knn"
DEFAULTS = {
    "queries": 1000,
    "bank": 20_000,
    "dim": 384,
    "classes": 1000,
    "k": 20,
    "ranks": 2,
    "rounds": 3,
    "checked": 64,
    "file": 0,
    "folder": "",
}
QUICK = {"queries": 200, "bank": 2000, "dim": 64, "classes": 100, "rounds": 1}
_BLOCK = 4096
_PLAIN_QUERIES = 32
_NOISE = 4.0


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Compare.

    Args:
        options: `queries`, `bank`, `dim` and `classes` of the sets; `k` neighbours; `ranks` of the
            larger side; `rounds`; `checked`, queries that are compared with the plain formula, which
            takes twice the memory of the bank (0: none);
            `file=1`: the bank is in a temporary file in `folder` (empty: the temporary folder).

    Returns:
        Only `checked` and `failed`, if accuracy or neighbours differ from the plain formula.
        Otherwise `checked`, the share of neighbours that equal those of the plain formula (in float32 equal
        to the last bit, two rows may change places) and both accuracies; for each number of ranks
        `seconds` (median and quantiles), `cpu_seconds` and `peak_mb` of each rank in the
        median round, and `accuracy`; `time_share`, seconds of several ranks over those of one.
    """
    sides = (1, options["ranks"])
    checked = _check(options, sides) if options["checked"] else {}
    failed = checked.pop("failed", {})
    if failed:
        return {"checked": checked, "failed": failed}

    # The sides take turns.
    found: dict[int, list[dict[str, Any]]] = {side: [] for side in sides}

    def side_seconds(side: int) -> Callable[[], float]:
        def seconds() -> float:
            ranks = run_ranks("benchmarks.cases.knn", options | {"checked": 0}, side)
            found[side].append(
                {
                    "seconds": max(rank["seconds"] for rank in ranks),
                    "cpu_seconds": [rank["cpu_seconds"] for rank in ranks],
                    "peak_mb": [rank["peak_mb"] for rank in ranks],
                    "accuracy": {rank["accuracy"] for rank in ranks},
                }
            )
            return float(found[side][-1]["seconds"])

        return seconds

    figures = interleave(
        {str(side): side_seconds(side) for side in sides}, rounds=options["rounds"]
    )
    share = ratios(figures[str(sides[1])], figures["1"])
    return {
        "checked": checked,
        "failed": failed,
        "ranks": {str(side): _summary(found[side]) for side in sides},
        "time_share": {name: round(value, 4) for name, value in share.items()},
    }


def table(result: Mapping[str, Any]) -> str:
    """A row for each number of ranks."""
    rows = [
        (
            ranks,
            number(max(side["cpu_seconds"])),
            number(max(side["peak_mb"])),
            ", ".join(f"{100 * accuracy:.2f}" for accuracy in side["accuracy"]),
        )
        for ranks, side in result.get("ranks", {}).items()
    ]
    return markdown(("ranks", "CPU-seconds of a rank", "peak MB of a rank", "accuracy, %"), rows)


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """Cost of a rank."""
    sides = result.get("ranks", {})
    if not sides:
        return []
    seconds = {f"{n} ranks": (max(s["cpu_seconds"]),) * 3 for n, s in sides.items()}
    memory = {f"{n} ranks": (max(s["peak_mb"]),) * 3 for n, s in sides.items()}
    return [
        Bars(title="Processor time of a rank", unit="CPU-seconds", bars=seconds),
        Bars(title="Peak memory of a rank", unit="MB", bars=memory),
    ]


def _summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One side: all seconds, and the figures of the median round."""
    rounds = sorted(rounds, key=lambda each: float(each["seconds"]))
    middle = rounds[len(rounds) // 2]
    accuracies = set().union(*(each["accuracy"] for each in rounds))
    seconds = [each["seconds"] for each in rounds]
    return {
        "seconds": {name: round(value, 3) for name, value in quantiles(seconds).items()},
        "cpu_seconds": middle["cpu_seconds"],
        "peak_mb": middle["peak_mb"],
        "accuracy": sorted(accuracies),
    }


def _check(options: dict[str, Any], sides: tuple[int, ...]) -> dict[str, Any]:
    """Compare the first queries with the plain formula on every number of ranks."""
    count = min(options["checked"], options["queries"])
    asked = options | {"queries": count, "checked": count}
    bank, bank_labels = _rows(asked, "bank", 0, options["bank"])
    queries, labels = _rows(asked, "queries", 0, count)
    accuracy = 0.0
    plain = []
    for start in range(0, count, _PLAIN_QUERIES):
        part = slice(start, start + _PLAIN_QUERIES)
        tables = bank, bank_labels, queries[part], labels[part]
        accuracy += plain_knn_accuracy(*tables, k=options["k"]) * len(queries[part]) / count
        plain.append(plain_neighbours(bank, queries[part], k=options["k"])[1])
    del bank
    found: dict[str, Any] = {"queries": count, "plain": round(accuracy, 6)}
    for side in sides:
        ranks = run_ranks("benchmarks.cases.knn", asked, side)
        index = torch.tensor([row for rank in ranks for row in rank["index"]])
        equal = float((index == torch.cat(plain)).double().mean())
        found[str(side)] = {"accuracy": ranks[0]["accuracy"], "equal_neighbours": round(equal, 6)}
        if abs(ranks[0]["accuracy"] - accuracy) > 1e-9 or equal < 0.99:
            found["failed"] = {f"{side} ranks": f"differ from the plain formula: {found}"}
            break
    return found


def _rows(
    options: dict[str, Any], name: str, start: int, stop: int, rows: Rows | None = None
) -> tuple[Tensor, Tensor]:
    """Rows of a set, noise around a centre for each class; the same on any number of ranks.

    They go into `rows`, if given; the tensor is then empty.
    """
    draws = torch.Generator().manual_seed(1)
    centres = torch.randn(options["classes"], options["dim"], generator=draws)
    labels = torch.arange(start, stop) * 7919 % options["classes"]
    table = torch.empty(0 if rows is not None else stop - start, options["dim"])
    for block in range(start // _BLOCK, -(-stop // _BLOCK)):
        draws.manual_seed(2 * block + 2 + (name == "queries"))
        noise = torch.randn(_BLOCK, options["dim"], generator=draws)
        first, last = max(start, block * _BLOCK), min(stop, (block + 1) * _BLOCK)
        drawn = noise[first - block * _BLOCK : last - block * _BLOCK].mul_(_NOISE)
        drawn += centres[labels[first - start : last - start]]
        if rows is not None:
            rows.append(drawn)
        else:
            table[first - start : last - start] = drawn
    return table, labels


def _child(options: dict[str, Any]) -> None:
    """Search as one rank, and print its figures as one JSON line."""
    torch.set_num_threads(1)
    world = start_world("cpu", timeout_s=TIMEOUT_S)
    bank, queries = (_part(options, name, world) for name in ("bank", "queries"))
    here = {"device": world.device, "k": options["k"]}
    found: dict[str, Any] = {}
    if options["checked"]:
        found["index"] = shared_neighbours(bank, queries, **here)[1].tolist()

    # No rank's seconds contain the wait for another rank that still makes its rows.
    if world.world_size > 1:
        dist.barrier()
    began = time.perf_counter()
    cpu = time.process_time()
    found["accuracy"] = shared_knn_accuracy(bank, queries, **here)
    found["seconds"] = round(time.perf_counter() - began, 3)
    found["cpu_seconds"] = round(time.process_time() - cpu, 3)
    found["peak_mb"] = round(status_bytes("VmHWM") / 1e6, 1)
    stop_world()
    print(json.dumps(found))


def _part(options: dict[str, Any], name: str, world: World) -> LabelledRows:
    """This rank's part of a set."""
    count = options[name]
    start, stop = (count * (world.rank + i) // world.world_size for i in (0, 1))
    rows: Rows
    if options["file"] and name == "bank":
        folder = Path(options["folder"]) if options["folder"] else None
        rows = FileRows(options["dim"], torch.float32, folder)
    else:
        rows = MemoryRows(torch.empty(stop - start, options["dim"]), 0)
    _, labels = _rows(options, name, start, stop, rows)
    return LabelledRows(rows, labels)


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
