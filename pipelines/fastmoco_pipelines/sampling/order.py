"""Which sample comes when: a pure function of (seed, epoch, set), so that the step alone is the
state of the data.

The order of an epoch is a true shuffle of the whole set, a keyed permutation (permutation.py) whose
values are computed when they are needed: any step of any epoch costs time and memory for its own
batch alone, with a billion images too. A set that is too large for the cache is shuffled within
windows of shards instead (window.py), by a permutation for each. Global batch b is the order's
slice b, rank r's part a contiguous slice of that: the samples of a step do not depend on the number
of ranks. The ragged rest of an epoch is left out, on all ranks alike.

The order has a version, which a run keeps from its first step to its last. Version 1 sorts
(order_v1.py).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.sampling.order_v1 import whole_order
from fastmoco_pipelines.sampling.permutation import BLOCK, MOST, keyed_permutation
from fastmoco_pipelines.sampling.window import ShardWindows
from fastmoco_pipelines.spec import require

ORDER_VERSION = 2
"""Of new runs."""
ORDER_VERSIONS = (1, 2)
_WINDOWS = 4  # that steps computed together may span


def samples_at(
    positions: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
    count: int,
    windows: ShardWindows | None = None,
    version: int = ORDER_VERSION,
) -> NDArray[np.int64]:
    """The samples at some positions of an epoch's order.

    Args:
        positions: integers of any shape, each in [0, count).
        seed: 0 to 2**63 - 1.
        epoch: from 0.
        count: samples of the set.
        windows: shuffle within windows of shards; None, or one window over all shards, shuffles the
            whole set.
        version: of the order.

    Returns:
        int64, of the shape of `positions`.

    Raises:
        ValueError: for a number outside its range, an unknown version, or shards that do not hold
            `count` samples.

    Cost: O(len(positions)), 0.2 ms for each window that they touch, and O(shards) once an epoch.
    Version 1: O(count) once an epoch.
    """
    _require_order(seed, epoch, count, windows, version)
    if positions.size == 0:
        return np.empty(positions.shape, dtype=np.int64)
    low, high = int(positions.min()), int(positions.max())
    require(0 <= low <= high < count, "positions", (low, high), f"must lie in [0, count={count})")
    if version == 1:
        return whole_order(seed, epoch, count, windows)[positions]
    if windows is None or windows.count == 1:
        return keyed_permutation(seed, epoch, 0, count).at(positions)

    # Window by window: the permutation of each has a key of its own.
    flat = positions.reshape(-1)
    bounds = windows.bounds(seed, epoch)
    window = np.searchsorted(bounds, flat, side="right") - 1
    by_window = np.argsort(window, kind="stable")
    starts = np.flatnonzero(np.diff(window[by_window], prepend=-1))
    samples = np.empty(len(flat), dtype=np.int64)
    for places in np.split(by_window, starts[1:]):
        number = int(window[places[0]])
        start, end = int(bounds[number]), int(bounds[number + 1])
        numbers = keyed_permutation(seed, epoch, number, end - start).at(flat[places] - start)
        samples[places] = windows.samples(seed, epoch, number, numbers)
    return samples.reshape(positions.shape)


def epoch_order(
    seed: int,
    epoch: int,
    count: int,
    windows: ShardWindows | None = None,
    version: int = ORDER_VERSION,
) -> NDArray[np.int64]:
    """A permutation of 0..count-1, different for every (seed, epoch): `samples_at` all positions,
    for which it takes 8 bytes a sample.

    Returns:
        [count] int64.
    """
    _require_order(seed, epoch, count, windows, version)
    positions = np.arange(count, dtype=np.int64)
    return samples_at(
        positions, seed=seed, epoch=epoch, count=count, windows=windows, version=version
    )


def _require_order(
    seed: int, epoch: int, count: int, windows: ShardWindows | None, version: int
) -> None:
    require(0 <= seed < 2**63, "seed", seed, "needs a whole number from 0 to 2**63 - 1")
    require(epoch >= 0, "epoch", epoch, "epochs count from 0")
    require(0 <= count <= MOST, "count", count, "a set has 0 to 2**62 samples")
    if windows is not None:
        held = int(windows.first[-1])
        require(held == count, "count", count, f"the shards hold {held} samples")
    known = ", ".join(map(str, ORDER_VERSIONS))
    require(
        version in ORDER_VERSIONS,
        "order_version",
        version,
        f"must be one of {known}; a later version of fastmoco may know it",
    )


def steps_per_epoch(count: int, global_batch_size: int) -> int:
    """Full global batches in one epoch; the ragged rest is left out."""
    return count // global_batch_size


def local_batch_size(global_batch_size: int, world_size: int) -> int:
    """Images of one step on one rank.

    Raises:
        ValueError: if the ranks cannot share the batch equally.
    """
    require(world_size >= 1, "world_size", world_size, "needs at least one rank")
    rule = f"must be a multiple of world_size={world_size}, so that every rank gets an equal part"
    require(global_batch_size % world_size == 0, "global_batch_size", global_batch_size, rule)
    return global_batch_size // world_size


def rank_slice(
    step: int,
    *,
    seed: int,
    count: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
    windows: ShardWindows | None = None,
    version: int = ORDER_VERSION,
) -> tuple[int, NDArray[np.int64]]:
    """The epoch of a step and the samples of one rank in it.

    Returns:
        (epoch, ids): ids is [local_batch_size] int64, read-only.

    Raises:
        ValueError: for a step below 0, a rank outside the world, a batch that the ranks cannot
            share or that is larger than the set, or an unknown version of the order.
    """
    local = local_batch_size(global_batch_size, world_size)
    require(0 <= rank < world_size, "rank", rank, f"must lie in [0, world_size={world_size})")
    require(step >= 0, "step", step, "steps count from 0")
    steps = steps_per_epoch(count, global_batch_size)
    require(
        steps > 0,
        "global_batch_size",
        global_batch_size,
        f"is larger than the whole set of {count} samples; lower it",
    )
    epoch, batch = divmod(step, steps)

    # Small batches are computed some steps at a time, so that calls of numpy cost each step little;
    # but over a few windows at most, because each has calls of its own.
    together = BLOCK // local
    if windows is not None:
        together = min(together, _WINDOWS * count // (windows.count * global_batch_size))
    together = max(1, together)
    group, row = divmod(batch, together)
    first = group * together
    ids = _ids_of_steps(
        (first, min(first + together, steps)),
        (global_batch_size, rank * local, local),
        (seed, epoch, count, windows, version),
    )
    return epoch, ids[row]


@lru_cache(maxsize=4)
def _ids_of_steps(
    batches: tuple[int, int],
    part: tuple[int, int, int],
    order: tuple[int, int, int, ShardWindows | None, int],
) -> NDArray[np.int64]:
    """[batches, local] int64, read-only: one rank's samples in consecutive batches of an epoch.

    Args:
        batches: the first, and the one after the last.
        part: (global batch, where in it the rank's part begins, its length).
        order: (seed, epoch, count, windows, version).
    """
    global_batch, start, local = part
    seed, epoch, count, windows, version = order
    starts = np.arange(*batches, dtype=np.int64) * global_batch + start
    positions = starts[:, None] + np.arange(local, dtype=np.int64)
    ids = samples_at(
        positions, seed=seed, epoch=epoch, count=count, windows=windows, version=version
    )
    ids.flags.writeable = False
    return ids
