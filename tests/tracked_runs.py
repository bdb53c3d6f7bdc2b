"""A run as trackers see it, without a trainer: what is logged, and how a process of it ends.

`python -m tests.tracked_runs TRACKER FOLDER FROM TO END` logs the steps of a process; END is `close`,
or `kill`: it ends itself with -9 as soon as all has reached the tracker.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.run.events import Event
from fastmoco.telemetry.trackers.interface import Histogram, TrackedRun
from fastmoco.telemetry.trackers.trackers import Trackers

RUN_ID = "0123456789abcd"
CONFIG = {"optim.lr": 0.5, "model.architecture": "vit", "data.shards": "a.tar"}
PICTURE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
HISTOGRAM = Histogram(edges=[-1.0, 0.0, 2.0], counts=[3.0, 5.0], total=1.5, squares=2.5)
LAST = 8


def metrics_of(step: int) -> dict[str, float]:
    """What is logged of a step: a name with a slash, and what JSON does not have."""
    odd = math.nan if step == 3 else step / 3
    return {"loss": 1 / (step + 1), "gradient_norm/total": odd}


def tracked(folder: Path, first_step: int, **others: Any) -> TrackedRun:
    """The run, of a process that begins at a step."""
    return TrackedRun(
        name=folder.name,
        id=RUN_ID,
        folder=str(folder),
        config=CONFIG,
        measures=("knn",),
        first_step=first_step,
        total_steps=LAST,
        resumed=first_step > 1,
        **others,
    )


def log(trackers: Trackers, first: int, last: int) -> None:
    """Log some steps: metrics of all, in steps 2 and 6 what is sparse."""
    for step in range(first, last + 1):
        trackers.write(step, metrics_of(step))
        if step in (2, 6):
            trackers.write(step, {"knn": step / 10})
            trackers.summary(step, {"knn": step / 10, "knn_best": step / 10})
            trackers.event(Event(step, "gradient_spike", "heads", 7.5, f"a spike of step {step}"))
            trackers.picture(step, "views", PICTURE)
            trackers.histograms(step, {"gradients/heads": HISTOGRAM})


def in_process(tracker: str, folder: Path, first: int, last: int, end: str) -> int:
    """Log some steps in a process of its own, and return its exit code."""
    words = [
        sys.executable,
        "-m",
        "tests.tracked_runs",
        tracker,
        str(folder),
        str(first),
        str(last),
    ]
    return subprocess.run([*words, end], timeout=120, check=False).returncode


def main(tracker: str, folder: Path, first: int, last: int, end: str) -> None:
    """See the module."""
    trackers = Trackers([tracker], tracked(folder, first), tell=print)
    log(trackers, first, last)
    if end == "kill":
        while any(outlet._calls for outlet in trackers._outlets):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
    trackers.close(60)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])
