"""Batches of the baseline: a DataLoader whose workers read tars and make views with PIL.

The order of the samples and the parameters of the views are those that fastmoco's loader draws, so
that both train on the same images. They are drawn for a batch at a time by the sampler, and handed
to the workers with the numbers of the samples.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from typing import BinaryIO

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks.baseline.views import Parameters, make_view, parameters
from fastmoco.config import Config
from fastmoco_pipelines.loading.step_parts import AUGMENT, DECODE, READ, part
from fastmoco_pipelines.sampling.stand_ins import Plan
from fastmoco_pipelines.sets.patterns import expand_shards
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import ViewSpec
from fastmoco_pipelines.views.draws import draw_batch

Item = tuple[int, Parameters, Parameters]
"""A sample, and what was drawn for its two views."""
IMAGES = (".jpg", ".jpeg", ".png", ".webp")


class TarImages(Dataset[tuple[Tensor, Tensor, int]]):
    """Two views of each image of some tars.

    Args:
        paths: of the tars.
        views: what the two views are.
    """

    def __init__(self, paths: list[str], views: tuple[ViewSpec, ...]) -> None:
        self.paths = paths
        self.views = views
        self.members: list[tuple[int, int, int]] = []
        for number, path in enumerate(paths):
            with tarfile.open(path) as tar:
                self.members += [
                    (number, member.offset_data, member.size)
                    for member in tar
                    if member.name.lower().endswith(IMAGES)
                ]
        self._files: dict[int, BinaryIO] = {}

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, item: Item) -> tuple[Tensor, Tensor, int]:
        sample, *drawn = item
        with part(READ):
            data = self._read(sample)
        with part(DECODE):
            image = Image.open(io.BytesIO(data)).convert("RGB")
        with part(AUGMENT):
            view1, view2 = (
                make_view(image, spec, own) for spec, own in zip(self.views, drawn, strict=True)
            )
        return view1, view2, sample

    def _read(self, sample: int) -> bytes:
        """Bytes of a sample; every process has its own files."""
        number, offset, size = self.members[sample]
        if number not in self._files:
            self._files[number] = open(self.paths[number], "rb")  # noqa: SIM115  # kept open
        file = self._files[number]
        file.seek(offset)
        return file.read(size)


class DrawnBatches(Sampler[list[Item]]):
    """The samples and draws of every step from a first one on, without end.

    Args:
        config: of the run.
        shards: the set of its training images.
        start_step: the first step.
        rank: this process; world_size: processes that share each batch.
    """

    def __init__(
        self, config: Config, shards: ShardSet, *, start_step: int, rank: int, world_size: int
    ) -> None:
        self._config = config
        self._shards = shards
        self._start = start_step
        self._plan = Plan(
            seed=config.seed,
            windows=shards.windows(config.data.shuffle_window),
            global_batch_size=config.global_batch_size,
            rank=rank,
            world_size=world_size,
        )

    def __iter__(self) -> Iterator[list[Item]]:
        step = self._start
        while True:
            places = self._plan.places(step)
            draws = draw_batch(
                self._config.data.views,
                seed=self._config.seed,
                epoch=places.epoch,
                sample_ids=places.ids,
                sizes=self._shards.sizes_of(places.ids),
            )
            drawn1, drawn2 = map(parameters, draws)
            yield list(zip(places.ids.tolist(), drawn1, drawn2, strict=True))
            step += 1


def batches(
    config: Config,
    workers: int = 0,
    *,
    start_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """View 1, view 2 ([B, 3, H, W] float32) and sample numbers ([B] int64), step by step, without
    end.

    Args:
        config: of the run: shards, views, batch and seed.
        workers: processes that make batches; 0: this one makes them.
        start_step: the first step.
        rank: this process; world_size: processes that share each batch.
        pin_memory: copy batches to pinned memory, for a GPU.

    Raises:
        ValueError: if the tars hold other images than their index.
    """
    shards = ShardSet.open(config.data.shards)
    dataset = TarImages(
        [str(path) for path in expand_shards(config.data.shards)], config.data.views
    )
    if len(dataset) != len(shards):
        raise ValueError(
            f"data.shards={config.data.shards!r}: the tars hold {len(dataset)} images, their index "
            f"{len(shards)}; run fastmoco data index"
        )
    sampler = DrawnBatches(config, shards, start_step=start_step, rank=rank, world_size=world_size)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        prefetch_factor=2 if workers else None,
    )
    return iter(loader)


def sample_count(config: Config) -> int:
    """Images of the training set."""
    shards = ShardSet.open(config.data.shards)
    try:
        return len(shards)
    finally:
        shards.close()
