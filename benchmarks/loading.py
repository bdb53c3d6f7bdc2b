"""Feeds: the ways of making views of every image that the benchmarks of the loader compare, on the
same shards.

A feed gives batches. Its threads or worker processes prefetch a bounded number of batches, so
between two idle moments it makes as many batches as are taken.
"""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastmoco_pipelines import LoaderSpec, ViewSpec, moco_v3_views
from fastmoco_pipelines.loading.loader import Loader, build_loader
from fastmoco_pipelines.sampling.stand_ins import Plan
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import each_view
from fastmoco_pipelines.views.draws import ViewDraws, draw_views
from fastmoco_pipelines.views.exact_color import exact_color, exact_views
from fastmoco_pipelines.views.reference import (
    FILTERS,
    adjust_brightness,
    adjust_contrast,
    adjust_saturation,
    crop_and_resize,
    flip_horizontally,
    gaussian_blur,
    solarize,
    to_grayscale,
)

Views = tuple[Tensor, ...]
Color = Literal["dali", "exact"]


@dataclass(frozen=True, kw_only=True)
class Feed:
    """One way of loading.

    Attributes:
        name: in the result.
        next: makes or takes one batch: tensors [B, 3, size, size] float32, one for each view, or
            None for a part of the work.
        close: releases its resources.
        resting: whether no thread of this process is prefetching.
        loader: fastmoco's own, if it is one.
    """

    name: str
    next: Callable[[], Views | None]
    close: Callable[[], object] = lambda: None
    resting: Callable[[], bool] = lambda: True
    loader: Loader | None = None


def _pair(size: int, color: Color) -> tuple[ViewSpec, ...]:
    return moco_v3_views(size, color=color)


@dataclass(frozen=True, kw_only=True)
class Job:
    """The batches that every feed makes.

    Attributes:
        shards: pattern of the tars.
        size: height and width of a view; batch: images of a batch.
        device: of the batches.
        threads: of DALI and of torch.
        groups: of views, by their size and color; the pair of MoCo v3 if not given.
    """

    shards: str
    size: int
    batch: int
    device: torch.device
    threads: int
    groups: Callable[[int, Color], tuple[ViewSpec, ...]] = _pair

    def views(self, color: Color) -> tuple[ViewSpec, ...]:
        """Each view of an image."""
        return each_view(self.groups(self.size, color))

    @cached_property
    def set(self) -> ShardSet:
        """The opened shards."""
        return ShardSet.open(self.shards)

    def ids(self, step: int) -> NDArray[np.int64]:
        """The samples that fastmoco's loader delivers in a step; the other feeds use the same."""
        return (
            Plan(seed=0, windows=self.set.windows(0), global_batch_size=self.batch).places(step).ids
        )

    def draws(
        self, ids: NDArray[np.int64], number: int, color: Color = "exact", epoch: int = 0
    ) -> ViewDraws:
        """The draws of fastmoco's loader for a view of these samples, counted from 1."""
        spec, sizes = self.views(color)[number - 1], self.set.sizes_of(ids)
        return draw_views(spec, seed=0, epoch=epoch, sample_ids=ids, sizes=sizes, view=number)

    def batches(self) -> Iterator[tuple[NDArray[np.int64], list[NDArray[np.uint8]]]]:
        """Numbers and bytes of the samples, step by step, without end."""
        step = 0
        while True:
            ids = self.ids(step)
            yield ids, self.set.read(ids)
            step += 1


def fastmoco_feed(job: Job, color: Color, name: str = "") -> Feed:
    """fastmoco's loader."""
    on_gpu = job.device.type == "cuda"
    spec = LoaderSpec(
        shards=job.shards,
        views=job.views(color),
        global_batch_size=job.batch,
        device="gpu" if on_gpu else "cpu",
        threads=job.threads,
        shuffle_window=0,
    )
    torch.set_num_threads(job.threads)  # the loader's threads read it at their first use
    loader = build_loader(spec, device_id=0 if on_gpu else None)

    shown = name or f"fastmoco {color}"
    return Feed(
        name=shown,
        next=lambda: loader.next().views,
        close=loader.close,
        resting=lambda: loader.resting,
        loader=loader,
    )


MakeView = Callable[[Image.Image, ViewSpec, ViewDraws, int], Tensor]
"""A view of a decoded image by a row of the draws: [3, size, size] float32."""


def pillow_feed(job: Job) -> Feed:
    """The operations of torchvision's PIL transforms, one image after the other, in this
    process."""
    return _one_by_one(job, "pillow", pillow_view)


def torchvision_feed(job: Job) -> Feed:
    """torchvision's PIL transforms themselves, one image after the other, in this process."""
    return _one_by_one(job, "torchvision", torchvision_view())


def _one_by_one(job: Job, name: str, view_of: MakeView) -> Feed:
    batches = job.batches()
    specs = job.views("exact")

    def following() -> Views:
        ids, encoded = next(batches)
        images = [pillow_decode(data) for data in encoded]
        made = []
        for number, spec in enumerate(specs, start=1):
            drawn = job.draws(ids, number)
            views = [view_of(image, spec, drawn, i) for i, image in enumerate(images)]
            made.append(torch.stack(views).to(job.device))
        return tuple(made)

    return Feed(name=name, next=following)


def torchvision_view() -> MakeView:
    """torchvision's functional transforms of PIL images with drawn parameters; the blur is Pillow's,
    as in the code of DINO and MoCo v3."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    jitter = (
        transforms.adjust_brightness,
        transforms.adjust_contrast,
        transforms.adjust_saturation,
        transforms.adjust_hue,
    )

    def view_of(image: Image.Image, spec: ViewSpec, draws: ViewDraws, i: int) -> Tensor:
        how = InterpolationMode(spec.interpolation)
        window = draws.crop[i].tolist()
        view = transforms.resized_crop(image, *window, [spec.size, spec.size], how)
        factors = draws.brightness[i], draws.contrast[i], draws.saturation[i], draws.hue[i]
        for number in draws.jitter_order[i].tolist():
            if factors[number] != (0 if number == 3 else 1):
                view = jitter[number](view, float(factors[number]))
        if draws.grayscale[i]:
            view = transforms.to_grayscale(view, 3)
        if draws.blur_sigma[i] > 0:
            view = gaussian_blur(view, float(draws.blur_sigma[i]))
        if draws.solarize[i]:
            view = transforms.solarize(view, spec.solarize_threshold)
        if draws.flip[i]:
            view = transforms.hflip(view)
        made: Tensor = transforms.normalize(
            transforms.to_tensor(view), list(spec.mean), list(spec.std)
        )
        return made

    return view_of


def webdataset_feed(job: Job, workers: int, paths: list[Path]) -> Feed:
    """webdataset's reader and torch's DataLoader around the PIL transforms; the
    workers run until closed.
    """
    import webdataset

    pair = job.views("exact")

    def transform(sample: tuple[bytes]) -> tuple[Tensor, ...]:
        image = pillow_decode(sample[0])
        return tuple(pillow_view(image, spec, random_draws(spec, image), 0) for spec in pair)

    data = webdataset.WebDataset([str(path) for path in paths], resampled=True, shardshuffle=False)
    data = data.shuffle(100).to_tuple("jpg;jpeg;png").map(transform)
    batches = iter(torch.utils.data.DataLoader(data, batch_size=job.batch, num_workers=workers))

    def following() -> Views:
        view1, view2 = next(batches)
        return view1.to(job.device), view2.to(job.device)

    def close() -> None:
        nonlocal batches
        del batches

    return Feed(name="webdataset", next=following, close=close)


def reading_feed(job: Job) -> Feed:
    """Reading bytes and drawing parameters only."""
    batches = job.batches()

    def following() -> None:
        ids, _ = next(batches)
        for number, _ in enumerate(job.views("exact"), start=1):
            job.draws(ids, number)

    return Feed(name="read and draw", next=following)


def pillow_decoding_feed(job: Job) -> Feed:
    """Reading and decoding with Pillow only."""
    batches = job.batches()

    def following() -> None:
        for data in next(batches)[1]:
            pillow_decode(data)

    return Feed(name="decode pillow", next=following)


def augment_feed(job: Job) -> Feed:
    """The work of exact views after DALI for one batch: from decoded images on the CPU, from
    resized ones on a GPU.
    """
    ids, encoded = next(job.batches())
    images = [pillow_decode(data) for data in encoded]
    decoded = [np.asarray(image) for image in images]
    pair = [
        (spec, job.draws(ids, number)) for number, spec in enumerate(job.views("exact"), start=1)
    ]
    resized = []
    if job.device.type == "cuda":
        cut = [
            [
                crop_and_resize(image, tuple(draws.crop[i]), spec.size, spec.interpolation)
                for i, image in enumerate(images)
            ]
            for spec, draws in pair
        ]
        resized = [
            torch.from_numpy(np.stack([np.asarray(image) for image in some])).to(job.device)
            for some in cut
        ]

    def following() -> Views:
        if resized:
            return tuple(exact_color(some, *how) for some, how in zip(resized, pair, strict=True))
        return tuple(exact_views(decoded, spec, draws, job.threads) for spec, draws in pair)

    return Feed(name="exact views alone", next=following)


def pillow_decode(data: bytes | NDArray[np.uint8]) -> Image.Image:
    """As torchvision's ImageFolder does."""
    with Image.open(io.BytesIO(bytes(data))) as opened:
        return opened.convert("RGB")


def pillow_view(image: Image.Image, spec: ViewSpec, draws: ViewDraws, i: int) -> Tensor:
    """torchvision's PIL transforms with the drawn parameters of row `i`: [3,
    size, size] float32.
    """
    top, left, height, width = draws.crop[i].tolist()
    window = image.crop((left, top, left + width, top + height))
    view = window.resize((spec.size, spec.size), FILTERS[spec.interpolation])
    jitter = (
        (adjust_brightness, draws.brightness[i], 1),
        (adjust_contrast, draws.contrast[i], 1),
        (adjust_saturation, draws.saturation[i], 1),
        (_adjust_hue, draws.hue[i], 0),
    )
    for number in draws.jitter_order[i].tolist():
        operation, value, nothing = jitter[number]
        if value != nothing:
            view = operation(view, float(value))
    if draws.grayscale[i]:
        view = to_grayscale(view)
    if draws.blur_sigma[i] > 0:
        view = gaussian_blur(view, float(draws.blur_sigma[i]))
    if draws.solarize[i]:
        view = solarize(view, spec.solarize_threshold)
    if draws.flip[i]:
        view = flip_horizontally(view)
    levels = (
        torch.from_numpy(np.array(view)).permute(2, 0, 1).contiguous().to(torch.float32).div_(255)
    )
    return levels.sub_(torch.tensor(spec.mean).view(3, 1, 1)).div_(
        torch.tensor(spec.std).view(3, 1, 1)
    )


def _adjust_hue(image: Image.Image, turns: float) -> Image.Image:
    """As in torchvision: the byte of the hue wraps around."""
    hue, saturation, value = image.convert("HSV").split()
    levels = np.array(hue, dtype=np.uint8)
    levels += np.int32(turns * 255).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(levels), saturation, value)).convert("RGB")


def random_draws(spec: ViewSpec, image: Image.Image) -> ViewDraws:
    """One row from Python's own random numbers, as a transform of torchvision does."""
    chance, between = random.random, random.uniform
    jitter = chance() < spec.jitter_probability

    def factor(strength: float, middle: float = 1) -> NDArray[np.float32]:
        return np.array(
            [between(middle - strength, middle + strength) if jitter else middle], np.float32
        )

    blurred = chance() < spec.blur_probability
    return ViewDraws(
        crop=np.array([_random_crop(spec, *image.size)], np.int32),
        corner=np.zeros((1, 2), np.int32),
        flip=np.array([chance() < spec.flip_probability]),
        brightness=factor(spec.brightness),
        contrast=factor(spec.contrast),
        saturation=factor(spec.saturation),
        hue=factor(spec.hue, 0),
        jitter_order=np.array([random.sample(range(4), 4)], np.uint8),
        grayscale=np.array([chance() < spec.grayscale_probability]),
        blur_sigma=np.array([between(*spec.blur_sigma) if blurred else 0], np.float32),
        solarize=np.array([chance() < spec.solarize_probability]),
    )


def _random_crop(spec: ViewSpec, width: int, height: int) -> tuple[int, int, int, int]:
    """Top, left, height, width; the whole image if ten tries do not fit."""
    for _ in range(10):
        area = width * height * random.uniform(*spec.crop_scale)
        ratio = math.exp(random.uniform(math.log(spec.crop_ratio[0]), math.log(spec.crop_ratio[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    return 0, 0, height, width
