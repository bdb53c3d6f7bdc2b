"""Shards in an order of their own, and a true shuffle within a window of them: an order that a
small cache can follow.

An epoch visits the shards in a shuffled order, cut into windows of (nearly) equal numbers of
shards; inside a window all samples of its shards are shuffled together. One window over all shards
is the shuffle of the whole set, bit for bit. Everything is a pure function of (seed, epoch, shard
boundaries, window), the same on every rank and after a restart.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.sampling.philox import shuffle_words

SHARD_TAG = 0x7368617264  # "shard": second word of the Philox key for the order of the shards
DEFAULT_WINDOW = 64


@dataclass(frozen=True, slots=True, eq=False)
class ShardWindows:
    """How a set is cut into shards, and how many of these are shuffled together.

    Compared and hashed by identity, so that an order can be kept for each object without looking at
    its numbers.
    """

    first: NDArray[np.int64]
    """[shards + 1]: shard s holds the samples first[s] to first[s + 1] - 1."""
    window: int
    """Shards shuffled together at most; 0: all of them."""

    @property
    def digest(self) -> str:
        """What the order depends on beside seed and content: SHA-256 (hex) of window and
        boundaries; empty: whole set."""
        if self.count == 1:
            return ""
        return hashlib.sha256(
            np.array([self.window, *self.first], dtype="<i8").tobytes()
        ).hexdigest()

    @property
    def shards(self) -> int:
        """Shards of the set."""
        return len(self.first) - 1

    @property
    def count(self) -> int:
        """Windows of an epoch: as few as `window` allows, so that none is much smaller than the
        others."""
        return -(-self.shards // self.window) if 0 < self.window < self.shards else 1

    def shard_order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """[shards] int64: the shards in the order in which an epoch visits them."""
        words = shuffle_words(seed, SHARD_TAG, epoch, self.shards)
        return np.argsort(words, kind="stable").astype(np.int64, copy=False)

    def shards_of(self, seed: int, epoch: int, window: int) -> NDArray[np.int64]:
        """The shards of one window of an epoch, in the order of their visit."""
        visit = _visit_of(self, seed, epoch)
        return visit.shards[visit.cuts[window] : visit.cuts[window + 1]]

    def windows_of_epoch(self, seed: int, epoch: int) -> list[NDArray[np.int64]]:
        """The shards of each window of an epoch, in the order of their visit."""
        return [self.shards_of(seed, epoch, window) for window in range(self.count)]

    def bounds(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """[count + 1] int64, read-only: window w holds the positions bounds[w] to bounds[w + 1] - 1
        of an epoch's order."""
        return _visit_of(self, seed, epoch).bounds

    def samples(
        self, seed: int, epoch: int, window: int, numbers: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The samples that have some numbers within a window, which counts those of its shards in
        the order of the set."""
        if self.count == 1:
            return numbers
        first, ends = _numbers_of(self, seed, epoch, window)
        shard = np.searchsorted(ends, numbers, side="right")
        return numbers + first[shard]

    def ahead(
        self, seed: int, epoch: int, window: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The shards of a window of an epoch, and those of the window after it, which may begin the
        next epoch."""
        after = (
            self.shards_of(seed, epoch, window + 1)
            if window + 1 < self.count
            else self.shards_of(seed, epoch + 1, 0)
        )
        return self.shards_of(seed, epoch, window), after


class _Visit(NamedTuple):
    """How an epoch visits the shards: of 40,000 shards, kept because every step asks."""

    shards: NDArray[np.int64]
    """[shards]: in the order of their visit."""
    cuts: NDArray[np.int64]
    """[windows + 1]: window w visits shards[cuts[w]:cuts[w + 1]]."""
    bounds: NDArray[np.int64]
    """[windows + 1]: positions, see `ShardWindows.bounds`."""


@lru_cache(maxsize=4)
def _visit_of(windows: ShardWindows, seed: int, epoch: int) -> _Visit:
    order = windows.shard_order(seed, epoch)
    cuts = np.arange(windows.count + 1, dtype=np.int64) * windows.shards // windows.count
    samples = np.concatenate([[0], np.cumsum(np.diff(windows.first)[order])])
    visit = _Visit(order, cuts, samples.astype(np.int64, copy=False)[cuts])
    for numbers in visit:
        numbers.flags.writeable = False
    return visit


@lru_cache(maxsize=16)
def _numbers_of(
    windows: ShardWindows, seed: int, epoch: int, window: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each shard of a window, in the order of the set: what to add to a number within the
    window to get a sample, and the number after its last."""
    shards = np.sort(windows.shards_of(seed, epoch, window))
    sizes = windows.first[shards + 1] - windows.first[shards]
    ends = np.cumsum(sizes)
    return windows.first[shards] - (ends - sizes), ends


def default_window(shard_bytes: int, cache_bytes: int) -> int:
    """The default window of a remote set: half of the cache, as the other half is for the next
    window.

    A function of the set and the configuration alone, not of this machine's disk: all ranks must
    agree.

    Args:
        shard_bytes: size of the largest shard.
        cache_bytes: size of the shard cache by configuration.
    """
    return max(1, min(DEFAULT_WINDOW, cache_bytes // 2 // max(1, shard_bytes)))
