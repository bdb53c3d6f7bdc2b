"""The order within windows of shards: pure, complete, the same for every number of ranks, and a
true shuffle inside."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fastmoco_pipelines.sampling.order import epoch_order, rank_slice, steps_per_epoch
from fastmoco_pipelines.sampling.permutation import keyed_permutation
from fastmoco_pipelines.sampling.stand_ins import Plan
from fastmoco_pipelines.sampling.window import ShardWindows, default_window

SIZES = [7, 1, 12, 30, 5, 5, 9, 40, 3, 11, 2, 8]


def windows_of(sizes: list[int], window: int) -> ShardWindows:
    return ShardWindows(
        first=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), window=window
    )


@pytest.mark.parametrize("window", [0, len(SIZES), len(SIZES) + 5])
def test_one_window_is_the_shuffle_of_the_whole_set(window):
    count = sum(SIZES)
    for epoch in range(3):
        assert np.array_equal(
            epoch_order(5, epoch, count, windows_of(SIZES, window)), epoch_order(5, epoch, count)
        )
    assert windows_of(SIZES, window).digest == ""


def test_order_is_pinned():
    order = epoch_order(0, 0, 10, windows_of([3, 3, 2, 2], 2))
    assert order.tolist() == [9, 8, 6, 7, 1, 2, 3, 0, 4, 5]


def test_each_window_is_permuted_by_its_own_key():
    """Numbers within a window count the samples of its shards in the order of the set."""
    windows, count = windows_of(SIZES, 3), sum(SIZES)
    order, bounds = epoch_order(3, 1, count, windows), windows.bounds(3, 1)
    for number, shards in enumerate(windows.windows_of_epoch(3, 1)):
        first = windows.first
        samples = np.concatenate([np.arange(first[s], first[s + 1]) for s in np.sort(shards)])
        permutation = keyed_permutation(3, 1, number, len(samples))
        wanted = samples[permutation.at(np.arange(len(samples)))]
        assert np.array_equal(order[bounds[number] : bounds[number + 1]], wanted)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 11])
def test_every_sample_comes_once_in_the_window_of_its_shard(window):
    windows, count = windows_of(SIZES, window), sum(SIZES)
    shard_of = np.repeat(np.arange(len(SIZES)), SIZES)
    orders = set()
    for epoch in range(4):
        order = epoch_order(3, epoch, count, windows)
        orders.add(order.tobytes())
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(count))
        bounds, parts = windows.bounds(3, epoch), windows.windows_of_epoch(3, epoch)
        assert sorted(np.concatenate(parts).tolist()) == list(range(len(SIZES)))
        assert {len(part) for part in parts} <= {
            len(SIZES) // len(parts),
            len(SIZES) // len(parts) + 1,
        }
        assert max(len(part) for part in parts) <= window
        for low, high, part in zip(bounds[:-1], bounds[1:], parts, strict=True):
            assert set(shard_of[order[low:high]]) == set(part.tolist())
    assert len(orders) == 4


def test_the_order_of_shards_is_a_permutation_by_seed_and_epoch_alone():
    """With the same order every epoch a window would always hold the same shards."""
    count = len(SIZES)
    orders = {}
    for seed in (0, 3, 2**63 - 1):
        for epoch in range(6):
            order = windows_of(SIZES, 3).shard_order(seed, epoch)
            assert order.dtype == np.int64
            assert sorted(order.tolist()) == list(range(count))
            # Neither the window nor the sizes of the shards have a part in it.
            assert np.array_equal(windows_of(SIZES[::-1], 5).shard_order(seed, epoch), order)
            orders[seed, epoch] = tuple(order.tolist())
    assert len(set(orders.values())) == len(orders)

    # Over epochs each shard comes first about as often, and no two epochs put the same shards
    # together.
    windows = windows_of(SIZES, 3)
    first = np.bincount(
        [windows.shard_order(1, epoch)[0] for epoch in range(1200)], minlength=count
    )
    assert first.min() > 60  # 100 expected, with a deviation of 9.6
    together = {
        tuple(sorted(windows.windows_of_epoch(3, epoch)[0].tolist())) for epoch in range(20)
    }
    assert len(together) > 10


def test_the_order_of_shards_is_pinned():
    """A run resumed with a later version must visit the same shards: these numbers never change."""
    windows = windows_of(SIZES, 3)
    assert windows.shard_order(7, 1).tolist() == [11, 9, 6, 7, 2, 1, 3, 4, 5, 8, 10, 0]
    for epoch in range(3):
        words = np.random.Philox(key=[7, 0x7368617264], counter=[0, 0, epoch, 0]).random_raw(12)
        by_word = sorted(range(12), key=lambda shard: int(words[shard]))
        assert windows.shard_order(7, epoch).tolist() == by_word


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_share_each_global_batch(world_size):
    options = {
        "seed": 5,
        "count": sum(SIZES),
        "global_batch_size": 16,
        "windows": windows_of(SIZES, 3),
    }
    steps = steps_per_epoch(sum(SIZES), 16)
    for step in range(2 * steps):
        epoch, whole = rank_slice(step, rank=0, world_size=1, **options)
        parts = [
            rank_slice(step, rank=rank, world_size=world_size, **options)
            for rank in range(world_size)
        ]
        assert np.array_equal(np.concatenate([ids for _, ids in parts]), whole)
        order = epoch_order(
            5, epoch, sum(SIZES), windows_of(SIZES, 3)
        )  # built again, as after a restart
        assert np.array_equal(whole, order[step % steps * 16 :][:16])


def test_inside_a_window_the_shuffle_is_a_true_one():
    """Mean displacement a third of the window, and no trace of the shards: neighbours are of one
    shard as often as chance."""
    sizes = [1000] * 32
    windows = windows_of(sizes, 8)
    order = epoch_order(1, 0, 32_000, windows)
    parts = windows.windows_of_epoch(1, 0)
    inside = np.concatenate([np.arange(1000) + 1000 * shard for shard in np.sort(parts[0])])
    rank = np.searchsorted(inside, order[:8000])
    assert abs(np.abs(rank - np.arange(8000)).mean() / 8000 - 1 / 3) < 0.01
    shard = order // 1000
    assert abs((shard[1:] == shard[:-1]).mean() - 1 / 8) < 0.01


def test_shards_ahead_go_on_into_the_next_epoch():
    windows = windows_of(SIZES, 5)
    assert windows.count == 3
    first, second, third = windows.windows_of_epoch(9, 4)
    assert [part.tolist() for part in windows.ahead(9, 4, 0)] == [first.tolist(), second.tolist()]
    now, after = windows.ahead(9, 4, 2)
    assert (now.tolist(), after.tolist()) == (
        third.tolist(),
        windows.windows_of_epoch(9, 5)[0].tolist(),
    )


def test_the_default_window_is_half_of_the_cache():
    assert default_window(shard_bytes=10**9, cache_bytes=100 * 10**9) == 50
    assert default_window(shard_bytes=10**8, cache_bytes=100 * 10**9) == 64
    assert default_window(shard_bytes=10**12, cache_bytes=10**9) == 1


def test_the_digest_tells_windows_and_boundaries_apart():
    digests = [
        windows_of(SIZES, 3).digest,
        windows_of(SIZES, 4).digest,
        windows_of(SIZES[::-1], 3).digest,
    ]
    assert len(set(digests)) == 3
    assert windows_of(SIZES, 3).digest == digests[0]


def test_shards_without_samples_are_passed_over():
    windows = windows_of([0, 4, 0, 0, 6, 0, 3, 0], 2)
    for epoch in range(5):
        assert sorted(epoch_order(1, epoch, 13, windows).tolist()) == list(range(13))


@pytest.mark.parametrize("window", [1, 64, 20_000])
def test_forty_thousand_shards_are_looked_at_once_an_epoch(window, monkeypatch):
    """A billion images: steps, stand-ins and what is fetched ahead share the order of the
    shards."""
    asked = []
    of_shards = ShardWindows.shard_order
    monkeypatch.setattr(
        ShardWindows,
        "shard_order",
        lambda self, seed, epoch: asked.append(epoch) or of_shards(self, seed, epoch),
    )
    windows = windows_of([25_000] * 40_000, window)
    plan = Plan(seed=4, windows=windows, global_batch_size=4096, rank=3, world_size=64)
    tracemalloc.start()
    for step in range(100_000, 100_040):
        places = plan.places(step)
        plan.advance(places, 5)
        number = int(np.searchsorted(windows.bounds(4, 0), places.first, side="right")) - 1
        shards, _ = windows.ahead(4, 0, number)
        plain = [i for row, i in enumerate(places.ids.tolist()) if row != 5]
        if places.batch_start + 4096 <= windows.bounds(4, 0)[number + 1]:
            assert np.isin(np.array(plain) // 25_000, shards).all()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert asked == [0]
    assert peak < 10e6


def test_one_window_over_forty_thousand_shards_needs_no_shard():
    windows = windows_of([25_000] * 40_000, 0)
    options = {"seed": 1, "count": 10**9, "global_batch_size": 512, "rank": 0, "world_size": 1}
    assert np.array_equal(rank_slice(7, windows=windows, **options)[1], rank_slice(7, **options)[1])
