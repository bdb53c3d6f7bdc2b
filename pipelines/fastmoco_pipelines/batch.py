"""A batch on its way from the loader to the trainer, who owns its memory, and what every source of batches offers.

The tensors of a batch belong to whoever holds it: the loader never writes into a batch that it has handed out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastmoco_pipelines.order import local_batch_size, steps_per_epoch
from fastmoco_pipelines.spec import LoaderSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoViewBatch:
    """One rank's part of one global batch.

    Attributes:
        view1: [B, 3, H, W] float32, normalised, on the loader's device.
        view2: [B, 3, H, W] float32, normalised, on the loader's device; row i shows the image of ``view1``'s row i.
        sample_ids: [B] int64, on the host: row i's position in the manifest.
        step: the global step this batch belongs to, from 0.
    """

    view1: Tensor
    view2: Tensor
    sample_ids: NDArray[np.int64]
    step: int


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
        steps_per_epoch: full global batches of one pass over the set; the ragged rest is left out on all ranks.
        local_batch_size: images of each batch.
        sample_count: images of the whole set.
        digest: identity of the set's content (``ShardSet.digest``).
        wait_seconds: seconds that the last ``next()`` waited for its batch.
    """

    def __init__(
        self, spec: LoaderSpec, *, sample_count: int, digest: str, world_size: int = 1, start_step: int = 0
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(sample_count, spec.global_batch_size)
        self.local_batch_size = local_batch_size(spec.global_batch_size, world_size)
        self.sample_count = sample_count
        self.digest = digest
        self.wait_seconds = 0.0
        self._spec = spec
        self._step = start_step

    @abstractmethod
    def next(self) -> TwoViewBatch:
        """The batch of the next step."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the stream holds. Batches already handed out stay valid."""

    def state_dict(self) -> dict[str, Any]:
        """All there is to know to go on: ``step`` of the next batch, and what a resumed run must agree on; JSON-able."""
        return {
            "step": self._step,
            "digest": self.digest,
            "seed": self._spec.seed,
            "global_batch_size": self._spec.global_batch_size,
        }

    def __iter__(self) -> Iterator[TwoViewBatch]:
        return self

    def __next__(self) -> TwoViewBatch:
        return self.next()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
