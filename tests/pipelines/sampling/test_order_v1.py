"""Version 1 of the order: runs that began with it go on in it, bit for bit, and packing keeps its
bytes."""

from __future__ import annotations

import numpy as np
import pytest

from fastmoco_pipelines.sampling.order import epoch_order, rank_slice, steps_per_epoch
from fastmoco_pipelines.sampling.order_v1 import shuffled
from fastmoco_pipelines.sampling.window import ShardWindows

PINNED = [3, 4, 9, 2, 1, 5, 0, 6, 8, 7]


def test_it_is_pinned():
    """Raw Philox words and a stable sort, as it was before there were versions."""
    assert epoch_order(0, 0, 10, version=1).tolist() == shuffled(0, 10).tolist() == PINNED
    words = np.random.Philox(key=[0, 0x6F72646572], counter=[0, 0, 0, 0]).random_raw(10)
    assert sorted(range(10), key=lambda i: int(words[i])) == PINNED
    windows = ShardWindows(first=np.array([0, 3, 6, 8, 10]), window=2)
    assert epoch_order(0, 0, 10, windows, 1).tolist() == [9, 6, 8, 7, 3, 4, 2, 1, 5, 0]


@pytest.mark.parametrize("window", [0, 2])
def test_steps_are_slices_of_the_sorted_words(window):
    count, batch = 1000, 24
    windows = ShardWindows(first=np.arange(0, 1001, 100), window=window)
    steps = steps_per_epoch(count, batch)
    for step in (0, 1, steps - 1, steps, 3 * steps + 7):
        epoch, place = divmod(step, steps)
        words = np.random.Philox(key=[9, 0x6F72646572], counter=[0, 0, epoch, 0]).random_raw(count)
        parts = windows.windows_of_epoch(9, epoch)
        order = []
        for part in parts:
            inside = np.flatnonzero(np.isin(np.arange(count) // 100, part))
            order.extend(sorted(inside.tolist(), key=lambda i: int(words[i])))
        for rank in range(3):
            _, ids = rank_slice(
                step,
                seed=9,
                count=count,
                global_batch_size=batch,
                rank=rank,
                world_size=3,
                windows=windows,
                version=1,
            )
            assert ids.tolist() == order[place * batch + 8 * rank :][:8]


def test_a_seed_outside_its_range_is_refused():
    with pytest.raises(ValueError, match="seed=-1"):
        shuffled(-1, 10)
