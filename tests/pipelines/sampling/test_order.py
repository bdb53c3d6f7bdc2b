"""The order: pure, a permutation, a true shuffle, the same for every number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from fastmoco_pipelines.sampling.order import (
    epoch_order,
    local_batch_size,
    rank_slice,
    steps_per_epoch,
)

PINNED = [3, 4, 9, 2, 1, 5, 0, 6, 8, 7]


def test_order_is_pinned():
    """Raw Philox words and a stable sort: these numbers must be the same on every machine and
    version of numpy."""
    assert epoch_order(0, 0, 10).tolist() == PINNED
    words = np.random.Philox(key=[0, 0x6F72646572], counter=[0, 0, 0, 0]).random_raw(10)
    assert sorted(range(10), key=lambda i: int(words[i])) == PINNED


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
