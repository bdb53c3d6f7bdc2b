"""Every random number of a view, as a pure function of (seed, epoch, sample, view).

Nothing here has a state: resuming at a step, or spreading a batch over more ranks, needs no
generator to be saved. The draws of a sample do not depend on its neighbours in the batch, nor the
draw of one operation on the probability of another (every number has its own fixed place in the
sample's stream).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.sampling.philox import philox_words
from fastmoco_pipelines.spec import MOST_VIEWS, ViewSpec, each_view, require

_TAG = 0x76696577  # "view": keeps this stream apart from every other use of the seed
_CROP_TRIES = 10
_ORDERS = np.array(list(permutations(range(4))), dtype=np.uint8)
_BLOCKS = 5
"""Philox blocks of a sample, of eight 32-bit numbers each: two for a first crop try and all else,
three for nine more and the shift."""
_RETRIES = slice(16, 16 + 2 * (_CROP_TRIES - 1))
_SHIFT = slice(_RETRIES.stop, _RETRIES.stop + 2)
"""Which of these numbers further tries and the shift take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ViewDraws:
    """What was drawn for one view of each of B samples; row i belongs to sample i.

    Attributes:
        crop: [B, 4] int32, crop window (top, left, height, width) in pixels of the decoded image.
        corner: [B, 2] int32, top and left of the view in the crop window resized to
            `ViewSpec.base_size`, before the flip; 0 without one.
        flip: [B] bool, horizontal flip.
        brightness: [B] float32 factor, 1 where untouched.
        contrast: [B] float32 factor, 1 where untouched.
        saturation: [B] float32 factor, 1 where untouched.
        hue: [B] float32 shift in turns, 0 where untouched.
        jitter_order: [B, 4] uint8, a permutation of 0 brightness, 1 contrast, 2 saturation, 3 hue:
            followed where `color="exact"`; with `color="dali"` the four come in the fixed order of
            `ViewSpec`.
        grayscale: [B] bool.
        blur_sigma: [B] float32 standard deviation in output pixels, 0 for no blur.
        solarize: [B] bool.
    """

    crop: NDArray[np.int32]
    corner: NDArray[np.int32]
    flip: NDArray[np.bool_]
    brightness: NDArray[np.float32]
    contrast: NDArray[np.float32]
    saturation: NDArray[np.float32]
    hue: NDArray[np.float32]
    jitter_order: NDArray[np.uint8]
    grayscale: NDArray[np.bool_]
    blur_sigma: NDArray[np.float32]
    solarize: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.flip)

    def rows(self, rows: slice) -> ViewDraws:
        """The draws of some of the samples, sharing memory."""
        return ViewDraws(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def _random_bits(
    seed: int, epoch: int, streams: NDArray[np.uint64], sample_ids: NDArray[np.uint64]
) -> NDArray[np.uint64]:
    """[40, B] numbers below 2**32: two from each of the four words of each Philox block."""
    block = np.arange(_BLOCKS, dtype=np.uint64)[:, None]
    shape = (_BLOCKS, len(sample_ids))
    counters = (
        np.broadcast_to(block, shape),
        np.broadcast_to(sample_ids, shape),
        np.full(shape, epoch, dtype=np.uint64),
        np.broadcast_to(streams, shape),
    )
    words = philox_words((seed, _TAG), counters)
    halves = np.stack([words & np.uint64(0xFFFFFFFF), words >> np.uint64(32)])
    return halves.transpose(2, 1, 0, 3).reshape(8 * _BLOCKS, len(sample_ids))


def _unit(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers below 2**32 to float64 in [0, 1)."""
    return bits.astype(np.float64) * 2.0**-32


def _crop_size(
    area_draw: NDArray[np.float64],
    ratio_draw: NDArray[np.float64],
    sizes: NDArray[np.int64],
    spec: ViewSpec,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """One try per sample: window height, width, and whether the window fits the image. Draws may be
    [tries, B]."""
    height, width = sizes[:, 0], sizes[:, 1]
    smallest, largest = spec.crop_scale
    target = (height * width) * (smallest + (largest - smallest) * area_draw)
    low, high = np.log(spec.crop_ratio[0]), np.log(spec.crop_ratio[1])
    ratio = np.exp(low + (high - low) * ratio_draw)
    crop_width = np.rint(np.sqrt(target * ratio)).astype(np.int64)
    crop_height = np.rint(np.sqrt(target / ratio)).astype(np.int64)
    fits = (crop_width > 0) & (crop_width <= width) & (crop_height > 0) & (crop_height <= height)
    return crop_height, crop_width, fits


def _fallback(sizes: NDArray[np.int64], spec: ViewSpec) -> NDArray[np.int64]:
    """The central window, as large as the ratio limits allow: [B, 4] top, left, height, width."""
    height, width = sizes[:, 0], sizes[:, 1]
    ratio = width / height
    low, high = spec.crop_ratio
    crop_height = np.where(ratio < low, np.rint(width / low).astype(np.int64), height)
    crop_width = np.where(ratio > high, np.rint(height * high).astype(np.int64), width)
    # torchvision can round these to 0 or one past the edge on slivers; a window always lies inside
    # the image here.
    crop_height, crop_width = np.clip(crop_height, 1, height), np.clip(crop_width, 1, width)
    return np.stack(
        [(height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width], axis=1
    )


def _draw_crops(
    bits: NDArray[np.uint64],
    retry_bits: NDArray[np.uint64],
    sizes: NDArray[np.int64],
    spec: ViewSpec,
) -> NDArray[np.int32]:
    """torchvision's RandomResizedCrop: the first of ten tries that fits, else the central fallback;
    [B, 4]. With `crop_misfit="clip"` the first try, cut down to the image.

    Args:
        bits: [4, B]: area and ratio of the first try, then top and left.
        retry_bits: [18, B]: area and ratio of each further try, used by the few samples whose first
            one does not fit.
        sizes: [B, 2] image height and width.
        spec: the view's crop ranges.
    """
    crop_height, crop_width, fits = _crop_size(_unit(bits[0]), _unit(bits[1]), sizes, spec)
    if spec.crop_misfit == "clip":
        crop_height = np.clip(crop_height, 1, sizes[:, 0])
        crop_width = np.clip(crop_width, 1, sizes[:, 1])
        fits = np.ones_like(fits)
    lost = np.flatnonzero(~fits)
    hopeless = lost[:0]
    if len(lost):
        tries = _unit(retry_bits[:, lost]).reshape(_CROP_TRIES - 1, 2, len(lost))
        heights, widths, good = _crop_size(tries[:, 0], tries[:, 1], sizes[lost], spec)
        first = good.argmax(axis=0)
        column = np.arange(len(lost))
        crop_height[lost] = heights[first, column]
        crop_width[lost] = widths[first, column]
        hopeless = lost[~good[first, column]]
    crop = np.empty((len(sizes), 4), dtype=np.int32)
    crop[:, 2] = crop_height
    crop[:, 3] = crop_width
    for axis in range(2):
        room = np.maximum(sizes[:, axis] - crop[:, 2 + axis] + 1, 0).astype(np.uint64)
        crop[:, axis] = (bits[2 + axis] * room) >> np.uint64(32)  # uniform on 0 .. room - 1
    if len(hopeless):
        crop[hopeless] = _fallback(sizes[hopeless], spec)
    return crop


def _corners(
    bits: NDArray[np.uint64], flip: NDArray[np.bool_], spec: ViewSpec
) -> NDArray[np.int32]:
    """[B, 2] top and left of the view in the resized window before its flip, from [2, B] bits.

    The shift counts from the upper left of the flipped window.
    """
    shift = (bits * np.uint64(spec.shift + 1)) >> np.uint64(32)  # uniform on 0 .. spec.shift
    corners = np.ascontiguousarray(shift.T, dtype=np.int32)
    if spec.base_size:
        corners[flip, 1] = spec.base_size - spec.size - corners[flip, 1]
    return corners


def draw_views(
    spec: ViewSpec,
    *,
    seed: int,
    epoch: int,
    sample_ids: NDArray[np.int64],
    sizes: NDArray[np.int32],
    view: int,
    places: NDArray[np.int64] | None = None,
) -> ViewDraws:
    """Draw one view's parameters for a batch.

    The stream of a sample is numpy's Philox 4x64-10 with key (seed, tag) and counter words (block,
    sample, epoch, view + 256 * place); each word gives two 32-bit numbers, low half first. The crop
    window follows torchvision's RandomResizedCrop: up to ten tries of area = H * W * U(crop_scale)
    and ratio = exp(U(log crop_ratio)), rounded to whole pixels, the first that fits at a uniform
    place; failing all, the largest central window within the ratio limits. With `crop_misfit="clip"` it is
    the first, cut down to the image. Window and flip of a
    view with `shares_crop` are those of view 1, from its stream.

    Args:
        spec: what the view is.
        seed: seed of the run, 0 to 2**63 - 1.
        epoch: from 0.
        sample_ids: [B] manifest positions, from 0.
        sizes: [B, 2] height and width of each decoded image, in pixels.
        view: number of the view in its batch, from 1.
        places: [B] 0 for a sample that comes by the epoch's order. One that replaces another
            (`sampling/stand_ins.py`) has 1 plus its position in the epoch here: an image that comes
            twice in an epoch is not cut twice alike. None: all 0.

    Returns:
        The draws; row i depends on `sample_ids[i]`, `sizes[i]` and `places[i]` alone.

    Raises:
        ValueError: if a number is out of its range or the shapes disagree.
    """
    count = len(sample_ids)
    require(0 <= seed < 2**64, "seed", seed, "needs a whole number from 0 to 2**64 - 1")
    require(epoch >= 0, "epoch", epoch, "counts from 0")
    require(1 <= view <= MOST_VIEWS, "view", view, f"views count from 1 to {MOST_VIEWS}")
    require(
        sizes.shape == (count, 2),
        "sizes",
        sizes.shape,
        f"needs one (height, width) per sample: {(count, 2)}",
    )
    if count:
        require(
            int(sample_ids.min()) >= 0,
            "sample_ids",
            int(sample_ids.min()),
            "positions count from 0",
        )
        require(
            int(sizes.min()) >= 1,
            "sizes",
            int(sizes.min()),
            "an image is at least 1 pixel high and wide",
        )

    ids = sample_ids.astype(np.uint64)
    sizes64 = sizes.astype(np.int64)
    streams = np.full(count, view, dtype=np.uint64)
    if places is not None:
        require(
            places.shape == (count,),
            "places",
            places.shape,
            f"needs one number per sample: {(count,)}",
        )
        streams += places.astype(np.uint64) << np.uint64(8)
    bits = _random_bits(seed, epoch, streams, ids)
    unit = _unit(bits[4:16])
    cut = bits
    if spec.shares_crop:
        cut = _random_bits(seed, epoch, streams - np.uint64(view - 1), ids)
    flip = _unit(cut[13]) < spec.flip_probability
    jittered = unit[0] < spec.jitter_probability

    def factor(draw: NDArray[np.float64], strength: float) -> NDArray[np.float32]:
        value = (1 - strength) + 2 * strength * draw
        return np.where(jittered, value, 1).astype(np.float32)

    low, high = spec.blur_sigma
    sigma = low + (high - low) * unit[7]
    return ViewDraws(
        crop=_draw_crops(cut[:4], cut[_RETRIES], sizes64, spec),
        corner=_corners(bits[_SHIFT], flip, spec),
        flip=flip,
        brightness=factor(unit[1], spec.brightness),
        contrast=factor(unit[2], spec.contrast),
        saturation=factor(unit[3], spec.saturation),
        hue=np.where(jittered, spec.hue * (2 * unit[4] - 1), 0).astype(np.float32),
        jitter_order=_ORDERS[(unit[10] * len(_ORDERS)).astype(np.int64)],
        grayscale=unit[5] < spec.grayscale_probability,
        blur_sigma=np.where(unit[6] < spec.blur_probability, sigma, 0).astype(np.float32),
        solarize=unit[8] < spec.solarize_probability,
    )


def draw_batch(
    views: Sequence[ViewSpec],
    *,
    seed: int,
    epoch: int,
    sample_ids: NDArray[np.int64],
    sizes: NDArray[np.int32],
    places: NDArray[np.int64] | None = None,
) -> tuple[ViewDraws, ...]:
    """Draw the parameters of all views of a batch: `draw_views` for each of them, numbered from 1.

    The draws of a view depend on its number and its own spec, not on how many others there are. A
    view with `shares_crop` has the crop ranges of the first in its spec (`require_views`).
    """
    return tuple(
        draw_views(
            view,
            seed=seed,
            epoch=epoch,
            sample_ids=sample_ids,
            sizes=sizes,
            view=number,
            places=places,
        )
        for number, view in enumerate(each_view(views), start=1)
    )
