"""The order: pure, a permutation, a true shuffle, the same for every number of ranks."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fastmoco_pipelines.sampling.order import (
    epoch_order,
    local_batch_size,
    rank_slice,
    samples_at,
    steps_per_epoch,
)
from fastmoco_pipelines.sampling.permutation import BLOCK, keyed_permutation
from fastmoco_pipelines.sampling.window import ShardWindows


def test_order_is_pinned():
    """These numbers must be the same on every machine and version of numpy."""
    assert epoch_order(0, 0, 10).tolist() == [9, 2, 1, 4, 6, 5, 7, 8, 3, 0]
    permutation = keyed_permutation(3, 5, 0, 1437)
    assert np.array_equal(epoch_order(3, 5, 1437), permutation.at(np.arange(1437)))


@pytest.mark.parametrize("count", [0, 1, 2, 255, 10_000])
def test_order_is_a_permutation_of_its_own(count):
    orders = [epoch_order(seed, epoch, count) for seed in (0, 1, 2**63 - 1) for epoch in (0, 1, 7)]
    for order in orders:
        assert order.dtype == np.int64
        assert np.array_equal(np.sort(order), np.arange(count))
    if count > 10:
        assert len({order.tobytes() for order in orders}) == len(orders)


def test_shuffle_reaches_everywhere():
    """A perfect shuffle moves a sample by a third of the set on average; a buffer's shuffle by far
    less."""
    count = 20_000
    moved = np.abs(epoch_order(3, 5, count) - np.arange(count)).mean()
    assert abs(moved / count - 1 / 3) < 0.01
    first_places = np.concatenate([epoch_order(0, epoch, 10)[:1] for epoch in range(2000)])
    chi_square = ((np.bincount(first_places, minlength=10) - 200) ** 2 / 200).sum()
    assert chi_square < 27.9  # 99.9 % of 9 degrees of freedom


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_ranks_share_each_global_batch(world_size):
    options = {"seed": 5, "count": 103, "global_batch_size": 24}
    for step in range(10):
        whole = rank_slice(step, rank=0, world_size=1, **options)
        parts = [
            rank_slice(step, rank=rank, world_size=world_size, **options)
            for rank in range(world_size)
        ]
        assert {epoch for epoch, _ in parts} == {whole[0]}
        assert {len(ids) for _, ids in parts} == {24 // world_size}
        assert np.array_equal(np.concatenate([ids for _, ids in parts]), whole[1])


def test_an_epoch_shows_every_sample_once_but_the_ragged_rest():
    steps = steps_per_epoch(103, 24)
    assert steps == 4
    for epoch in range(3):
        seen = [
            rank_slice(
                epoch * steps + i, seed=1, count=103, global_batch_size=24, rank=0, world_size=1
            )
            for i in range(4)
        ]
        assert {e for e, _ in seen} == {epoch}
        ids = np.concatenate([ids for _, ids in seen])
        assert np.array_equal(ids, epoch_order(1, epoch, 103)[:96])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"world_size": 5}, "multiple of world_size=5"),
        ({"world_size": 0}, "at least one rank"),
        ({"rank": 2}, "rank=2"),
        ({"rank": -1}, "rank=-1"),
        ({"step": -1}, "step=-1"),
        ({"count": 23}, "whole set of 23 samples"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_slices_are_refused(change, words):
    options = {
        "step": 0,
        "seed": 0,
        "count": 100,
        "global_batch_size": 24,
        "rank": 0,
        "world_size": 2,
    } | change
    with pytest.raises(ValueError, match=words):
        rank_slice(options.pop("step"), **options)


def test_slices_cannot_be_written_into_the_cached_order():
    _, ids = rank_slice(0, seed=0, count=100, global_batch_size=10, rank=0, world_size=1)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 5
    assert local_batch_size(4096, 8) == 512


@pytest.mark.parametrize("version", [1, 2])
def test_any_positions_are_those_of_the_whole_order(version):
    first = np.array([0, 40, 41, 90, 160, 200])
    for windows in (None, ShardWindows(first=first, window=0), ShardWindows(first=first, window=2)):
        options = {"seed": 3, "epoch": 4, "count": 200, "windows": windows, "version": version}
        order = epoch_order(3, 4, 200, windows, version)
        positions = np.random.default_rng(0).integers(0, 200, (7, 11))
        assert np.array_equal(samples_at(positions, **options), order[positions])
        assert samples_at(np.empty((0, 3), dtype=np.int64), **options).shape == (0, 3)
        for wrong in ([-1], [200], [5, 300]):
            with pytest.raises(ValueError, match=r"positions=.*count=200"):
                samples_at(np.array(wrong), **options)


@pytest.mark.parametrize("batch", [1, 3, 64, 5000, 20_000])
def test_batches_computed_together_are_the_same(batch):
    """Small batches are computed some steps at a time, on each rank for itself."""
    count = 40_000
    steps = min(steps_per_epoch(count, batch), 2 * BLOCK // batch + 3)
    order = epoch_order(2, 1, count)
    begin = steps_per_epoch(count, batch)
    for step in {0, 1, steps // 2, steps - 1, begin - 1}:
        _, ids = rank_slice(
            begin + step, seed=2, count=count, global_batch_size=batch, rank=0, world_size=1
        )
        assert np.array_equal(ids, order[step * batch :][:batch])


def test_a_billion_images_cost_their_batch():
    """Also at step 10**7, and for a position that stands in; peak memory in bytes."""
    options = {"seed": 11, "count": 10**9, "global_batch_size": 4096, "world_size": 8}
    tracemalloc.start()
    found = [rank_slice(step, rank=rank, **options) for step in (0, 10**7) for rank in (0, 7)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [epoch for epoch, _ in found] == [0, 0, 40, 40]
    assert peak < 2e6
    start = 10**7 % (10**9 // 4096) * 4096 + 7 * 512
    wanted = keyed_permutation(11, 40, 0, 10**9).at(np.arange(start, start + 512))
    assert np.array_equal(found[3][1], wanted)


def test_an_unknown_version_is_refused():
    with pytest.raises(ValueError, match=r"order_version=3: must be one of 1, 2; a later version"):
        epoch_order(0, 0, 10, version=3)
    with pytest.raises(ValueError, match="order_version=0"):
        rank_slice(0, seed=0, count=10, global_batch_size=5, rank=0, world_size=1, version=0)
