"""Views with one crop, and views that are cut from a resized crop: draws, every path, refusals."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco_pipelines.spec import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ViewSpec,
    cmae_views,
    extrema_views,
    moco_v3_views,
    require_views,
)
from fastmoco_pipelines.views import dali
from fastmoco_pipelines.views.dali import ViewPipeline
from fastmoco_pipelines.views.draws import ViewDraws, draw_batch
from fastmoco_pipelines.views.reference import reference_image, reference_view
from fastmoco_pipelines.views.runtime import has_dali
from tests.pipelines.dali_cases import photographs

COUNT, SIZE = 8, 64
HAS_DALI = has_dali()
PAIRS = {"cmae": cmae_views, "extrema": extrema_views}


def draw(groups, count: int = COUNT, sizes: np.ndarray | None = None) -> tuple[ViewDraws, ...]:
    sizes = np.tile(np.array([[300, 400]], np.int32), (count, 1)) if sizes is None else sizes
    return draw_batch(groups, seed=7, epoch=3, sample_ids=np.arange(count), sizes=sizes)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    encoded = photographs(COUNT, "PNG")
    return [Image.open(io.BytesIO(image.tobytes())).convert("RGB") for image in encoded]


@pytest.fixture(scope="module")
def sizes(images) -> np.ndarray:
    return np.array([image.size[::-1] for image in images], np.int32)


@pytest.mark.parametrize("pair", PAIRS.values())
def test_window_and_flip_are_those_of_the_first_view(pair) -> None:
    first, second = pair(SIZE)
    more = replace(second, copies=2)
    one, two, three, four = draw((first, second, more), 500)
    apart = draw((first, replace(second, shares_crop=False)), 500)[1]
    for other in (two, three, four):
        assert np.array_equal(one.crop, other.crop)
        assert np.array_equal(one.flip, other.flip)
        assert not np.array_equal(one.brightness, other.brightness)
    assert np.array_equal(draw((first,), 500)[0].crop, one.crop)
    # All else comes from the stream of the view itself.
    for name in ("brightness", "hue", "grayscale", "blur_sigma", "jitter_order"):
        assert np.array_equal(getattr(two, name), getattr(apart, name)), name
        assert name == "blur_sigma" or not np.array_equal(getattr(two, name), getattr(three, name))
    assert (two.crop != apart.crop).any(1).mean() > 0.9


def test_the_shift_is_uniform_and_counts_from_the_flipped_corner() -> None:
    online, target = draw(cmae_views(), 20_000)
    assert np.array_equal(online.corner, np.stack([0 * online.flip, 32 * online.flip], 1))
    down, across = target.corner.T.copy()
    across[target.flip] = 32 - across[target.flip]
    for shift in (down, across):
        counts = np.bincount(shift, minlength=32)
        assert len(counts) == 32
        assert abs(counts - 625).max() < 5 * 25
    assert abs(np.corrcoef(down, across)[0, 1]) < 0.03
    assert not any(some.corner.any() for some in draw(moco_v3_views(), 100))


def test_the_numbers_of_the_shift_are_pinned() -> None:
    """Numbers 34 and 35 of the stream of the view itself, numpy's Philox being the stream."""
    _, target = draw(cmae_views(), 5)
    for sample in range(5):
        words = np.random.Philox(
            key=np.array([7, 0x76696577], np.uint64),
            counter=np.array([0, sample, 3, 2], np.uint64),
        ).random_raw(20)
        down, across = int(words[17]) & 0xFFFFFFFF, int(words[17]) >> 32
        corner = [down * 32 >> 32, across * 32 >> 32]
        if target.flip[sample]:
            corner[1] = 32 - corner[1]
        assert target.corner[sample].tolist() == corner


def test_a_shifted_view_is_resize_flip_and_cut(images, sizes) -> None:
    """In the words of the paper: resize the crop to the base, flip it, cut the view."""
    pair = [replace(view, jitter_probability=0, grayscale_probability=0) for view in cmae_views()]
    pair = [replace(view, blur_probability=0) for view in pair]
    online, target = draw(pair, sizes=sizes)
    assert 0 < target.flip.sum() < COUNT
    for i, image in enumerate(images):
        top, left, height, width = online.crop[i].tolist()
        base = image.crop((left, top, left + width, top + height))
        base = base.resize((256, height), Image.Resampling.BICUBIC)
        base = base.resize((256, 256), Image.Resampling.BICUBIC)
        down, across = target.corner[i].tolist()
        if target.flip[i]:
            base = base.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            across = 32 - across
        for draws, spec, box in (
            (online, pair[0], (0, 0, 224, 224)),
            (target, pair[1], (across, down, across + 224, down + 224)),
        ):
            view = reference_image(image, spec, draws, i)
            assert np.array_equal(np.asarray(view), np.asarray(base.crop(box)))


def expected(pair, draws, images) -> list[np.ndarray]:
    return [
        np.stack([reference_view(image, spec, some, i) for i, image in enumerate(images)])
        for spec, some in zip(pair, draws, strict=True)
    ]


def in_levels(view) -> np.ndarray:
    std, mean = (np.array(x)[:, None, None] for x in (IMAGENET_STD, IMAGENET_MEAN))
    return (np.asarray(view) * std + mean) * 255


@pytest.mark.parametrize("with_dali", [True, False])
@pytest.mark.parametrize("name", PAIRS)
def test_exact_views_are_pillows_to_the_bit(name, with_dali, images, sizes, monkeypatch) -> None:
    monkeypatch.setattr(dali, "has_dali", lambda: with_dali and HAS_DALI)
    pair = PAIRS[name](SIZE)
    draws = draw(pair, sizes=sizes)
    pipeline = ViewPipeline(pair, batch_size=COUNT, sub_batch=5, threads=1)
    made = pipeline.run(photographs(COUNT, "PNG"), draws)
    for view, truth in zip(made, expected(pair, draws, images), strict=True):
        np.testing.assert_array_equal(np.rint(in_levels(view)), np.rint(in_levels(truth)))


@pytest.mark.skipif(not HAS_DALI, reason="needs DALI")
def test_the_part_that_dali_resizes_is_pillows(images, sizes) -> None:
    """As near as whole windows are: 0.3 levels in the mean (test_dali.py)."""
    pair = [
        replace(view, color="dali", jitter_probability=0, grayscale_probability=0)
        for view in cmae_views(112)
    ]
    pair = [replace(view, blur_probability=0) for view in pair]
    draws = draw(pair, sizes=sizes)
    made = ViewPipeline(pair, batch_size=COUNT, threads=1).run(photographs(COUNT, "PNG"), draws)
    for view, truth in zip(made, expected(pair, draws, images), strict=True):
        errors = np.abs(in_levels(view) - in_levels(truth)).mean((1, 2, 3))
        assert errors.mean() < 0.3
        assert errors.max() < 0.4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", PAIRS)
def test_views_on_a_gpu_are_those_of_pillow(name, images, sizes) -> None:
    pair = PAIRS[name](112)
    draws = draw(pair, sizes=sizes)
    pipeline = ViewPipeline(pair, batch_size=COUNT, sub_batch=5, device="gpu", device_id=0)
    made = pipeline.run(photographs(COUNT, "PNG"), draws)
    for view, truth in zip(made, expected(pair, draws, images), strict=True):
        assert np.abs(in_levels(view.cpu()) - in_levels(truth)).mean() < 0.5


def test_views_scale_with_their_size() -> None:
    assert [(view.base_size, view.shift) for view in cmae_views()] == [(256, 0), (256, 31)]
    assert [(view.base_size, view.shift) for view in cmae_views(8)] == [(9, 0), (9, 1)]
    for size in range(1, 300):
        cmae_views(size)  # none is refused


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"base_size": 223}, "base_size=223: holds no view of size=224 with shift=0: needs 224"),
        ({"base_size": 230, "shift": 7}, "base_size=230: holds no view of size=224 with shift=7"),
        ({"shift": 1}, "base_size=0: holds no view of size=224 with shift=1: needs 225 pixels"),
        ({"base_size": -1}, "base_size=-1"),
        ({"base_size": 256, "shift": -1}, "shift=-1: counts pixels"),
        ({"base_size": 20_000}, "base_size=20000: a window is resized to at most 16,384"),
    ],
)
def test_a_base_that_holds_no_view_is_refused(change, text) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        ViewSpec(**change)


def test_a_crop_that_cannot_be_shared_is_refused() -> None:
    first, second = extrema_views(SIZE)
    with pytest.raises(ValueError, match="the first view has its own crop"):
        require_views((second, first), "views")
    with pytest.raises(ValueError, match="the first view has its own crop"):
        require_views((replace(first, copies=0), second), "views")
    for change in ({"crop_scale": (0.3, 1)}, {"crop_ratio": (1, 1)}, {"flip_probability": 0}):
        (name,) = change
        rule = f"{name} of the groups with shares_crop: must be the first view's, "
        with pytest.raises(ValueError, match=re.escape(rule)):
            require_views((replace(first, **change), second), "views")
        require_views((replace(first, **change), replace(second, copies=0)), "views")
