"""What both linear protocols share: the official rate, the views of training images, and the sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import NamedTuple

import numpy as np
from torch import nn

from fastmoco.config import Config
from fastmoco.config.labelled import OFFICIAL_CROP, own_crops
from fastmoco.config.limits import MOST_ROWS
from fastmoco.evaluation.monitor import OpenSet, open_comparable, shared_images
from fastmoco.models.resnet import ResNet
from fastmoco_pipelines.spec import CacheSpec, EvalSpec, ViewSpec
from fastmoco_pipelines.text import redact

PROTOCOLS = ("moco_v3", "moby", "mae")
"""Names of official protocols."""
VIT_LR, RESNET_LR = 3.0, 0.1
"""Rates of the official release for a batch of 256 images; its weight decay is 0."""


def official_lr(encoder: nn.Module) -> float:
    """The rate of the official release for a batch of 256 images."""
    return RESNET_LR if isinstance(encoder, ResNet) else VIT_LR


def probe_view(
    image: EvalSpec,
    config: Config | None = None,
    crop_min: float | None = None,
    *,
    protocol: str = "moco_v3",
) -> ViewSpec:
    """The view of an official protocol: a random crop and a flip, without changes of color. In that
    of MAE crops are resized by a bicubic filter, and a window that is larger than its image is cut
    down to it; other protocols have those of torchvision.

    The crops of the protocol cover 8 % of a photograph or more. For images of at most 64 pixels,
    which are not resized for the test either, crops and flips are those of the run's first view:
    its recipe knows which of them keep the class of a small image.

    Args:
        image: how a test image is shown.
        config: of the run; None: the protocol's crops and flips for any size.
        crop_min: smallest share of an image's area, in place of either.
        protocol: "moco_v3", "moby" or "mae".

    Raises:
        ValueError: for another protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol={protocol!r}: must be one of {', '.join(PROTOCOLS)}")
    scale, flip = own_crops(image.size, config) or ((OFFICIAL_CROP, 1.0), 0.5)
    return ViewSpec(
        size=image.size,
        crop_scale=scale if crop_min is None else (crop_min, 1.0),
        crop_misfit="clip" if protocol == "mae" else "retry",
        interpolation="bicubic" if protocol == "mae" else "bilinear",
        flip_probability=flip,
        jitter_probability=0.0,
        brightness=0.0,
        contrast=0.0,
        saturation=0.0,
        hue=0.0,
        grayscale_probability=0.0,
        blur_probability=0.0,
        mean=image.mean,
        std=image.std,
    )


class ProbeSets(NamedTuple):
    """Labelled sets of a linear classifier, with the same classes."""

    train: OpenSet
    test: OpenSet
    classes: int
    notes: list[str]
    """What a reader of the accuracy must know, in sentences."""


@contextmanager
def probe_sets(train: str, test: str, cache: CacheSpec) -> Iterator[ProbeSets]:
    """Open both sets; afterwards they are closed.

    Args:
        train: pattern of labelled shards.
        test: pattern of labelled shards.
        cache: where shards of a server are kept.

    Raises:
        ValueError: if a set has no labels or no image, the classes of both differ, or the training
            images have one class.
        ShardError: if a set cannot be opened.
    """
    with ExitStack() as stack:
        opened = open_comparable(train, test, cache, needed_by="a linear classifier")
        for one in opened:
            stack.enter_context(closing(one.shards))
            if not len(one.shards):
                raise ValueError(f"{redact(one.pattern)!r} has no image")
        first, second = (one.shards for one in opened)
        if len(np.unique(first.labels)) < 2:
            raise ValueError(
                f"{redact(train)!r}: all images have one class, so there is nothing to learn; pack "
                "a folder for each class"
            )
        classes = max(first.class_count, second.class_count)
        if classes > MOST_ROWS:
            raise ValueError(
                f"{redact(train)!r} or {redact(test)!r}: labels go up to {classes - 1:,}, and a "
                f"classifier has at most {MOST_ROWS:,} classes: number the classes from 0 on"
            )
        rows = [np.arange(len(one), dtype=np.int64) for one in (first, second)]
        both = shared_images(first.checksums_of(rows[0]), second.checksums_of(rows[1]))
        notes = []
        if both:
            notes.append(
                f"{both} of {len(second)} test images ({both / len(second):.0%}) are among the "
                "training images too, with the same bytes, so the accuracy says little about other "
                "images"
            )
        yield ProbeSets(*opened, classes, notes)
