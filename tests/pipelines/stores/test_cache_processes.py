"""Several processes share one cache that is smaller than the set; one is killed on its way; the
others lose nothing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fastmoco_pipelines.making.pack import pack_folder
from fastmoco_pipelines.sampling.order import epoch_order
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.stores.cache import ShardCache
from tests.pipelines.http_fault_server import FaultServer, drop

READER = """
import hashlib, json, sys
import numpy as np
from fastmoco_pipelines.stores.retries import Limits
from fastmoco_pipelines.sampling.order import rank_slice
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import CacheSpec

url, folder, size_gb, rank, steps = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
limits = Limits(first_delay_seconds=0.02, deadline_seconds=120)
with ShardSet.open(url, cache=CacheSpec(cache_dir=folder, cache_size_gb=size_gb), limits=limits) as shards:
    windows = shards.windows(2)
    digest = hashlib.sha256()
    for step in range(steps):
        epoch, ids = rank_slice(
            step, seed=1, count=len(shards), global_batch_size=12, rank=rank, world_size=3, windows=windows
        )
        shards.follow(windows, seed=1, epoch=epoch, position=step % (len(shards) // 12) * 12)
        for data in shards.read(ids):
            digest.update(data)
print(json.dumps(digest.hexdigest()))
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory, noise_image):
    """96 images of about 15 kB in 8 shards."""
    root = tmp_path_factory.mktemp("many")
    (root / "src").mkdir()
    for i in range(96):
        noise = np.random.default_rng(i).integers(0, 256, 12_000, dtype=np.uint8).tobytes()
        (root / "src" / f"{i:03d}.jpg").write_bytes(
            noise_image(i) + noise
        )  # what stands behind a JPEG is ignored
    pack_folder(root / "src", root / "set", shard_samples=12)
    return root / "set"


def start(
    server: FaultServer, cache: Path, size_gb: float, rank: int, steps: int
) -> subprocess.Popen[str]:
    words = [f"{server.url}/", str(cache), str(size_gb), str(rank), str(steps)]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", READER, *words], stdout=subprocess.PIPE, text=True
    )


def digest_of(folder: Path, rank: int, steps: int) -> str:
    """What a rank reads, from the local shards by the order itself."""
    digest = hashlib.sha256()
    with ShardSet.open(str(folder)) as shards:
        windows = shards.windows(2)
        for step in range(steps):
            epoch, batch = divmod(step, 8)
            start = batch * 12 + rank * 4
            for data in shards.read(epoch_order(1, epoch, 96, windows)[start : start + 4]):
                digest.update(data)
    return digest.hexdigest()


def test_a_killed_process_costs_the_others_nothing(many, tmp_path):
    folder, steps = tmp_path / "cache", 24
    largest = max(path.stat().st_size for path in many.glob("*.tar"))
    size_gb = (4.5 * largest) / 1e9  # of 8
    with FaultServer(many) as server:
        server.pause = 0.02  # 64 kB take so long: a shard is on its way for about 60 ms
        for path in many.glob("*.tar"):
            server.script[path.name] = [drop(50_000), drop(70_000)]
        processes = [start(server, folder, size_gb, rank, steps) for rank in range(3)]
        cache, most, until, killed = None, 0, time.monotonic() + 200, False
        while any(process.poll() is None for process in processes):
            assert time.monotonic() < until
            if cache is None and folder.exists():
                cache = ShardCache(folder, int(size_gb * 1e9))
            if cache is not None:
                most = max(most, cache.size())
                if not killed and any(size > 30_000 for size in sizes_of_parts(folder)):
                    processes[2].send_signal(signal.SIGKILL)
                    killed = True
            time.sleep(0.002)
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert killed
        assert [process.returncode for process in processes] == [0, 0, -signal.SIGKILL]
        assert [json.loads(output) for output in outputs[:2]] == [
            digest_of(many, rank, steps) for rank in range(2)
        ]
        assert largest < most <= size_gb * 1e9
        # Whoever comes next goes on with what the dead one left.
        last = start(server, folder, size_gb, 2, steps)
        assert json.loads(last.communicate(timeout=120)[0]) == digest_of(many, 2, steps)


def sizes_of_parts(folder: Path) -> list[int]:
    """Of the transfers under way, which may end at any moment."""
    sizes = []
    for path in folder.glob("*.part"):
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return sizes
