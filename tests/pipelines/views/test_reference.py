"""The PIL reference against stored arrays: blur and solarize of the original loader, the rest of
torchvision's backend."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco_pipelines.spec import EvalSpec, ViewSpec
from fastmoco_pipelines.views import reference
from fastmoco_pipelines.views.draws import draw_views

GOLDEN = np.load(Path(__file__).parents[2] / "golden" / "aug.npz")
IMAGE = Image.fromarray(GOLDEN["img"])


def same(made: Image.Image, stored: str) -> None:
    np.testing.assert_array_equal(np.asarray(made), GOLDEN[stored])


@pytest.mark.parametrize("i", range(5))
def test_blur_is_the_stored_one(i: int) -> None:
    same(reference.gaussian_blur(IMAGE, float(GOLDEN[f"blur{i}_sigma"])), f"blur{i}")


@pytest.mark.parametrize("i", range(2))
def test_hue_is_the_stored_one(i: int) -> None:
    same(reference.adjust_hue(IMAGE, float(GOLDEN[f"hue{i}_factor"])), f"hue{i}")


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_jitter_is_the_stored_one(name: str) -> None:
    same(getattr(reference, f"adjust_{name}")(IMAGE, float(GOLDEN[f"{name}_factor"])), name)


def test_solarize_and_greyscale_are_the_stored_ones() -> None:
    same(reference.solarize(IMAGE), "solarize")
    same(reference.to_grayscale(IMAGE), "gray")


@pytest.mark.parametrize(("name", "size"), [("crop_resized_20", 20), ("crop_upsized_40", 40)])
def test_crop_and_resize_is_the_stored_one(name: str, size: int) -> None:
    left, top, right, bottom = GOLDEN["crop_box_ltrb"].tolist()
    same(reference.crop_and_resize(IMAGE, (top, left, bottom - top, right - left), size), name)


def test_normalise_is_the_stored_one() -> None:
    made = reference.normalise(IMAGE, ViewSpec())
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, GOLDEN["normalized"], atol=1e-6)


def test_a_view_is_its_operations_in_order() -> None:
    spec = ViewSpec(
        color="dali",  # the order of the jitter is fixed
        size=20,
        jitter_probability=1,
        grayscale_probability=0.5,
        solarize_probability=0.5,
        blur_sigma=(1, 2),
    )
    sizes = np.array([[36, 40]] * 32, dtype=np.int32)
    draws = draw_views(spec, seed=0, epoch=0, sample_ids=np.arange(32), sizes=sizes, view=1)
    for flags in (draws.grayscale, draws.solarize, draws.flip):
        assert 0 < flags.mean() < 1  # both kinds occur
    for i in range(32):
        top, left, height, width = draws.crop[i].tolist()
        box = (left, top, left + width, top + height)
        view = IMAGE.crop(box).resize(
            (20, height), Image.Resampling.BILINEAR
        )  # rows first, whatever the version
        view = view.resize((20, 20), Image.Resampling.BILINEAR)
        view = reference.adjust_brightness(view, float(draws.brightness[i]))
        view = reference.adjust_contrast(view, float(draws.contrast[i]))
        view = reference.adjust_saturation(view, float(draws.saturation[i]))
        view = reference.adjust_hue(view, float(draws.hue[i]))
        view = reference.to_grayscale(view) if draws.grayscale[i] else view
        view = reference.gaussian_blur(view, float(draws.blur_sigma[i]))
        view = reference.solarize(view) if draws.solarize[i] else view
        levels = np.asarray(view)[:, ::-1] if draws.flip[i] else np.asarray(view)
        expected = (levels / 255 - np.array(spec.mean)) / np.array(spec.std)
        made = reference.reference_view(GOLDEN["img"], spec, draws, i)
        assert made.shape == (3, 20, 20)
        np.testing.assert_allclose(made, expected.transpose(2, 0, 1), atol=1e-5)


def test_eval_view_is_the_central_part() -> None:
    spec = EvalSpec(
        size=30, resize=36, mean=(0, 0, 0), std=(1, 1, 1)
    )  # the shorter side is 36 already: no resize
    made = reference.reference_eval(IMAGE, spec)
    np.testing.assert_allclose(made * 255, GOLDEN["img"][3:33, 5:35].transpose(2, 0, 1), atol=1e-3)
