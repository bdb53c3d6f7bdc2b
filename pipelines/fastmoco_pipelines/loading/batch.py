"""A batch on its way from the loader to the trainer, who owns its memory, and what every source of
batches offers.

The tensors of a batch belong to its consumer: the loader never writes into a batch that it has
delivered.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmoco_pipelines.loading.stages import StageFigures
from fastmoco_pipelines.sampling.order import (
    ORDER_VERSION,
    local_batch_size,
    steps_per_epoch,
)
from fastmoco_pipelines.sampling.window import ShardWindows
from fastmoco_pipelines.spec import LoaderSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One rank's part of one global batch.

    Attributes:
        views: view v is [B, 3, H_v, W_v] on the loader's device: float32, normalised, or uint8,
            levels that `views.levels.normalise` takes (`LoaderSpec.view_dtype`). In the order of
            `LoaderSpec.each_view`: views of one size are neighbours. Row i of every view shows the
            same image.
        sample_ids: [B] int64, on the host: row i's position in the manifest.
        step: the global step this batch belongs to, from 0.
        labels: [B] int64, on the host: the class of the image in row i, also where it stands in
            for a bad one; None unless `LoaderSpec.classes` asks for them.
    """

    views: tuple[Tensor, ...]
    sample_ids: NDArray[np.int64]
    step: int
    labels: NDArray[np.int64] | None = None

    @property
    def normalised(self) -> bool:
        """Whether the views can go to an encoder as they are."""
        return self.views[0].dtype != torch.uint8


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalBatch:
    """A run of held-out images in manifest order.

    Attributes:
        images: [B, 3, H, W] float32, normalised, on the loader's device.
        labels: [B] int64, on the host; -1 where the set has no labels.
        sample_ids: [B] int64, on the host.
    """

    images: Tensor
    labels: NDArray[np.int64]
    sample_ids: NDArray[np.int64]


class BatchStream(ABC):
    """Endless batches of one rank, in the order of the steps.

    Attributes:
        steps_per_epoch: full global batches of one pass over the set; the ragged rest is left out
            on all ranks.
        local_batch_size: images of each batch.
        sample_count: images of the whole set.
        spec: what is delivered, and where.
        digest: identity of the set's content (`ShardSet.digest`).
        shuffle_window: shards shuffled together; 0 = the whole set.
        order_digest: identity of how shards are shuffled together (`ShardWindows.digest`); empty
            for the whole set.
        order_version: of the order of the samples (sampling/order.py), which a run keeps.
        wait_seconds: seconds that the last `next()` waited for its batch.
        report: called in the trainer's thread with what a user should know, a sentence at a time: a
            sample that is left out, a wait that is long. Logs a warning unless replaced.
    """

    def __init__(
        self,
        spec: LoaderSpec,
        *,
        sample_count: int,
        digest: str,
        world_size: int = 1,
        start_step: int = 0,
        windows: ShardWindows | None = None,
        order_version: int = ORDER_VERSION,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(sample_count, spec.global_batch_size)
        self.local_batch_size = local_batch_size(spec.global_batch_size, world_size)
        self.sample_count = sample_count
        self.digest = digest
        self.shuffle_window = windows.window if windows is not None else 0
        self.order_digest = windows.digest if windows is not None else ""
        self.order_version = order_version
        self.wait_seconds = 0.0
        self.report: Callable[[str], None] = logging.getLogger(__name__).warning
        self.spec = spec
        self._step = start_step

    def begin(self) -> None:  # noqa: B027  # optional
        """Start to make batches ahead of `next`, where a stream does."""

    @abstractmethod
    def next(self) -> Batch:
        """The batch of the next step."""

    @abstractmethod
    def close(self) -> None:
        """Release what the stream holds. Batches that were delivered stay valid."""

    def has_digest(self, saved: str) -> bool:
        """Whether a digest that a run has saved is the one of this set."""
        return saved == self.digest

    def figures(self) -> StageFigures:
        """Where the time has gone since the beginning; empty for a stream that costs nothing."""
        return StageFigures()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs: `step` of the next batch, and what it must agree on;
        JSON-able."""
        order = (
            {"shuffle_window": self.shuffle_window, "order_digest": self.order_digest}
            if self.order_digest
            else {}
        )
        return {
            "step": self._step,
            "digest": self.digest,
            "seed": self.spec.seed,
            "global_batch_size": self.spec.global_batch_size,
            "order_version": self.order_version,
            **order,
        }

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.next()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
