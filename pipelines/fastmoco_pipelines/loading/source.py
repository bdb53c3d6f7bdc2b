"""One rank's share of the data, step by step: bytes and draws in one thread of a loader, views in the other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.healing.healer import Healer
from fastmoco_pipelines.loading.batch import Batch
from fastmoco_pipelines.loading.stages import AUGMENT, DECODE, DRAW, HEAL, READ, TRANSFER, StageClock
from fastmoco_pipelines.loading.threads import BatchPlaces
from fastmoco_pipelines.sampling.stand_ins import Places, Plan
from fastmoco_pipelines.sets.shard_set import ShardError, ShardSet
from fastmoco_pipelines.spec import LoaderSpec
from fastmoco_pipelines.views.draws import ViewDraws, draw_batch

if TYPE_CHECKING:
    from fastmoco_pipelines.views.dali import DecodeError, ViewPipeline


@dataclass(frozen=True, slots=True)
class Prepared:
    """What DALI needs for one step."""

    places: Places
    encoded: list[NDArray[np.uint8]]
    draws: tuple[ViewDraws, ...]
    """One for each view."""
    innocent: bool = False
    """All of its images have been found to decode alone."""


@dataclass(frozen=True, slots=True)
class Source:
    """One rank's share of the data; `steps` runs in the reading thread, `render` in the producing one."""

    spec: LoaderSpec
    shards: ShardSet
    plan: Plan
    pipeline: ViewPipeline
    healer: Healer
    clock: StageClock
    stop: threading.Event
    pinned: bool = False
    places: BatchPlaces | None = None
    """Room for the batches ahead; None: all but the one in the making lie in a bounded queue."""

    def steps(self, start_step: int) -> Iterator[Prepared]:
        """Bytes and draws of every step from `start_step` on."""
        places = self.plan.places(start_step)
        while True:
            with self.clock.stage(READ, places.step):
                following = self.plan.places(places.step + 1)
            yield self.prepare(places, following.ids)
            places = following

    def prepare(self, places: Places, following: NDArray[np.int64]) -> Prepared:
        """Bytes and draws of one step; the samples of the next one are announced to the disk."""
        with self.clock.stage(READ, places.step):
            position = places.batch_start
            self.shards.follow(self.plan.windows, seed=self.spec.seed, epoch=places.epoch, position=position)
            with contextlib.suppress(ShardError, OSError):  # a hint: whether they can be read is seen when they are
                self.shards.will_need(following[~self.healer.bad.contains(following)])
            encoded = self.healer.fill(self.plan, places)
        with self.clock.stage(DRAW, places.step):
            return self._drawn(places, encoded)

    def render(self, prepared: Prepared) -> Batch:
        """Decode and augment; bad images are replaced until all is well."""
        from fastmoco_pipelines.views.dali import DecodeError

        step = prepared.places.step
        while True:
            try:
                with self.clock.stage(DECODE, step):
                    views = list(
                        self.pipeline.run(
                            prepared.encoded,
                            prepared.draws,
                            before_output=None if self.places is None else self.places.wait,
                        )
                    )
                self.clock.within(DECODE, AUGMENT, self.pipeline.augment_seconds)
                if self.pinned:
                    with self.clock.stage(TRANSFER, step):
                        # One at a time: a single view is held in pageable and in pinned memory at once.
                        for number in range(len(views)):
                            views[number] = views[number].pin_memory()
                return Batch(views=tuple(views), sample_ids=prepared.places.ids, step=step)
            except DecodeError as error:
                with self.clock.stage(HEAL, step):
                    prepared = self._healed(prepared, error)

    def _healed(self, prepared: Prepared, error: DecodeError) -> Prepared:
        """The step with other images in the places of those that broke it."""
        places = prepared.places
        encoded = self.healer.blame(error, places.ids, prepared.encoded)
        if all(data is not None for data in encoded):
            if prepared.innocent:
                raise error
            return replace(prepared, innocent=True)  # once more by a new graph: something may just have been scarce
        return self._drawn(places, self.healer.fill(self.plan, places, encoded))

    def _drawn(self, places: Places, encoded: list[NDArray[np.uint8]]) -> Prepared:
        draws = draw_batch(
            self.spec.views,
            seed=self.spec.seed,
            epoch=places.epoch,
            sample_ids=places.ids,
            sizes=self.shards.sizes[places.ids],
            places=places.streams,
        )
        return Prepared(places, encoded, draws)
