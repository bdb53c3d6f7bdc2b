"""CPU time and memory of the curves of a run, by the number of its log lines.

python -m benchmarks.curves_cost 1000 10000 100000 500000
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.growth_inputs import write_metrics
from fastmoco.run.curves import Panels, draw_curves
from fastmoco.run.folder import RunFolder

_PANELS = Panels(figures={"knn": "kNN"})


@dataclass(frozen=True, kw_only=True)
class CurvesCost:
    """The cost for one file, in CPU-seconds and megabytes.

    Attributes:
        lines: of the file.
        draw_s: reading the file and drawing the picture, without importing matplotlib.
        cut_s: cutting the last 100 steps off the file, as a run does that continues.
        peak_mb: largest resident memory of the process.
    """

    lines: int
    draw_s: float
    cut_s: float
    peak_mb: float


def curves_cost(lines: int) -> CurvesCost:
    """Measure in a process of its own, whose memory nothing else has used."""
    command = [sys.executable, "-m", "benchmarks.curves_cost", "--here"]
    with tempfile.TemporaryDirectory() as folder:
        write_metrics(Path(folder) / "metrics.jsonl", lines)
        done = subprocess.run(
            [*command, str(lines), folder], stdout=subprocess.PIPE, check=True, env=os.environ
        )
    return CurvesCost(**json.loads(done.stdout))


def exponent(costs: Sequence[CurvesCost]) -> float:
    """p of draw_s = a + b lines^p, by three sizes that grow by the same factor.

    The constant a is the time of the picture itself.
    """
    first, middle, last = costs
    ratio = (last.draw_s - middle.draw_s) / (middle.draw_s - first.draw_s)
    return math.log(ratio) / math.log(last.lines / middle.lines)


def _here(lines: int, folder: Path) -> CurvesCost:
    run = RunFolder(folder)
    write_metrics(folder / "warm.jsonl", 10)
    draw_curves(folder / "warm.jsonl", run.curves, "warm", _PANELS)

    begun = time.process_time()
    draw_curves(run.metrics, run.curves, "curves", _PANELS)
    drawn = time.process_time()
    run.trim_metrics((lines - 100) * 10)
    cut = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return CurvesCost(lines=lines, draw_s=drawn - begun, cut_s=cut - drawn, peak_mb=peak)


def main(args: Sequence[str]) -> None:
    """Print a table; with `--here`, one measurement as JSON."""
    if args[0] == "--here":
        print(json.dumps(asdict(_here(int(args[1]), Path(args[2])))))
        return
    costs = [curves_cost(int(lines)) for lines in args]
    print("| lines | draw, CPU-s | cut 100 lines, CPU-s | peak, MB |\n|---|---|---|---|")
    for cost in costs:
        print(f"| {cost.lines:,} | {cost.draw_s:.2f} | {cost.cut_s:.3f} | {cost.peak_mb:.0f} |")
    if len(costs) >= 3:
        print(f"exponent of the three smallest: {exponent(costs[:3]):.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
