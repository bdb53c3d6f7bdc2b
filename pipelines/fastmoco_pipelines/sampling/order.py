"""Which sample comes when: a pure function of (seed, epoch, set), so that the step alone is the
state of the data.

The order of an epoch is a true shuffle of the whole set: the stable argsort of raw 64-bit words of
Philox 4x64-10 (Salmon et al. 2011). Raw words and a stable sort are the same under every version of
numpy; `Generator.permutation` is not promised to be. A set that is too large for the cache is
shuffled within windows of shards instead (window.py). Global batch b is the order's slice b, rank
r's part a contiguous slice of that: the samples of a step do not depend on the number of ranks. The
ragged rest of an epoch is left out, on all ranks alike.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.sampling.order_v1 import whole_order
from fastmoco_pipelines.sampling.window import ShardWindows
from fastmoco_pipelines.spec import require


def epoch_order(
    seed: int, epoch: int, count: int, windows: ShardWindows | None = None
) -> NDArray[np.int64]:
    """A permutation of 0..count-1, different for every (seed, epoch).

    Args:
        seed: 0 to 2**63 - 1.
        epoch: from 0.
        count: samples of the set.
        windows: shuffle within windows of shards; None, or one window over all shards, shuffles the
            whole set.

    Returns:
        [count] int64.
    """
    require(0 <= seed < 2**63, "seed", seed, "needs a whole number from 0 to 2**63 - 1")
    require(epoch >= 0, "epoch", epoch, "epochs count from 0")
    require(count >= 0, "count", count, "a set has no fewer than 0 samples")
    if windows is not None:
        require(
            int(windows.first[-1]) == count,
            "count",
            count,
            f"the shards hold {windows.first[-1]} samples",
        )
    return whole_order(seed, epoch, count, windows)


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
) -> tuple[int, NDArray[np.int64]]:
    """The epoch of a step and the samples of one rank in it.

    Returns:
        (epoch, ids): ids is [local_batch_size] int64, read-only.

    Raises:
        ValueError: for a step below 0, a rank outside the world, a batch that the ranks cannot
            share or that is larger than the set.
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
    start = batch * global_batch_size + rank * local
    return epoch, epoch_order(seed, epoch, count, windows)[start : start + local]
