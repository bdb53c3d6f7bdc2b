"""A long run over bad data: several processes read a damaged set from a server
that drops connections.

    python -m benchmarks.soak --minutes 30 --processes 2

One image in a hundred is damaged, in four ways; a local HTTP server cuts off one answer in
`--drop-every`; the cache has room for about 40 % of the set, so shards are evicted. Every rank
compares each batch with that of the undamaged set on the disk: all rows except those of bad images
must agree bit for bit, and no replacement may be a bad image. From time to time the loader is built
again at its current step, with or without its list of bad images, and the batches must not change.
The last tables report how much was compared, and the resources of the processes. Exit code 1 if
anything differed, or if, in a run of ten minutes or more, memory, open files or threads were not
flat by the rule of `benchmarks.soak_memory`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.soak_data import DroppingServer, damaged_set, make_set
from benchmarks.soak_memory import MARKS, MemoryLog, MemorySample, at_marks, rises
from fastmoco_pipelines import LoaderSpec, build_loader, moco_v3_views
from fastmoco_pipelines.loading.loader import Loader
from fastmoco_pipelines.text import first_sentence

_RESTART_STEPS = 150
_PACE_STEPS = 5
_JUDGED_SECONDS = 600  # a shorter run is warm-up only: its memory is reported but not judged
_COUNTS = ("steps", "differing", "replaced", "quarantined", "restarts")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the soak, or one of its ranks; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=first_sentence(__doc__)
    )
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--bad-share", type=float, default=0.01)
    parser.add_argument(
        "--drop-every", type=int, default=5, help="one answer in this many is cut off; 0: none"
    )
    parser.add_argument("--batch", type=int, default=32, help="global batch size")
    parser.add_argument("--size", type=int, default=64, help="side of a view in pixels")
    parser.add_argument("--rank", type=json.loads, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rank is not None:
        print(json.dumps(_soak_rank(options.rank)), flush=True)
        return 0

    # Data, a server for it, and a process for each rank.
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="soak-")))
        clean, pattern, size = make_set(folder / "clean", options.images)
        bad = damaged_set(clean, folder / "bad", options.bad_share)
        server = stack.enter_context(DroppingServer(folder / "bad", options.drop_every))
        common = {
            "clean": str(clean / pattern),
            "faulty": f"{server.url}/{pattern}",
            "bad": sorted(bad),
            "folder": str(folder),
            "cache_gb": 0.4 * size / 1e9,
            "seconds": options.minutes * 60,
            "batch": options.batch,
            "size": options.size,
            "world_size": options.processes,
        }
        results = _run_ranks(common)
        _print_counts(results)
        print(
            f"{size / 1e6:.1f} MB in shards, {len(bad)} bad images, {server.drops} of "
            f"{server.answers} answers cut off"
        )

    # Judge the results.
    flat = _print_memory(results, common["seconds"])
    wrong = any(result["differing"] or result["error"] for result in results)
    return 1 if wrong or not flat else 0


def _run_ranks(common: dict[str, Any]) -> list[dict[str, Any]]:
    """Start a process for each rank and wait for all of them, a few minutes
    longer than the given time.
    """
    processes = []
    for rank in range(common["world_size"]):
        job = json.dumps(common | {"rank": rank})
        command = [sys.executable, "-m", "benchmarks.soak", "--rank", job]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    results = []
    for rank, process in enumerate(processes):
        out, _ = process.communicate(timeout=common["seconds"] + 300)
        lines = out.strip().splitlines()
        failed: dict[str, Any] = dict.fromkeys(_COUNTS, 0) | {"memory": []}
        text = f"rank {rank} ended with code {process.returncode}"
        results.append(
            json.loads(lines[-1]) if process.returncode == 0 and lines else failed | {"error": text}
        )
    return results


def _soak_rank(job: dict[str, Any]) -> dict[str, Any]:
    """Compare batches until the time is over."""
    bad = np.array(job["bad"], dtype=np.int64)
    result: dict[str, Any] = dict.fromkeys(_COUNTS, 0) | {"error": ""}
    until = time.monotonic() + job["seconds"]
    log = MemoryLog(job["seconds"])
    clean = _build(job, job["clean"], 0, None)
    faulty = _build(job, job["faulty"], 0, 0)
    try:
        while time.monotonic() < until:
            step = result["steps"]
            _keep_pace(job, step, until)
            if step and step % _RESTART_STEPS == 0:
                result["quarantined"] = max(result["quarantined"], faulty.figures().left_out)
                faulty.close()
                faulty = _build(job, job["faulty"], step, result["restarts"] % 2)
                result["restarts"] += 1
            wanted, got = clean.next(), faulty.next()
            excused = np.isin(wanted.sample_ids, bad)
            good = got.sample_ids == wanted.sample_ids
            for view, other in zip(got.views, wanted.views, strict=True):
                good &= (view == other).flatten(1).all(1).numpy()
            stands_in = (got.sample_ids != wanted.sample_ids) & ~np.isin(got.sample_ids, bad)
            result["differing"] += int(not np.where(excused, stands_in, good).all())
            result["replaced"] += int(excused.sum())
            result["steps"] += 1
            log.look()
        result["quarantined"] = max(result["quarantined"], faulty.figures().left_out)
        result["summary"] = faulty.figures().summary()
    except Exception as error:  # the figures of the other ranks are still useful
        result["error"] = f"{type(error).__name__}: {error}"
    finally:
        clean.close()
        faulty.close()
    return result | {"memory": log.samples}


def _keep_pace(job: dict[str, Any], step: int, until: float) -> None:
    """Wait for the other ranks like a trainer, but not at every step, because
    they share a cache.
    """
    if step % _PACE_STEPS:
        return
    folder = Path(job["folder"])
    (folder / f"rank{job['rank']}").write_text(str(step))
    for rank in range(job["world_size"]):
        other = folder / f"rank{rank}"
        while time.monotonic() < until and not (
            other.exists() and int(other.read_text() or 0) >= step
        ):
            time.sleep(0.02)


def _build(job: dict[str, Any], shards: str, step: int, keeps_list: int | None) -> Loader:
    remote = "://" in shards
    spec = LoaderSpec(
        shards=shards,
        views=moco_v3_views(job["size"]),
        global_batch_size=job["batch"],
        threads=1,
        cache_dir=str(Path(job["folder"]) / "cache") if remote else "",
        cache_size_gb=job["cache_gb"],
        shuffle_window=3,
        max_bad_share=0.1,
        timeout_s=240,
    )
    loader = build_loader(
        spec,
        rank=job["rank"],
        world_size=job["world_size"],
        start_step=step,
        quarantine_list=Path(job["folder"]) / "quarantine.jsonl" if keeps_list else None,
    )
    loader.report = lambda text: print(f"rank {job['rank']}: {text}", file=sys.stderr)
    return loader


def _print_counts(results: list[dict[str, Any]]) -> None:
    _print_rows(
        [("rank", *_COUNTS)]
        + [(str(i), *(str(result[n]) for n in _COUNTS)) for i, result in enumerate(results)]
    )
    for rank, result in enumerate(results):
        print(f"rank {rank}: {result['error'] or result.get('summary', '')}")


def _print_memory(results: list[dict[str, Any]], seconds: float) -> bool:
    """Print the resources of each process; returns whether all were flat, or
    the run too short to judge.
    """
    rows = [("rank", "at %", "anon MiB", "file MiB", "files", "threads")]
    outcomes, flat = [], True
    for rank, result in enumerate(results):
        samples = [MemorySample(*values) for values in result["memory"]]
        for mark, held in zip(MARKS, at_marks(samples, seconds), strict=False):
            figures = (
                f"{held.anon_mib:.0f}",
                f"{held.file_mib:.0f}",
                str(held.files),
                str(held.threads),
            )
            rows.append((str(rank), f"{100 * mark:.0f}", *figures))
        found = rises(samples, seconds)
        judged = seconds >= _JUDGED_SECONDS and not result["error"]
        bad = not found or not all(rise.flat for rise in found)
        reason = "not judged, it failed" if result["error"] else "not judged, the run was too short"
        word = ("NOT FLAT" if bad else "flat") if judged else reason
        outcomes.append(
            f"rank {rank}: {word}; over the second half: "
            f"{', '.join(map(str, found)) or 'too few samples'}"
        )
        flat &= not (judged and bad)
    _print_rows(rows)
    print("\n".join(outcomes))
    return flat


def _print_rows(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
