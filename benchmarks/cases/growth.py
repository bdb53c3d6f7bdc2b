"""How costs grow with the size of a set, of a run and of a bank: a line for each figure, the
exponent fitted over the sizes, and the same of another tree beside it.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.growth_inputs import make_set, write_metrics
from benchmarks.startup import startup_cpu_s

NAME = "growth"
DEFAULTS = {
    "sizes": "10000,100000,1280000",
    "lines": "1000,10000,100000",
    "banks": "10000,100000",
    "ranks": 8,
    "per_shard": 2500,
    "rounds": 3,
    "before": "",
    "largest_before": 1280000,
    "folder": "",
}
ROOT = Path(__file__).resolve().parents[2]
CHILD = ROOT / "benchmarks" / "growth_child.py"
NEW = ("sample",)
"""Figures of operations that earlier trees do not have."""
LIMIT = 1.1
"""Exponent of the CPU time above which a cost grows faster than its input."""


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Measure every figure at every size, each in a process of its own, the trees in turn.

    Args:
        options: `sizes` of sets in samples, their tars holes without content; `lines` of
            `metrics.jsonl`; `banks` of kNN in rows; `ranks` that open the largest set at the same
            time; `per_shard` samples of a shard; `rounds`, of which the median counts; `before`,
            the folder of another checkout, which is measured beside this one, up to
            `largest_before` samples or rows; `folder` that keeps the inputs.

    Returns:
        A row for each figure and tree: cost by size (`cpu_s`, `wall_s`, `mb` resident after it,
        `peak_mb` above the start) and the exponents between the two largest sizes. Then `ranks`, the
        largest set opened by several processes; `start`, processor seconds of commands by tree;
        `failed`, figures of this tree whose exponent is above 1.1.
    """
    with _folder(options["folder"]) as folder:
        rows = list(_rows(options, folder))
        started = startup_cpu_s(options["rounds"], checkouts=tuple(_trees(options).values()))
        opened = _open_on_ranks(options, folder)
    failed = [row["figure"] for row in rows if row["tree"] == "this" and row["exponent"] > LIMIT]
    start = {name: started[tree] for name, tree in _trees(options).items()}
    return {"rows": rows, "ranks": opened, "start": start, "failed": failed}


def figures(options: dict[str, Any], folder: Path) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """(size, arguments of the child) by figure; the inputs are made if they are not there yet."""
    sizes = _numbers(options["sizes"])
    sets = [(n, _set(folder, n, options, "binary")) for n in sizes]
    logs = [(n, str(write_metrics(_log(folder, n), n))) for n in _numbers(options["lines"])]
    return {
        "open": [(n, {"pattern": pattern}) for n, pattern in sets],
        "bad samples": [(n, {"pattern": pattern}) for n, pattern in sets],
        "sample": [(n, {"pattern": pattern}) for n, pattern in sets],
        "first batch": [(n, {"samples": n, "step": 0, "seed": 0}) for n in (*sizes, 10**9)],
        "step 10^7": [(n, {"samples": n, "step": 10**7, "seed": 0}) for n in (*sizes, 10**9)],
        "100 steps": [(n, {"samples": n, "batch": 64, "seed": 0}) for n in (*sizes, 10**9)],
        "curves": [(n, {"metrics": log}) for n, log in logs],
        "trim": [(n, {"metrics": log, "step": 10 * n - 30}) for n, log in logs],
        "knn": [(n, {"bank": n}) for n in _numbers(options["banks"])],
    }


def exponent(costs: dict[int, float]) -> float:
    """Slope of log(cost) over log(size) between the two largest sizes; 0 for costs too small to be
    measured."""
    (small, less), (large, more) = sorted(costs.items())[-2:]
    return math.log(max(more, 1e-3) / max(less, 1e-3)) / math.log(large / small)


def measure(figure: str, given: dict[str, Any], tree: Path = ROOT) -> dict[str, float]:
    """One measurement in a process of its own."""
    name = "first batch" if figure == "step 10^7" else figure
    done = subprocess.run(
        [sys.executable, str(CHILD), name, json.dumps(given)],
        env=_environment(tree),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"{figure} {given}: {done.stderr.strip().splitlines()[-1:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _rows(options: dict[str, Any], folder: Path) -> Iterator[dict[str, Any]]:
    trees = _trees(options)
    for figure, cases in figures(options, folder).items():
        found: dict[str, dict[int, list[dict[str, float]]]] = {tree: {} for tree in trees}
        for _ in range(options["rounds"]):
            for size, given in cases:
                for tree, path in trees.items():
                    large = size > options["largest_before"]
                    if tree == "before" and (large or figure in NEW):
                        continue
                    if tree == "before" and "pattern" in given:
                        given = {"pattern": _set(folder, size, options, "json")}
                    found[tree].setdefault(size, []).append(measure(figure, given, path))
        for tree, by_size in found.items():
            if not by_size:
                continue
            costs = {size: _median(each) for size, each in by_size.items()}
            yield {
                "figure": figure,
                "tree": tree,
                "costs": {str(size): cost for size, cost in costs.items()},
                "exponent": round(exponent({n: cost["cpu_s"] for n, cost in costs.items()}), 2),
            }


def _trees(options: dict[str, Any]) -> dict[str, Path]:
    before = {"before": Path(options["before"]).resolve()} if options["before"] else {}
    return {"this": ROOT, **before}


def _median(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(each[name] for each in found), 4) for name in found[0]}


def _open_on_ranks(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The largest set opened by several processes at once: seconds until all have it, and the
    memory of all (PSS: a page that k processes share counts 1/k for each)."""
    size = max(_numbers(options["sizes"]))
    given = json.dumps({"pattern": _set(folder, size, options, "binary"), "wait": True})
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        environment = _environment(ROOT) | {"XDG_CACHE_HOME": cache}  # nothing is kept yet
        ranks = [
            subprocess.Popen(
                [sys.executable, str(CHILD), "open", given],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(options["ranks"])
        ]
        try:
            found = [json.loads(rank.stdout.readline()) for rank in ranks if rank.stdout]
            memory = sum(_pss_mb(rank.pid) for rank in ranks)
        finally:
            for rank in ranks:
                rank.communicate()
    return {
        "samples": size,
        "ranks": len(ranks),
        "wall_s": round(max(each["wall_s"] for each in found), 2),
        "cpu_s": round(sum(each["cpu_s"] for each in found), 2),
        "pss_mb": round(memory, 1),
    }


def _pss_mb(process: int) -> float:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024 / 1e6


def _environment(tree: Path) -> dict[str, str]:
    roots = os.pathsep.join(str(tree / part) for part in ("", "kernels", "pipelines"))
    return os.environ | {"PYTHONPATH": roots, "OMP_NUM_THREADS": "1"}


def _set(folder: Path, samples: int, options: dict[str, Any], form: str) -> str:
    per_shard = options["per_shard"]
    where = folder / f"{form}-{samples}-{per_shard}"
    return make_set(where, samples, per_shard=per_shard, form=form)


def _log(folder: Path, lines: int) -> Path:
    return folder / f"run-{lines}" / "metrics.jsonl"


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",") if word]


@contextmanager
def _folder(given: str) -> Iterator[Path]:
    """The folder of the inputs: a given one stays."""
    if given:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given)
    else:
        with tempfile.TemporaryDirectory(prefix="fastmoco-growth-") as folder:
            yield Path(folder)
