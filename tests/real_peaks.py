"""The growth of the resident set in one real step, for tests of plans.

Run as `python -m tests.real_peaks`: one line in, one figure out. Every step is taken by a fork of its
own, which finds all imports done.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Self

import torch

from fastmoco.config import Config
from fastmoco.config.serial import from_json, to_json
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco_pipelines.spec import each_view

ROOT = Path(__file__).parents[1]
HABITS = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
}


class RealPeaks:
    """A process that measures real steps."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.real_peaks"],
            env=os.environ | HABITS,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=60)

    def peak(self, config: Config, images: int, chunk: int, kept: int) -> int:
        """Bytes by which one step exceeds what was resident before it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(
            json.dumps([to_json(config), images, chunk, kept]), file=self._process.stdin, flush=True
        )
        return int(self._process.stdout.readline())


def _measure(text: str, images: int, chunk: int, kept: int) -> int:
    config = from_json(text)
    objective = build_objective(config, torch.device("cpu"))
    side = config.model.image_size

    def step(images: int, kept: int) -> None:
        views = torch.randn(len(each_view(config.data.views)), images, 3, side, side).unbind()
        labels = torch.zeros(images, dtype=torch.int64) if objective.needs_labels else None
        if chunk:
            ChunkedStep(objective, chunk=chunk, kept=kept)(*views, labels=labels)
        else:
            objective(*views, labels=labels).loss.backward()

    # Loads libraries, makes the gradients, which are state, and what oneDNN keeps for large products.
    step(2 * chunk or images // 2, 0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS:")
    step(images, kept)
    return _status("VmHWM:") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _serve() -> None:
    import torch.fx.experimental.symbolic_shapes  # noqa: F401 - by the backward of chunks

    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            print(_measure(*json.loads(line)), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print("failed", flush=True)


if __name__ == "__main__":
    _serve()
