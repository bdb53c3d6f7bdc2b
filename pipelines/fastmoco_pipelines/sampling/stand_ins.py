"""Which sample stands in for one that cannot be delivered: a pure function of its position.

Whether a sample can be delivered depends on its bytes alone. So "the first good one of a fixed
sequence of candidates" is the same sample for every number of ranks, after every restart, and
whether a fault was known from the start or just found: ranks need not exchange anything. The
sequence of a place is drawn by Philox 4x64-10 with key (seed, tag) and counter words (attempt,
position in the epoch, epoch, 0), uniformly from the order of the epoch: from the same window of
shards, which is in the cache, and not from the same global batch, where the image would become a
negative of itself. A window whose shards are all lost has no candidate: those beyond number
`WINDOW_ATTEMPTS` come from the whole epoch.

The stand-in is cut by the draws of (epoch, its own number, view, place); see `draw_views`. Two
places may draw the same stand-in; their views of it then differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.sampling.order import (
    ORDER_VERSION,
    rank_slice,
    samples_at,
    steps_per_epoch,
)
from fastmoco_pipelines.sampling.philox import philox_words
from fastmoco_pipelines.sampling.window import ShardWindows

REFILL_TAG = 0x726566696C6C
"""\"refill\": second word of the Philox key, so that no other use of the seed shares a stream with
it."""

WINDOW_ATTEMPTS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which samples belong where in a run: all that the places of a step are a function of.

    Attributes:
        seed: of the run.
        windows: the set's shards, and which are shuffled together.
        global_batch_size: images of a step over all ranks.
        rank: this process; world_size: processes that share each global batch.
        order_version: of the run; see order.py.
    """

    seed: int
    windows: ShardWindows
    global_batch_size: int
    rank: int = 0
    world_size: int = 1
    order_version: int = ORDER_VERSION

    @property
    def count(self) -> int:
        """Samples of the set."""
        return int(self.windows.first[-1])

    def places(self, step: int) -> Places:
        """This rank's places in a step, each filled by the sample whose turn it is.

        Raises:
            ValueError: for numbers that `rank_slice` refuses.
        """
        epoch, ids = rank_slice(
            step,
            seed=self.seed,
            count=self.count,
            global_batch_size=self.global_batch_size,
            rank=self.rank,
            world_size=self.world_size,
            windows=self.windows,
            version=self.order_version,
        )
        start = step % steps_per_epoch(self.count, self.global_batch_size) * self.global_batch_size
        return Places(
            step=step,
            epoch=epoch,
            batch_start=start,
            first=start + self.rank * len(ids),
            ids=ids.copy(),
            attempts=np.zeros(len(ids), dtype=np.int64),
        )

    def advance(self, places: Places, row: int) -> int:
        """Give a place to the next candidate of its sequence; returns that sample's number."""
        places.attempts[row] += 1
        position = places.first + row
        candidate = self.candidate(places, position, int(places.attempts[row]))
        places.ids[row] = candidate
        return candidate

    def candidate(self, places: Places, position: int, attempt: int) -> int:
        """The sample that is tried as number `attempt` (from 1) for a position of an epoch."""
        bounds = self.windows.bounds(self.seed, places.epoch)
        window = int(np.searchsorted(bounds, position, side="right")) - 1
        low, high = int(bounds[window]), int(bounds[window + 1])
        if attempt > WINDOW_ATTEMPTS:
            low, high = 0, int(bounds[-1])
        batch_low = max(low, places.batch_start)
        inside = min(high, places.batch_start + self.global_batch_size) - batch_low
        if inside >= high - low:  # the batch is the whole window: there is no other sample
            inside = 0
        counter = tuple(
            np.array([word], dtype=np.uint64) for word in (attempt, position, places.epoch, 0)
        )
        word = int(philox_words((self.seed, REFILL_TAG), counter)[0, 0])  # type: ignore[arg-type]
        drawn = low + word % (high - low - inside)
        if inside and drawn >= batch_low:
            drawn += inside
        sample = samples_at(
            np.array([drawn], dtype=np.int64),
            seed=self.seed,
            epoch=places.epoch,
            count=self.count,
            windows=self.windows,
            version=self.order_version,
        )
        return int(sample[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """One rank's places in one step, and their samples; `ids` and `attempts` change as places are
    refilled.

    Attributes:
        step: from 0; epoch: from 0.
        batch_start: position in the epoch's order of the global batch's first sample.
        first: of this rank's first sample.
        ids: [B] int64 sample numbers.
        attempts: [B] int64: 0 where the sample is the one whose turn it is, else which candidate of
            the sequence has it.
    """

    step: int
    epoch: int
    batch_start: int
    first: int
    ids: NDArray[np.int64]
    attempts: NDArray[np.int64]

    @property
    def streams(self) -> NDArray[np.int64]:
        """[B]: the `places` of `draw_views`: 0, or 1 plus the position in the epoch of a refilled
        place."""
        positions = np.arange(self.first, self.first + len(self.ids), dtype=np.int64)
        return np.where(self.attempts > 0, positions + 1, 0)
