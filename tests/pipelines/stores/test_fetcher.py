"""What is fetched ahead, and how often the cache is asked for it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from fastmoco_pipelines.sampling.window import ShardWindows
from fastmoco_pipelines.stores import fetcher
from fastmoco_pipelines.stores.retries import Limits


class FullCache:
    """Holds every shard, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def holds(self, key: str) -> bool:
        self.asked += 1
        return True


def test_steps_within_a_window_do_not_look_at_every_shard(monkeypatch):
    """40,000 shards, in windows of 100: the cache is asked where a window begins, after the pause
    between two looks, and when other shards were wanted in between."""
    now = [100.0]
    monkeypatch.setattr(fetcher.time, "monotonic", lambda: now[0])
    shards = [SimpleNamespace(key=str(number)) for number in range(40_000)]
    cache = FullCache()
    fetch = fetcher.ShardFetcher(shards, cache, Limits())
    windows = ShardWindows(first=np.arange(40_001) * 1000, window=100)

    def asked(position: int) -> int:
        before = cache.asked
        followed = fetch.follow(windows, seed=1, epoch=0, position=position)
        number = position // 100_000
        assert followed == set(windows.shards_of(1, 0, number).tolist())
        return cache.asked - before

    assert [asked(position) for position in (0, 64, 128, 99_999)] == [200, 0, 0, 0]
    assert [asked(position) for position in (100_000, 100_064)] == [200, 0]
    now[0] += 1.5
    assert [asked(position) for position in (100_128, 100_192)] == [200, 0]
    fetch.want([5])
    assert [asked(position) for position in (100_128, 100_192)] == [200, 0]
    fetch.close()
    assert asked(100_256) == 200
