"""Version 1 of the order: the stable argsort of one Philox word a sample.

Runs that began with it keep it, bit for bit, and sets are packed in it, so that the same images
give the same bytes. It costs O(n) memory and O(n log n) time an epoch: 25 s and 2 GB for 100
million samples. New runs use version 2 (order.py).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.sampling.philox import shuffle_words
from fastmoco_pipelines.sampling.window import ShardWindows
from fastmoco_pipelines.spec import require

# "order": second word of the Philox key, so that no augmentation draw shares a stream with it
ORDER_TAG = 0x6F72646572


def shuffled(seed: int, count: int, epoch: int = 0) -> NDArray[np.int64]:
    """[count] int64: 0..count-1, shuffled.

    Raises:
        ValueError: for a seed outside 0 to 2**63 - 1.
    """
    require(0 <= seed < 2**63, "seed", seed, "needs a whole number from 0 to 2**63 - 1")
    words = shuffle_words(seed, ORDER_TAG, epoch, count)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)


@lru_cache(maxsize=2)
def whole_order(
    seed: int, epoch: int, count: int, windows: ShardWindows | None
) -> NDArray[np.int64]:
    """[count] int64, read-only: the order of an epoch, kept because sorting takes longer than a
    step."""
    if windows is None or windows.count == 1:
        order = shuffled(seed, count, epoch)
    else:
        # The same words, sorted window by window: every sample keeps its rank among those of its
        # window.
        words = shuffle_words(seed, ORDER_TAG, epoch, count)
        order = np.lexsort((words, _window_of_samples(windows, seed, epoch)))
        order = order.astype(np.int64, copy=False)
    order.flags.writeable = False
    return order


def _window_of_samples(windows: ShardWindows, seed: int, epoch: int) -> NDArray[np.int32]:
    """[count] int32: in which window of an epoch each sample comes."""
    window_of_shard = np.empty(windows.shards, dtype=np.int32)
    for number, shards in enumerate(windows.windows_of_epoch(seed, epoch)):
        window_of_shard[shards] = number
    return np.repeat(window_of_shard, np.diff(windows.first))
