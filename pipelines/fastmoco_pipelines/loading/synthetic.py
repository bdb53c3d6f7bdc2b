"""The upper bound of every throughput figure: a loader whose batches cost nothing."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastmoco_pipelines.loading.batch import Batch, BatchStream
from fastmoco_pipelines.sampling.order import ORDER_VERSION, rank_slice
from fastmoco_pipelines.spec import LoaderSpec


class SyntheticLoader(BatchStream):
    """Delivers the same tensors of noise indefinitely, one for each view, already on the device.

    The interface is that of `Loader`.

    Args:
        spec: sizes, type of the views and seed are used; `shards` is not read.
        rank: this process; world_size: processes that share each global batch equally.
        device: device of the views.
        start_step: the step of the first batch.
        sample_count: images of the pretended set; ImageNet-1k's by default.
        order_version: of the order of the samples, as for `build_loader`.

    Raises:
        ValueError: for a batch that the ranks cannot share or that is larger than `sample_count`,
            or an unknown version of the order.
    """

    def __init__(
        self,
        spec: LoaderSpec,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        start_step: int = 0,
        sample_count: int = 1_281_167,
        order_version: int = ORDER_VERSION,
    ) -> None:
        super().__init__(
            spec,
            sample_count=sample_count,
            digest="synthetic",
            world_size=world_size,
            start_step=start_step,
            order_version=order_version,
        )
        # Also refuses what a real loader would refuse.
        self._sample_ids = rank_slice(
            start_step,
            seed=spec.seed,
            count=sample_count,
            global_batch_size=spec.global_batch_size,
            rank=rank,
            world_size=world_size,
            version=order_version,
        )[1].copy()
        noise = torch.Generator().manual_seed(spec.seed + rank)
        shapes = [(self.local_batch_size, 3, view.size, view.size) for view in spec.each_view]
        if spec.view_dtype == "uint8":
            views = [_levels(shape, noise) for shape in shapes]
        else:
            views = [torch.randn(shape, generator=noise, dtype=torch.float32) for shape in shapes]
        self._views = tuple(view.to(device) for view in views)
        # One class after another, whatever the step: an image is the same in every step.
        rows = rank * self.local_batch_size + np.arange(self.local_batch_size, dtype=np.int64)
        self._labels = rows % spec.classes if spec.classes else None

    def next(self) -> Batch:
        """The same batch under the next step's number."""
        batch = Batch(
            views=self._views, sample_ids=self._sample_ids, step=self._step, labels=self._labels
        )
        self._step += 1
        return batch

    def close(self) -> None:
        """Nothing to stop."""


def _levels(shape: tuple[int, ...], noise: torch.Generator) -> Tensor:
    """Levels of noise, eight of each number that is drawn: a large batch takes seconds otherwise."""
    count = math.prod(shape)
    drawn = torch.empty(-(-count // 8), dtype=torch.int64).random_(-(2**63), None, generator=noise)
    return drawn.view(torch.uint8)[:count].view(shape)
