"""How costs grow with the size of a set, of a run and of a bank: a line for each figure, the
exponent fitted over the sizes, and the same of another tree beside it.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.growth_inputs import make_set, write_metrics
from benchmarks.shown import Chart, Lines
from benchmarks.startup import environment, startup_cpu_s

NAME = "growth"
DEFAULTS = {
    "sizes": "10000,100000,1280000",
    "lines": "500,2000,10000,100000",
    "banks": "10000,100000",
    "ranks": 8,
    "per_shard": 2500,
    "rounds": 3,
    "before": "",
    "largest_before": 1280000,
    "most_lines_before": 2000,
    "folder": "",
}
QUICK = {"sizes": "2000,20000", "lines": "2000", "banks": "2000", "ranks": 2, "rounds": 1}
ROOT = Path(__file__).resolve().parents[2]
CHILD = ROOT / "benchmarks" / "growth_child.py"
NEW = ("open again", "sample")
"""Figures of operations that earlier trees do not have."""
STEADY = ("first batch", "step 10^7", "100 steps", "trim")
"""Figures that must not grow with the size: they cost what a batch or a few lines cost."""
LIMIT = 1.1
"""Exponent of the CPU time above which a cost grows faster than its input."""
STEADY_LIMIT = 0.2
"""The same for the figures that must not grow."""
_LEAST_S = 1e-3
"""CPU seconds below which a cost counts as this much: it is too small to be measured."""
_STEADY_LEAST_S = 0.02
"""The same for the figures that must not grow: `trim` reads up to two megabytes of any log."""
_BILLION = 10**9


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Measure every figure at every size, each in a process of its own, the trees in turn.

    Args:
        options: `sizes` of sets in samples, their tars holes without content; `lines` of
            `metrics.jsonl`; `banks` of kNN in rows; `ranks` that open the largest set at the same
            time; `per_shard` samples of a shard; `rounds`, of which the median counts; `before`,
            the folder of another checkout, which is measured beside this one, up to
            `largest_before` samples, rows or lines to trim and `most_lines_before` lines to draw;
            `folder` that keeps the inputs, which a later call uses again.

    Returns:
        A row for each figure and tree: cost by size (`cpu_s`, `wall_s`, `mb` resident after it,
        `peak_mb` above the start) and the exponent (`exponent`; None for one size). Then `ranks`,
        the largest set opened by several processes; `start`, processor seconds of commands by
        tree; `failed`, figures of this tree whose exponent is above their limit.
    """
    with _folder(options["folder"]) as folder:
        # First what the other checkout may be unable to do: the rows can take an hour.
        started = startup_cpu_s(options["rounds"], checkouts=tuple(_trees(options).values()))
        rows = list(_rows(options, folder))
        opened = _open_on_ranks(options, folder)
    failed = [
        row["figure"]
        for row in rows
        if row["tree"] == "this" and (row["exponent"] or 0.0) > limit(row["figure"])
    ]
    start = {name: started[tree] for name, tree in _trees(options).items()}
    return {"rows": rows, "ranks": opened, "start": start, "failed": failed}


def figures(options: dict[str, Any], folder: Path) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    """(size, arguments of the child) by figure; the inputs are made if they are not there yet."""
    sizes = _numbers(options["sizes"])
    sets = [(n, _set(folder, n, options, "binary")) for n in sizes]
    logs = [(n, str(_log(folder, n))) for n in _numbers(options["lines"])]
    orders = (*sizes, _BILLION)
    return {
        "open": [(n, {"pattern": pattern}) for n, pattern in sets],
        "open again": [(n, {"pattern": pattern}) for n, pattern in sets],
        "bad samples": [(n, {"pattern": pattern}) for n, pattern in sets],
        "sample": [(n, {"pattern": pattern}) for n, pattern in sets],
        "first batch": [(n, {"samples": n, "step": 0, "seed": 0}) for n in orders],
        "step 10^7": [(n, {"samples": n, "step": 10**7, "seed": 0}) for n in orders],
        "100 steps": [(n, {"samples": n, "batch": 64, "seed": 0}) for n in orders],
        "curves": [(n, {"metrics": log}) for n, log in logs],
        "trim": [(n, {"metrics": log, "step": 10 * n - 30}) for n, log in logs],
        "knn": [(n, {"bank": n}) for n in _numbers(options["banks"])],
    }


def limit(figure: str) -> float:
    """The largest exponent that a figure may have."""
    return STEADY_LIMIT if figure in STEADY else LIMIT


def exponent(figure: str, costs: Mapping[int, float]) -> float | None:
    """Slope of log(cost) over log(size); None for fewer than two sizes.

    It is that between the two largest sizes, where constant parts count least. For a figure that
    must not grow it is that between the smallest and the largest size. Costs too small to be
    measured are raised to a constant, so that their slope is 0.
    """
    if len(costs) < 2:
        return None
    known = sorted(costs.items())
    steady = figure in STEADY
    least = _STEADY_LEAST_S if steady else _LEAST_S
    (small, less), (large, more) = known[0 if steady else -2], known[-1]
    return math.log(max(more, least) / max(less, least)) / math.log(large / small)


def measure(figure: str, given: dict[str, Any], tree: Path = ROOT) -> dict[str, float]:
    """One measurement in a process of its own, with an empty cache folder and a copy of the log.

    `open again` is the second of two processes that open a set with the same cache folder.
    """
    with tempfile.TemporaryDirectory(prefix="fastmoco-growth-") as name:
        scratch = Path(name)
        variables = _environment(tree, scratch / "cache")
        if "metrics" in given:
            log = Path(given["metrics"])
            given = given | {"metrics": shutil.copy(log, scratch)}
            # The list of fonts would take seconds in each process.
            variables["MPLCONFIGDIR"] = str(log.parents[1] / "matplotlib")
        if figure == "open again":
            _child(figure, given, variables)
        return _child(figure, given, variables)


def table(result: Mapping[str, Any]) -> str:
    """A line for each figure and size, then the start of commands and the set on several ranks."""
    rows = {(row["figure"], row["tree"]): row for row in result["rows"]}
    lines = [
        "| figure | size | before, CPU s | this, CPU s | before, peak MB | this, peak MB "
        "| before, exponent | this, exponent | limit |",
        "|---|" + "--:|" * 8,
    ]
    for figure in dict.fromkeys(row["figure"] for row in result["rows"]):
        trees = [rows.get((figure, tree), {}) for tree in ("before", "this")]
        costs = [tree.get("costs", {}) for tree in trees]
        sizes = sorted({int(size) for each in costs for size in each})
        for size in sizes:
            here = [each.get(str(size), {}) for each in costs]
            last = size == sizes[-1]
            cells = [
                *(_cell(cost.get("cpu_s"), ".4f") for cost in here),
                *(_cell(cost.get("peak_mb"), ".1f") for cost in here),
                *(_cell(tree.get("exponent") if last else None, ".2f") for tree in trees),
                _cell(limit(figure) if last else None, ".1f"),
            ]
            lines.append(f"| {figure} | {size:,} | " + " | ".join(cells) + " |")

    start = result["start"]
    lines += ["", "| start of a process | before, CPU s | this, CPU s |", "|---|--:|--:|"]
    for name in start["this"]:
        before, this = (_cell(start.get(tree, {}).get(name), ".2f") for tree in ("before", "this"))
        lines.append(f"| {name} | {before} | {this} |")

    ranks = result["ranks"]
    lines += [
        "",
        f"{ranks['samples']:,} samples opened by {ranks['ranks']} processes at the same time: "
        f"{ranks['wall_s']} s, {ranks['cpu_s']} CPU s, {ranks['pss_mb']} MB (PSS) in all.",
        f"Above their limit: {', '.join(result['failed']) or 'none'}.",
    ]
    return "\n".join(lines)


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """CPU-seconds of this tree by size."""
    lines = {
        row["figure"]: [(int(size), cost["cpu_s"]) for size, cost in row["costs"].items()]
        for row in result["rows"]
        if row["tree"] == "this"
    }
    kept = {name: [p for p in points if p[1] > 0] for name, points in lines.items()}
    return [
        Lines(
            title="Cost of one operation by the size of its input",
            x="samples, rows or lines",
            y="CPU-seconds",
            lines={name: points for name, points in kept.items() if points},
            log=True,
        )
    ]


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _child(figure: str, given: dict[str, Any], variables: dict[str, str]) -> dict[str, float]:
    name = {"step 10^7": "first batch", "open again": "open"}.get(figure, figure)
    done = subprocess.run(
        [sys.executable, str(CHILD), name, json.dumps(given)],
        env=variables,
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
        most = options["most_lines_before" if figure == "curves" else "largest_before"]
        found: dict[str, dict[int, list[dict[str, float]]]] = {tree: {} for tree in trees}
        for _ in range(options["rounds"]):
            for size, given in cases:
                for tree, path in trees.items():
                    if tree == "before" and (size > most or figure in NEW):
                        continue
                    if tree == "before" and "pattern" in given:
                        given = {"pattern": _set(folder, size, options, "json")}
                    found[tree].setdefault(size, []).append(measure(figure, given, path))
        for tree, by_size in found.items():
            if not by_size:
                continue
            costs = {size: _median(each) for size, each in by_size.items()}
            slope = exponent(figure, {n: cost["cpu_s"] for n, cost in costs.items()})
            yield {
                "figure": figure,
                "tree": tree,
                "costs": {str(size): cost for size, cost in costs.items()},
                "exponent": None if slope is None else round(slope, 2),
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
        variables = _environment(ROOT, Path(cache))
        ranks = [
            subprocess.Popen(
                [sys.executable, str(CHILD), "open", given],
                env=variables,
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


def _environment(tree: Path, cache: Path) -> dict[str, str]:
    """Variables of a process that imports from a tree and keeps what it keeps in `cache`."""
    return environment(tree) | {"XDG_CACHE_HOME": str(cache)}


def _set(folder: Path, samples: int, options: dict[str, Any], form: str) -> str:
    per_shard = options["per_shard"]
    where = folder / f"{form}-{samples}-{per_shard}"
    return make_set(where, samples, per_shard=per_shard, form=form)


def _log(folder: Path, lines: int) -> Path:
    """The log of that many lines, which is made if it is not there yet."""
    path = folder / f"log-{lines}" / "metrics.jsonl"
    if not path.exists():
        write_metrics(path.with_suffix(".part"), lines).rename(path)
    return path


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
