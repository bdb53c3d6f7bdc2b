"""The evaluation loader: every image once, in manifest order, without augmentation."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.batch import EvalBatch
from fastmoco_pipelines.culprit import raise_bad_image
from fastmoco_pipelines.shards import ShardSet
from fastmoco_pipelines.spec import EvalSpec, require

if TYPE_CHECKING:
    from fastmoco_pipelines.dali import EvalPipeline


def build_eval_loader(
    pattern: str,
    spec: EvalSpec,
    *,
    batch_size: int,
    device: Literal["cpu", "gpu"] = "cpu",
    device_id: int | None = None,
    threads: int = 2,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
) -> EvalLoader:
    """Open the shards and build the DALI graph of resize, centre crop and normalise.

    Args:
        pattern: the shards, as for ``expand_shards``.
        spec: how an image is shown.
        batch_size: images of a batch on this rank; the last one may be smaller.
        device: where DALI works; "gpu" needs ``device_id``.
        device_id: index of this process's GPU.
        threads: DALI worker threads.
        rank: this process, 0 to world_size - 1.
        world_size: processes that share the set: contiguous parts, equal to within one image.
        limit: use only so many images, spread evenly over the set; None uses all.

    Raises:
        ValueError: for numbers out of range or a pattern without shards.
        ShardError: if an index is missing, broken or stale.
    """
    from fastmoco_pipelines.dali import EvalPipeline  # needs DALI, which whoever only reads shards may lack

    require(batch_size >= 1, "batch_size", batch_size, "needs at least 1 image")
    require(world_size >= 1, "world_size", world_size, "needs at least one rank")
    require(0 <= rank < world_size, "rank", rank, f"must lie in [0, world_size={world_size})")
    require(limit is None or limit >= 1, "limit", limit, "needs at least 1 image, or None for all")
    require((device_id is not None) == (device == "gpu"), "device_id", device_id, f"does not fit {device=}")
    shards = ShardSet.open(pattern)
    count = len(shards) if limit is None else min(limit, len(shards))
    part = np.arange(rank * count // world_size, (rank + 1) * count // world_size, dtype=np.int64)
    pipeline = EvalPipeline(spec, batch_size=batch_size, threads=threads, device=device, device_id=device_id)
    return EvalLoader(shards, pipeline, part * len(shards) // count, count, batch_size, device, device_id)


class EvalLoader:
    """Iterates over one rank's part of a set, as often as asked; ``len`` counts the images of all ranks.

    Attributes:
        classes: class names by label; empty where no manifest tells.
        digest: identity of the set's content.
    """

    def __init__(
        self,
        shards: ShardSet,
        pipeline: EvalPipeline,
        sample_ids: NDArray[np.int64],
        count: int,
        batch_size: int,
        device: Literal["cpu", "gpu"],
        device_id: int | None,
    ) -> None:
        self.classes = shards.classes
        self.digest = shards.digest
        self._shards = shards
        self._pipeline = pipeline
        self._sample_ids = sample_ids
        self._count = count
        self._batch_size = batch_size
        self._device: Literal["cpu", "gpu"] = device
        self._device_id = device_id

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[EvalBatch]:
        """Batches in manifest order; the next one is decoded while the caller works on this one.

        Raises:
            ShardError, BadImageError: naming tar and member, where the data is damaged.
        """
        starts = range(0, len(self._sample_ids), self._batch_size)
        parts = [self._sample_ids[start : start + self._batch_size] for start in starts]
        with ThreadPoolExecutor(1, thread_name_prefix="fastmoco-eval") as ahead:
            waiting = [ahead.submit(self._load, ids) for ids in parts[:1]]
            for ids in [*parts[1:], None]:
                if not waiting:
                    return
                batch = waiting.pop().result()
                if ids is not None:
                    waiting.append(ahead.submit(self._load, ids))
                yield batch

    def close(self) -> None:
        """Close the files; a later iteration opens them again."""
        self._shards.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _load(self, ids: NDArray[np.int64]) -> EvalBatch:
        from fastmoco_pipelines.dali import DecodeError

        encoded = self._shards.read(ids)
        try:
            images = self._pipeline.run(encoded)
        except DecodeError as error:
            raise_bad_image(
                error,
                shards=self._shards,
                sample_ids=ids,
                encoded=encoded,
                device=self._device,
                device_id=self._device_id,
            )
        return EvalBatch(images=images, labels=self._shards.labels[ids], sample_ids=ids)
