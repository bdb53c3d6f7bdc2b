"""One rank's share of the data, step by step: bytes and draws in one thread of a loader, views in
the other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.errors import DecodeError
from fastmoco_pipelines.healing.healer import Healer, Trial
from fastmoco_pipelines.loading import step_parts
from fastmoco_pipelines.loading.batch import Batch
from fastmoco_pipelines.loading.stages import (
    AUGMENT,
    DECODE,
    DRAW,
    HEAL,
    READ,
    TRANSFER,
    StageClock,
)
from fastmoco_pipelines.loading.threads import BatchPlaces
from fastmoco_pipelines.sampling.stand_ins import Places, Plan
from fastmoco_pipelines.sets.shard_set import ShardError, ShardSet
from fastmoco_pipelines.spec import LoaderSpec
from fastmoco_pipelines.views.draws import ViewDraws, draw_batch

if TYPE_CHECKING:
    from fastmoco_pipelines.views.dali import ViewPipeline


@dataclass(frozen=True, slots=True)
class Prepared:
    """What DALI needs for one step."""

    places: Places
    encoded: list[NDArray[np.uint8]]
    draws: tuple[ViewDraws, ...]
    """One for each view."""
    labels: NDArray[np.int64] | None
    """Of the samples in these places; None where the spec asks for none."""


@dataclass(frozen=True, slots=True)
class Source:
    """One rank's share of the data; `steps` runs in the reading thread, `render` in the producing
    one."""

    spec: LoaderSpec
    shards: ShardSet
    plan: Plan
    pipeline: ViewPipeline
    healer: Healer
    clock: StageClock
    stop: threading.Event
    pinned: bool = False
    places: BatchPlaces | None = None
    """Room for the batches ahead; None: a bounded queue holds all but the one that is being
    made."""

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
            self.shards.follow(
                self.plan.windows, seed=self.spec.seed, epoch=places.epoch, position=position
            )
            # a hint: whether they can be read is seen when they are
            with contextlib.suppress(ShardError, OSError):
                self.shards.will_need(following[~self.healer.bad.contains(following)])
            encoded = self.healer.fill(self.plan, places)
        with self.clock.stage(DRAW, places.step):
            return self._drawn(places, encoded)

    def render(self, prepared: Prepared) -> Batch:
        """Decode and augment; bad images are replaced until all is well."""

        places = prepared.places
        step = places.step
        if self.healer.bad.contains(places.ids).any():  # found since they were read
            with self.clock.stage(HEAL, step):
                prepared = self._drawn(places, self.healer.fill(self.plan, places))
        trial = Trial(self.healer)
        while True:
            try:
                with self.clock.stage(DECODE, step):
                    views = list(
                        self.pipeline.run(
                            prepared.encoded,
                            prepared.draws,
                            before_output=None if self.places is None else self.places.wait,
                            finishing=partial(step_parts.part, step_parts.AUGMENT, helpers=True),
                        )
                    )
                self.clock.within(DECODE, AUGMENT, self.pipeline.augment_seconds)
                if self.pinned:
                    with self.clock.stage(TRANSFER, step):
                        # One at a time: a single view is held in pageable and in pinned memory at
                        # once.
                        for number in range(len(views)):
                            views[number] = views[number].pin_memory()
                return Batch(
                    views=tuple(views), sample_ids=places.ids, step=step, labels=prepared.labels
                )
            except DecodeError as error:
                with self.clock.stage(HEAL, step):
                    encoded = trial.blame(error, places.ids, prepared.encoded)
                    if any(data is None for data in encoded):
                        prepared = self._drawn(places, self.healer.fill(self.plan, places, encoded))

    def _drawn(self, places: Places, encoded: list[NDArray[np.uint8]]) -> Prepared:
        draws = draw_batch(
            self.spec.views,
            seed=self.spec.seed,
            epoch=places.epoch,
            sample_ids=places.ids,
            sizes=self.shards.sizes_of(places.ids),
            places=places.streams,
        )
        labels = self.shards.labels_of(places.ids) if self.spec.classes else None
        return Prepared(places, encoded, draws, labels)
