"""The draws against a plain scalar version on numpy's own generator, their independence, and their
distributions."""

import dataclasses
import math

import numpy as np
import pytest

from fastmoco_pipelines.sampling.philox import philox_words
from fastmoco_pipelines.spec import ViewSpec, moco_v3_views
from fastmoco_pipelines.views.draws import ViewDraws, draw_views

VIEW = moco_v3_views()[1]  # the one that leaves no probability at 0 or 1
PINNED = {
    "crop": [[5, 226, 313, 274], [11, 69, 327, 394]],
    "jitter_order": [[1, 0, 2, 3], [2, 1, 0, 3]],
    "brightness": [1.2930075, 0.7268896],
    "hue": [-0.08001418, -0.07423711],
}


def draw(
    spec: ViewSpec = VIEW,
    *,
    count: int = 200,
    seed: int = 7,
    epoch: int = 3,
    view: int = 1,
    **other,
) -> ViewDraws:
    ids = other.get("ids", np.arange(count))
    sizes = other.get("sizes", np.tile(np.array([[375, 500]], dtype=np.int32), (len(ids), 1)))
    return draw_views(spec, seed=seed, epoch=epoch, sample_ids=ids, sizes=sizes, view=view)


def rows(draws: ViewDraws, index) -> list[np.ndarray]:
    return [getattr(draws, field.name)[index] for field in dataclasses.fields(draws)]


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def plain_draw(
    spec: ViewSpec, *, seed: int, epoch: int, sample: int, view: int, height: int, width: int
) -> dict:
    """One sample by the book: numpy's Philox object, one number after the other, torchvision's loop
    for the crop."""
    key = np.array([seed, 0x76696577], dtype=np.uint64)
    words = np.random.Philox(
        key=key, counter=np.array([0, sample, epoch, view], dtype=np.uint64)
    ).random_raw(20)
    halves = [
        int(half)
        for word in words
        for half in (word & np.uint64(0xFFFFFFFF), word >> np.uint64(32))
    ]
    unit = [half / 2**32 for half in halves]
    tries = [(unit[0], unit[1])] + [(unit[16 + 2 * k], unit[17 + 2 * k]) for k in range(9)]
    for area_draw, ratio_draw in tries:
        area = (
            height
            * width
            * (spec.crop_scale[0] + (spec.crop_scale[1] - spec.crop_scale[0]) * area_draw)
        )
        low, high = (math.log(limit) for limit in spec.crop_ratio)
        ratio = math.exp(low + (high - low) * ratio_draw)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if spec.crop_misfit == "clip":
            w, h = min(max(1, w), width), min(max(1, h), height)
        if 0 < w <= width and 0 < h <= height:
            top, left = halves[2] * (height - h + 1) >> 32, halves[3] * (width - w + 1) >> 32
            break
    else:
        w, h = width, height
        if width / height < spec.crop_ratio[0]:
            h = round(width / spec.crop_ratio[0])
        elif width / height > spec.crop_ratio[1]:
            w = round(height * spec.crop_ratio[1])
        top, left = (height - h) // 2, (width - w) // 2
    jitter = unit[4] < spec.jitter_probability
    strengths = (spec.brightness, spec.contrast, spec.saturation)
    factors = [
        1 - s + 2 * s * u if jitter else 1 for s, u in zip(strengths, unit[5:8], strict=True)
    ]
    sigma = spec.blur_sigma[0] + (spec.blur_sigma[1] - spec.blur_sigma[0]) * unit[11]
    return {
        "crop": (top, left, h, w),
        "brightness": factors[0],
        "contrast": factors[1],
        "saturation": factors[2],
        "hue": spec.hue * (2 * unit[8] - 1) if jitter else 0,
        "grayscale": unit[9] < spec.grayscale_probability,
        "blur_sigma": sigma if unit[10] < spec.blur_probability else 0,
        "solarize": unit[12] < spec.solarize_probability,
        "flip": unit[13] < spec.flip_probability,
    }


def test_philox_equals_numpy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        key = rng.integers(0, 2**64, size=2, dtype=np.uint64)
        counters = rng.integers(0, 2**64 - 2, size=(4, 3, 5), dtype=np.uint64)
        words = philox_words((int(key[0]), int(key[1])), tuple(counters))
        assert words.shape == (4, 3, 5)
        for place in np.ndindex(3, 5):
            stream = np.random.Philox(key=key, counter=counters[(slice(None), *place)].copy())
            assert np.array_equal(words[(slice(None), *place)], stream.random_raw(4))


@pytest.mark.parametrize("misfit", ["retry", "clip"])
def test_draws_equal_the_plain_version(misfit) -> None:
    # Photographs, slivers (every try fails, both fallbacks), and images of a few pixels (many tries
    # fail).
    shapes = [
        (375, 500),
        (500, 333),
        (8, 8),
        (28, 28),
        (1, 1),
        (3, 200),
        (200, 3),
        (20, 500),
        (64, 40),
    ]
    ids = np.arange(360) * 1_000_003
    sizes = np.array([shapes[i % len(shapes)] for i in range(len(ids))], dtype=np.int32)
    spec = dataclasses.replace(VIEW, crop_misfit=misfit)
    for view in (1, 2):
        draws = draw(spec, ids=ids, sizes=sizes, view=view, seed=2**63 - 1)
        for i, sample in enumerate(ids.tolist()):
            height, width = (int(n) for n in sizes[i])
            plain = plain_draw(
                spec, seed=2**63 - 1, epoch=3, sample=sample, view=view, height=height, width=width
            )
            for name, value in plain.items():
                drawn = getattr(draws, name)[i]
                assert np.array_equal(drawn, np.asarray(value, dtype=drawn.dtype)), (
                    name,
                    i,
                    drawn,
                    value,
                )


def test_stream_is_pinned() -> None:
    """A run resumed with a later version must see the same views: these numbers never change."""
    draws = draw(ids=np.array([0, 123456]), seed=1, epoch=2, view=2)
    assert draws.crop.tolist() == PINNED["crop"]
    assert draws.jitter_order.tolist() == PINNED["jitter_order"]
    np.testing.assert_allclose(draws.brightness, PINNED["brightness"], rtol=1e-6)
    np.testing.assert_allclose(draws.hue, PINNED["hue"], rtol=1e-5)


def test_a_sample_does_not_depend_on_its_neighbours() -> None:
    sizes = np.random.default_rng(0).integers(1, 40, size=(200, 2)).astype(np.int32)
    whole = draw(sizes=sizes)
    order = np.random.default_rng(1).permutation(200)
    shuffled = draw(ids=order, sizes=sizes[order])
    assert equal(rows(whole, order), rows(shuffled, slice(None)))
    alone = draw(ids=np.array([17]), sizes=sizes[17:18])
    assert equal(rows(whole, slice(17, 18)), rows(alone, slice(None)))


@pytest.mark.parametrize(
    "change", [{"seed": 8}, {"epoch": 4}, {"view": 2}, {"ids": np.arange(200) + 200}]
)
def test_every_coordinate_changes_the_draws(change: dict) -> None:
    one, other = draw(), draw(**change)
    assert np.mean(np.all(one.crop == other.crop, axis=1)) < 0.02
    assert (
        np.mean(one.blur_sigma[one.blur_sigma > 0] == other.blur_sigma[one.blur_sigma > 0]) < 0.02
    )
    assert 0.3 < np.mean(one.flip == other.flip) < 0.7


def test_one_probability_does_not_move_the_other_draws() -> None:
    one = draw()
    other = draw(
        dataclasses.replace(
            VIEW, blur_probability=0.9, grayscale_probability=0.0, flip_probability=1.0
        )
    )
    for name in ("crop", "brightness", "contrast", "saturation", "hue", "jitter_order", "solarize"):
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    was_blurred = one.blur_sigma > 0
    assert np.array_equal(one.blur_sigma[was_blurred], other.blur_sigma[was_blurred])


def test_distributions() -> None:
    """20,000 draws: rates within five standard errors, ranges kept and filled."""
    count = 20_000
    draws = draw(count=count)
    jittered = draws.brightness != 1
    rates = {
        "flip": (draws.flip, 0.5),
        "jitter": (jittered, 0.8),
        "grayscale": (draws.grayscale, 0.2),
        "blur": (draws.blur_sigma > 0, 0.1),
        "solarize": (draws.solarize, 0.2),
    }
    for name, (flags, rate) in rates.items():
        assert abs(flags.mean() - rate) < 5 * math.sqrt(rate * (1 - rate) / count), name
    blurred = draws.blur_sigma[draws.blur_sigma > 0]
    ranges = [
        (draws.brightness[jittered], 0.6, 1.4),
        (draws.contrast[jittered], 0.6, 1.4),
        (draws.saturation[jittered], 0.8, 1.2),
        (draws.hue[jittered], -0.1, 0.1),
        (blurred, 0.1, 2.0),
    ]
    for values, low, high in ranges:
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high + 1e-6
        assert abs(values.mean() - (low + high) / 2) < 5 * (high - low) / math.sqrt(
            12 * len(values)
        )
    assert not draws.hue[~jittered].any()
    _, counts = np.unique(draws.jitter_order, axis=0, return_counts=True)
    assert len(counts) == 24
    assert abs(counts - count / 24).max() < 5 * math.sqrt(count / 24)
    share = draws.crop[:, 2] * draws.crop[:, 3] / (375 * 500)
    assert 0.079 < share.min() < 0.085
    assert share.max() > 0.98


def test_a_crop_lies_inside_its_image() -> None:
    rng = np.random.default_rng(0)
    sizes = np.concatenate(
        [rng.integers(1, 12, (2000, 2)), rng.integers(1, 3000, (2000, 2))]
    ).astype(np.int32)
    for scale, ratio in (
        ((0.08, 1.0), (3 / 4, 4 / 3)),
        ((1.0, 1.0), (1.0, 1.0)),
        ((0.001, 0.01), (0.1, 10.0)),
    ):
        spec = ViewSpec(crop_scale=scale, crop_ratio=ratio)
        crop = draw(spec, ids=np.arange(4000), sizes=sizes).crop
        assert (crop[:, :2] >= 0).all()
        assert (crop[:, 2:] >= 1).all()
        assert (crop[:, :2] + crop[:, 2:] <= sizes).all()


def test_an_empty_batch_has_no_draws() -> None:
    assert len(draw(ids=np.arange(0), sizes=np.zeros((0, 2), dtype=np.int32))) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"view": 0}, "view=0"),
        ({"view": 256}, "view=256: views count from 1 to 255"),
        ({"epoch": -1}, "epoch=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"ids": np.array([-5])}, "sample_ids=-5"),
        ({"sizes": np.ones((3, 2), dtype=np.int32)}, r"sizes=\(3, 2\)"),
        ({"sizes": np.zeros((200, 2), dtype=np.int32)}, "sizes=0"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(**change)
