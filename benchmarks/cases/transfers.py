"""Shards from a distant server: images a second and the share of the time that the trainer waits,
with four transfers at once and with as many as pay.

A local server gives every connection and every answer its latency, and cuts some answers off by a
reset. A consumer takes batches in the order of a run, no faster than `wanted`, and computes
nothing. Each epoch begins with an empty cache. Both sides must deliver the same bytes in the same
order, those of the local files.
"""

from __future__ import annotations

import io
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import interleave
from benchmarks.shown import Bars, Chart, markdown, number
from fastmoco_pipelines.formats.index import build_index, write_index
from fastmoco_pipelines.formats.manifest import write_sets
from fastmoco_pipelines.sampling.stand_ins import Plan
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import MAX_TRANSFERS, CacheSpec
from fastmoco_pipelines.stores.pace import START

NAME = "transfers"
DEFAULTS = {
    "shards": 500,
    "per_shard": 20,
    "latency_ms": 200.0,
    "resets": 0.05,
    "wanted": 1000.0,
    "window": 64,
    "batch": 100,
    "epochs": 1,
    "most": MAX_TRANSFERS,
    "rounds": 3,
    "seed": 0,
}
QUICK = {"shards": 40, "latency_ms": 50.0, "window": 10, "rounds": 1}
SERVER = Path(__file__).resolve().parents[1] / "distant_server.py"
BEFORE, NOW = "four at once", "as many as pay"
_IMAGES = 41  # different ones


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Measure.

    Args:
        options: `shards` of the set, and images `per_shard`; `latency_ms` of a connection and of an
            answer; share of answers that are cut off (`resets`); images a second that the consumer
            takes at most (`wanted`); `window` of shards that are shuffled together; `batch`;
            `epochs` of a turn; `most` transfers at once; `rounds`; `seed` of order and resets.

    Returns:
        `failed`, by side; by side and round `images_per_s`, `wait_share` and `transfers`, the most
        that the server has seen at once; `resets` of all rounds; medians of the ratio, `speedup`.
    """
    with tempfile.TemporaryDirectory(prefix="fastmoco-transfers-") as name:
        folder = Path(name) / "set"
        _make_set(folder, options)
        expected = _epoch(options, str(folder), Path(name) / "cache", 1)["digest"]
        turns: dict[str, list[dict[str, Any]]] = {BEFORE: [], NOW: []}

        def turn(side: str) -> float:
            most = min(START, options["most"]) if side == BEFORE else options["most"]
            with tempfile.TemporaryDirectory(dir=name) as cache, _server(folder, options) as server:
                found = _epoch(options, f"{server.url}/train-*.tar", Path(cache) / "shards", most)
            turns[side].append(found | server.figures)
            return float(found["images_per_s"])

        figures = interleave(
            {side: lambda side=side: turn(side) for side in turns},  # type: ignore[misc]
            rounds=options["rounds"],
        )
    failed = {}
    for side, found in turns.items():
        most = START if side == BEFORE else options["most"]
        if any(one["digest"] != expected for one in found):
            failed[side] = "delivers other bytes, or another order, than the local files"
        elif max(one["most_busy"] for one in found) > most + 1:  # one that is needed at once
            failed[side] = f"has more than {most} + 1 transfers at once"
        elif options["resets"] and not any(one["resets"] for one in found):
            failed[side] = "met no reset"
    result: dict[str, Any] = {"failed": failed, "subject": NOW}
    result["images_per_s"] = {s: [round(x, 1) for x in figures[s]] for s in figures}
    for key, of in (("wait_share", "wait_share"), ("transfers", "most_busy"), ("resets", "resets")):
        result[key] = {side: [one[of] for one in found] for side, found in turns.items()}
    if not failed:
        pairs = zip(figures[NOW], figures[BEFORE], strict=True)
        result["speedup"] = {BEFORE: round(statistics.median(a / b for a, b in pairs), 2)}
    return result


def table(result: Mapping[str, Any]) -> str:
    """A line for each side: medians."""
    rows = [
        [
            side,
            number(statistics.median(rates)),
            f"{statistics.median(result['wait_share'][side]):.1%}",
            number(statistics.median(result["transfers"][side])),
            str(sum(result["resets"][side])),
        ]
        for side, rates in result["images_per_s"].items()
    ]
    head = ["transfers", "images/s", "the trainer waits", "at once at most", "resets"]
    return markdown(head, rows)


def charts(result: Mapping[str, Any]) -> list[Chart]:
    """Images a second of both sides."""
    bars = {
        side: (
            statistics.median(rates),
            min(rates),
            max(rates),
        )
        for side, rates in result["images_per_s"].items()
    }
    return [Bars(title="Shards from a distant server", unit="images/s", bars=bars)]


class _Server:
    """A server in a process of its own; `figures` when it has ended."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None  # noqa: S101 - a type: it was opened with a pipe
        self.url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        self.figures: dict[str, int] = {}


@contextmanager
def _server(folder: Path, options: Mapping[str, Any]) -> Iterator[_Server]:
    words = [str(folder), options["latency_ms"] / 1e3, options["resets"], options["seed"]]
    process = subprocess.Popen(
        [sys.executable, str(SERVER), *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    server = _Server(process)
    try:
        yield server
    finally:
        text, _ = process.communicate()
        server.figures = json.loads(text) if text else {}


def _epoch(options: Mapping[str, Any], pattern: str, cache: Path, most: int) -> dict[str, Any]:
    """Read a set in the order of a run: images a second, the share of the time that was waited, and
    a digest of all bytes in their order."""
    spec = CacheSpec(cache_dir=str(cache), cache_size_gb=1)
    batch = options["batch"]
    with ShardSet.open(pattern, cache=spec, max_transfers=most) as shards:
        windows = shards.windows(options["window"], spec)
        plan = Plan(seed=options["seed"], windows=windows, global_batch_size=batch)
        steps = options["epochs"] * (len(shards) // batch)
        digest = 0
        waited = 0.0
        began = due = time.perf_counter()
        for step in range(steps):
            places = plan.places(step)
            asked = time.perf_counter()
            epoch, position = divmod(step, len(shards) // batch)
            shards.follow(windows, seed=options["seed"], epoch=epoch, position=position * batch)
            for data in shards.read(np.asarray(places.ids)):
                digest = zlib.crc32(data.data, digest)
            now = time.perf_counter()
            waited += now - asked
            if pattern.startswith("http"):
                due = max(due, now) + batch / options["wanted"]
                time.sleep(max(0.0, due - now))
        elapsed = time.perf_counter() - began
    return {
        "images_per_s": steps * batch / elapsed,
        "wait_share": round(waited / elapsed, 4),
        "digest": digest,
    }


def _make_set(folder: Path, options: Mapping[str, Any]) -> None:
    """Tars with small images of noise, their indexes and a manifest."""
    folder.mkdir()
    rng = np.random.default_rng(options["seed"])
    images = []
    for _ in range(_IMAGES):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(out, "PNG")
        images.append(out.getvalue())
    listed = []
    for shard in range(options["shards"]):
        path = folder / f"train-{shard:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for i in range(options["per_shard"]):
                info = tarfile.TarInfo(f"{shard:06d}{i:04d}.png")
                data = images[(7 * shard + i) % _IMAGES]
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        write_index(path, build_index(path))
        listed.append({"name": path.name, "samples": options["per_shard"]})
    write_sets(folder, {"train": {"classes": [], "shards": listed}})
