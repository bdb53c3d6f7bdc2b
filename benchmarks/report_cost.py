"""Size, time and memory of the report of a run, by the number of its log lines.

python -m benchmarks.report_cost 10000 300000
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.growth_inputs import write_metrics

_NAME = "report.html"


@dataclass(frozen=True, kw_only=True)
class ReportCost:
    """The cost of one page, without pictures.

    Attributes:
        lines: of the metrics.
        metrics_mb: size of their file.
        page_mb: size of the page.
        cpu_s: processor time of `fastmoco report`, its imports included.
        wall_s: time on the clock.
        peak_mb: largest resident memory of its process.
    """

    lines: int
    metrics_mb: float
    page_mb: float
    cpu_s: float
    wall_s: float
    peak_mb: float


def report_cost(lines: int) -> ReportCost:
    """Measure the command in a process of its own.

    Raises:
        RuntimeError: if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        metrics = write_metrics(Path(folder) / "metrics.jsonl", lines)
        command = [sys.executable, "-m", "fastmoco", "report", folder, "--no-pictures"]
        begun = time.perf_counter()
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - begun
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}")
        return ReportCost(
            lines=lines,
            metrics_mb=metrics.stat().st_size / 1e6,
            page_mb=(Path(folder) / _NAME).stat().st_size / 1e6,
            cpu_s=used.ru_utime + used.ru_stime,
            wall_s=wall,
            peak_mb=used.ru_maxrss * 1024 / 1e6,
        )


def main(args: Sequence[str]) -> None:
    """Print a table."""
    print("| lines | metrics, MB | page, MB | CPU-s | wall, s | peak, MB |")
    print("|---|---|---|---|---|---|")
    for cost in (report_cost(int(lines)) for lines in args):
        print(
            f"| {cost.lines:,} | {cost.metrics_mb:.0f} | {cost.page_mb:.2f} | {cost.cpu_s:.1f} | "
            f"{cost.wall_s:.1f} | {cost.peak_mb:.0f} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
