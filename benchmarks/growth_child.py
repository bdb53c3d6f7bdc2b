"""One measurement of `python -m benchmarks run growth`, in a process of its own: what an operation
costs for an input of a given size. It uses only what earlier versions have too, so that two trees
can be compared: `python growth_child.py FIGURE JSON`, with the tree in PYTHONPATH.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

MOST_BYTES = 2 * 10**9
"""Memory that an order may take: more is an error, not the end of the machine."""


def resident_mb(kind: str = "VmRSS") -> float:
    """Resident memory of this process, in 10^6 bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")) * 1024 / 1e6


def open_set(given: dict[str, Any]) -> Callable[[], Any]:
    """Open a set of shards."""
    from fastmoco_pipelines.sets.shard_set import ShardSet

    return lambda: ShardSet.open(given["pattern"])


def first_batch(given: dict[str, Any]) -> Callable[[], Any]:
    """The samples of the first step of an epoch, or of a later step, with nothing cached."""
    from fastmoco_pipelines import rank_slice

    _limit_memory()
    return lambda: rank_slice(
        given["step"],
        seed=given["seed"],
        count=given["samples"],
        global_batch_size=min(4096, given["samples"]),
        rank=0,
        world_size=1,
    )


def many_batches(given: dict[str, Any]) -> Callable[[], Any]:
    """The samples of 100 steps in a row."""
    from fastmoco_pipelines import rank_slice

    _limit_memory()

    def steps() -> None:
        for step in range(100):
            rank_slice(
                step,
                seed=given["seed"],
                count=given["samples"],
                global_batch_size=given["batch"],
                rank=0,
                world_size=1,
            )

    return steps


def curves(given: dict[str, Any]) -> Callable[[], Any]:
    """Draw the curves of a run."""
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401

    from fastmoco.run.curves import Panels, draw_curves

    out = Path(given["metrics"]).with_suffix(".png")
    return lambda: draw_curves(
        Path(given["metrics"]), out, "growth", Panels(figures={"knn": "kNN"})
    )


def trim(given: dict[str, Any]) -> Callable[[], Any]:
    """Remove the metrics after a step, as a resumed run does."""
    from fastmoco.run.folder import RunFolder

    folder = RunFolder(Path(given["metrics"]).parent)
    return lambda: folder.trim_metrics(given["step"])


def knn(given: dict[str, Any]) -> Callable[[], Any]:
    """kNN accuracy of 500 queries."""
    import torch

    from fastmoco.evaluation.knn import knn_accuracy

    torch.set_num_threads(1)
    noise = torch.Generator().manual_seed(0)
    bank = torch.randn(given["bank"], 64, generator=noise)
    queries = torch.randn(500, 64, generator=noise)
    labels = torch.randint(1000, (given["bank"],), generator=noise)
    wanted = torch.randint(1000, (500,), generator=noise)
    return lambda: knn_accuracy(bank, labels, queries, wanted)


def bad_samples(given: dict[str, Any]) -> Callable[[], Any]:
    """The memory of bad samples of a set that is open."""
    from fastmoco_pipelines.healing.bad_samples import BadSamples
    from fastmoco_pipelines.sets.shard_set import ShardSet

    shards = ShardSet.open(given["pattern"])
    return lambda: BadSamples(shards, max_bad_share=0.01)


def sample(given: dict[str, Any]) -> Callable[[], Any]:
    """Check 100 images of a set, one by one in a process; those of a set of holes are all bad."""
    from fastmoco_pipelines.inspecting.sample_check import check_sample

    return lambda: check_sample(given["pattern"], 100, workers=1, quarantine=False)


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))


FIGURES: dict[str, Callable[[dict[str, Any]], Callable[[], Any]]] = {
    "open": open_set,
    "first batch": first_batch,
    "100 steps": many_batches,
    "curves": curves,
    "trim": trim,
    "knn": knn,
    "bad samples": bad_samples,
    "sample": sample,
}


def main() -> int:
    """Measure, print one JSON line, and with `wait` stay until standard input ends."""
    name, given = sys.argv[1], json.loads(sys.argv[2])
    operation = FIGURES[name](given)
    np.random.default_rng(0).integers(0, 2, 10)  # numpy's own first use

    before = resident_mb()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    wall = time.perf_counter()
    cpu = time.process_time()
    result = operation()
    cpu = time.process_time() - cpu
    wall = time.perf_counter() - wall
    peak = resident_mb("VmHWM")
    figures = {
        "cpu_s": cpu,
        "wall_s": wall,
        "mb": resident_mb() - before,
        "peak_mb": max(0.0, peak - before),
    }
    print(json.dumps(figures), flush=True)
    if given.get("wait"):
        sys.stdin.read()
    del result
    return 0


if __name__ == "__main__":
    sys.exit(main())
