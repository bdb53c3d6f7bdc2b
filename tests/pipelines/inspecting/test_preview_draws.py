"""What was drawn, in words: everything that changes a view is told, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastmoco_pipelines.inspecting.preview import describe_draws, put_beside, save_view_grid
from fastmoco_pipelines.spec import ViewSpec, moco_v3_views
from fastmoco_pipelines.views.draws import draw_views

STILL = {
    "jitter_probability": 0,
    "grayscale_probability": 0,
    "blur_probability": 0,
    "flip_probability": 0,
}


def described(spec: ViewSpec, count: int = 1) -> list[str]:
    sizes = np.tile(np.array([[40, 60]], np.int32), (count, 1))
    draws = draw_views(spec, seed=3, epoch=0, sample_ids=np.arange(count), sizes=sizes, view=1)
    return [describe_draws(draws, i, sizes[i]) for i in range(count)]


def test_a_view_that_is_left_alone_has_a_crop_and_nothing_else():
    spec = ViewSpec(crop_scale=(1.0, 1.0), crop_ratio=(1.5, 1.5), **STILL)
    assert described(spec) == ["crop 60x40 at 0,0 = 1.00 of the image"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"jitter_probability": 1}, " b "),
        ({"grayscale_probability": 1}, ", grey"),
        ({"blur_probability": 1}, ", sigma "),
        ({"solarize_probability": 1}, ", solarize"),
        ({"base_size": 324, "flip_probability": 1}, ", view at 100,0 of the resized crop"),
        ({"flip_probability": 1}, ", flip"),
    ],
)
def test_each_operation_is_told(changes, word):
    assert all(word in line for line in described(ViewSpec(**(STILL | changes)), 5))
    assert not any(word in line for line in described(ViewSpec(**STILL), 5))


def test_lines_stand_beside_their_rows():
    picture = Image.new("RGB", (50, 200), "red")
    wide = put_beside(picture, [["first", "second"], []], 100)
    pixels = np.asarray(wide)
    assert wide.height == 200
    assert np.array_equal(pixels[:, :50], np.asarray(picture))
    assert (pixels[:100, 50:] < 128).any()
    assert (pixels[100:, 50:] == 255).all()


def test_the_grid_itself_does_not_change(packed, tmp_path):
    plain, told = (
        np.asarray(
            Image.open(
                save_view_grid(
                    str(packed), moco_v3_views(32), tmp_path / f"{p}.png", rows=2, parameters=p
                )
            )
        )
        for p in (False, True)
    )
    assert told.shape[1] > plain.shape[1] + 200
    assert np.array_equal(told[:, : plain.shape[1]], plain)
