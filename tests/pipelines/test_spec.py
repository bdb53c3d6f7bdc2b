"""The published views: what the functions of `spec.py` return."""

from __future__ import annotations

import pytest

from fastmoco_pipelines import (
    ViewSpec,
    dino_views,
    moco_v1_views,
    moco_v2_views,
    moco_v3_views,
    simsiam_views,
    swav_views,
)
from fastmoco_pipelines.spec import SWAV_STD, each_view

JITTER = ("jitter_probability", "brightness", "contrast", "saturation", "hue")


def jitter(view: ViewSpec) -> tuple[float, ...]:
    return tuple(getattr(view, name) for name in JITTER)


def test_dino_blurs_and_solarizes_by_the_kind_of_crop() -> None:
    first, second, small = dino_views()
    assert [view.size for view in each_view((first, second, small))] == [224, 224] + [96] * 8
    assert [view.crop_scale for view in (first, second, small)] == [
        (0.4, 1.0),
        (0.4, 1.0),
        (0.05, 0.4),
    ]
    assert [view.blur_probability for view in (first, second, small)] == [1.0, 0.1, 0.5]
    assert [view.solarize_probability for view in (first, second, small)] == [0.0, 0.2, 0.0]
    for view in (first, second, small):
        assert jitter(view) == (0.8, 0.4, 0.4, 0.2, 0.1)
        assert (view.grayscale_probability, view.flip_probability) == (0.2, 0.5)
        assert view.interpolation == "bicubic"
        assert view.blur_sigma == (0.1, 2.0)  # in pixels, at 96 as at 224
    scaled = dino_views(112, 48, 2, global_scale=(0.25, 1.0), local_scale=(0.05, 0.25))
    assert [view.size for view in each_view(scaled)] == [112, 112, 48, 48]
    assert scaled[2].blur_sigma == scaled[0].blur_sigma == pytest.approx((0.05, 1.0))
    assert scaled[1].crop_scale == (0.25, 1.0)
    assert scaled[2].crop_scale == (0.05, 0.25)


def test_swav_has_strong_color_and_its_own_deviation() -> None:
    views = swav_views()
    assert [view.size for view in each_view(views)] == [224, 224] + [96] * 6
    assert [view.crop_scale for view in views] == [(0.14, 1.0), (0.14, 1.0), (0.05, 0.14)]
    for view in views:
        assert jitter(view) == (0.8, 0.8, 0.8, 0.8, 0.2)
        assert (view.grayscale_probability, view.blur_probability) == (0.2, 0.5)
        assert (view.blur_sigma, view.solarize_probability) == ((0.1, 2.0), 0.0)
        assert (view.std, view.interpolation) == (SWAV_STD, "bilinear")


@pytest.mark.parametrize("views", [dino_views, swav_views])
def test_without_small_crops_the_large_ones_are_the_same(views) -> None:
    assert views(local_copies=0) == views()[:2]


def test_moco_and_simsiam_draw_both_views_from_one_distribution() -> None:
    first, second = moco_v2_views()
    assert first == second
    assert simsiam_views() == (first, first)
    assert jitter(first) == (0.8, 0.4, 0.4, 0.4, 0.1)
    assert (first.crop_scale, first.grayscale_probability) == ((0.2, 1.0), 0.2)
    assert (first.blur_probability, first.blur_sigma) == (0.5, (0.1, 2.0))
    old, same = moco_v1_views(112, crop_min=0.3)
    assert old == same
    assert jitter(old) == (1.0, 0.4, 0.4, 0.4, 0.4)
    assert (old.size, old.crop_scale) == (112, (0.3, 1.0))
    assert (old.grayscale_probability, old.blur_probability) == (0.2, 0.0)


def test_the_pair_of_moco_v3_stays_what_it_was() -> None:
    first, second = moco_v3_views()
    assert first == ViewSpec()
    assert (second.blur_probability, second.solarize_probability) == (0.1, 0.2)


def test_an_unknown_filter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"interpolation='cubic': is \"bilinear\" or \"bicubic\""):
        ViewSpec(interpolation="cubic")
