"""The evaluation loader: every image once, in manifest order, without augmentation or as one view.

A bad image is left out without a stand-in; the other images are the same as with it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastmoco_pipelines.errors import DecodeError
from fastmoco_pipelines.healing.bad_samples import BadSamples
from fastmoco_pipelines.healing.culprit import Suspects
from fastmoco_pipelines.healing.healer import Healer, Trial
from fastmoco_pipelines.loading.batch import EvalBatch
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import EvalLoaderSpec, ViewSpec, require
from fastmoco_pipelines.views.draws import draw_batch

Show = Callable[[Sequence[NDArray[np.uint8]], NDArray[np.int64]], Tensor]
"""Makes images [B, 3, H, W] of encoded ones and their numbers in the set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Augmented:
    """Images as the first view that a training loader of this seed makes of them in this epoch."""

    view: ViewSpec
    seed: int = 0
    epoch: int = 0


def build_eval_loader(
    spec: EvalLoaderSpec,
    *,
    rank: int = 0,
    world_size: int = 1,
    device_id: int | None = None,
    quarantine_list: Path | None = None,
    shards: ShardSet | None = None,
    sample_ids: NDArray[np.int64] | None = None,
    augmented: Augmented | None = None,
) -> EvalLoader:
    """Open the shards and build the DALI graph of resize, center crop and normalise, or of a view.

    Args:
        spec: what to deliver.
        rank: this process, 0 to world_size - 1.
        world_size: processes that share the set: contiguous parts, equal to within one image.
        device_id: index of this process's GPU; needed for, and only for, `spec.device="gpu"`.
        quarantine_list: a run's list of bad samples, read and added to; None: none is kept.
        shards: the set of `spec.shards`, already open, for several loaders in turn; the loader
            closes its files, not the set. None: the loader opens it.
        sample_ids: [n] int64: these images, in this order, in place of a part of the set; then
            `rank`, `world_size` and `spec.limit` are not used.
        augmented: the view of each image that is delivered, in place of `spec.image`.

    Raises:
        ValueError: for numbers out of range or a pattern without shards.
        ShardError: if an index is missing, broken or stale, or more images are bad than allowed.
    """
    require(world_size >= 1, "world_size", world_size, "needs at least one rank")
    require(0 <= rank < world_size, "rank", rank, f"must lie in [0, world_size={world_size})")
    require(
        (device_id is not None) == (spec.device == "gpu"),
        "device_id",
        device_id,
        f"does not fit {spec.device=}",
    )
    if shards is None:
        shards = ShardSet.open(spec.shards, cache=spec)
    bad = BadSamples(shards, max_bad_share=spec.max_bad_share, run_list=quarantine_list)
    suspects = Suspects(device=spec.device, device_id=device_id, threads=spec.threads)
    healer = Healer(shards, bad, suspects, threading.Event())
    show = _show(spec, shards, device_id, augmented)

    # A contiguous part of `count` numbers for each rank, which are then spread over the set.
    if sample_ids is None:
        count = len(shards) if spec.limit is None else min(spec.limit, len(shards))
        first, end = rank * count // world_size, (rank + 1) * count // world_size
        sample_ids = np.arange(first, end, dtype=np.int64) * len(shards) // count
    else:
        count = len(sample_ids)
    return EvalLoader(shards, healer, show, sample_ids, count, spec.batch_size)


def _show(
    spec: EvalLoaderSpec, shards: ShardSet, device_id: int | None, augmented: Augmented | None
) -> Show:
    """How encoded images become images of a batch."""
    from fastmoco_pipelines.views.dali import EvalPipeline, ViewPipeline

    if augmented is None:
        plain = EvalPipeline(
            spec.image,
            batch_size=spec.batch_size,
            threads=spec.threads,
            device=spec.device,
            device_id=device_id,
        )
        return lambda encoded, _: plain.run(encoded)
    views = ViewPipeline(
        [augmented.view],
        batch_size=spec.batch_size,
        threads=spec.threads,
        device=spec.device,
        device_id=device_id,
    )

    def show(encoded: Sequence[NDArray[np.uint8]], ids: NDArray[np.int64]) -> Tensor:
        draws = draw_batch(
            [augmented.view],
            seed=augmented.seed,
            epoch=augmented.epoch,
            sample_ids=ids,
            sizes=shards.sizes_of(ids),
        )
        return views.run(encoded, draws)[0]

    return show


class EvalLoader:
    """Iterates over one rank's part of a set, as often as asked; `len` counts the images of all
    ranks, bad ones too.

    Attributes:
        classes: class names by label; empty where no manifest contains them.
        digest: identity of the set's content.
        report: called with each image that is left out, in a sentence. Logs a warning unless
            replaced.
    """

    def __init__(
        self,
        shards: ShardSet,
        healer: Healer,
        show: Show,
        sample_ids: NDArray[np.int64],
        count: int,
        batch_size: int,
    ) -> None:
        self.classes = shards.classes
        self.digest = shards.digest
        self.report: Callable[[str], None] = logging.getLogger(__name__).warning
        self._shards = shards
        self._healer = healer
        self._show = show
        self._sample_ids = sample_ids
        self._count = count
        self._batch_size = batch_size

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[EvalBatch]:
        """Batches in manifest order; the next one is decoded while the caller works on this one.

        Raises:
            ShardError: if too many images are bad.
        """
        starts = range(0, len(self._sample_ids), self._batch_size)
        parts = [self._sample_ids[start : start + self._batch_size] for start in starts]
        ahead = ThreadPoolExecutor(1, thread_name_prefix="fastmoco-eval")
        try:
            waiting = [ahead.submit(self._load, ids) for ids in parts[:1]]
            for ids in [*parts[1:], None]:
                if not waiting:
                    break
                batch = waiting.pop().result()
                if ids is not None:
                    waiting.append(ahead.submit(self._load, ids))
                for text in self._healer.bad.news():
                    self.report(text)
                if batch is not None:
                    yield batch
        # Left early, e.g. by an interrupt: what is being read is no longer needed.
        except BaseException:
            self._shards.cancel()
            ahead.shutdown()
            self._shards.close()
            raise
        ahead.shutdown()

    @property
    def part(self) -> int:
        """Images of this rank, bad ones too."""
        return len(self._sample_ids)

    @property
    def left_out(self) -> int:
        """Images of the set that are known to be bad."""
        return len(self._healer.bad)

    def close(self) -> None:
        """Close the files; a later iteration opens them again."""
        self._shards.cancel()
        self._shards.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, ids: NDArray[np.int64]) -> EvalBatch | None:
        """The good ones of some images; None where there is none."""

        found = self._healer.read(ids)
        trial = Trial(self._healer)
        while True:
            rows = [row for row, data in enumerate(found) if data is not None]
            encoded = [data for data in found if data is not None]
            if not rows:
                return None
            ids = ids[rows]
            try:
                images = self._show(encoded, ids)
            except DecodeError as error:
                found = trial.blame(error, ids, encoded)
            else:
                return EvalBatch(images=images, labels=self._shards.labels_of(ids), sample_ids=ids)
