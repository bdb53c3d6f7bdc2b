"""Photographs and draws for the tests of DALI's pipelines."""

from __future__ import annotations

import functools
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmoco_pipelines.spec import ViewSpec
from fastmoco_pipelines.views.draws import ViewDraws, draw_views

NOTHING = {
    "flip_probability": 0,
    "jitter_probability": 0,
    "grayscale_probability": 0,
    "blur_probability": 0,
    "solarize_probability": 0,
}
JITTER = {
    **NOTHING,
    "jitter_probability": 1,
    "brightness": 0,
    "contrast": 0,
    "saturation": 0,
    "hue": 0,
}
"""Options of a `ViewSpec` that change nothing but crop and size; `JITTER` jitters, by nothing yet."""


@functools.cache
def photographs(count: int, kind: str = "JPEG") -> list[NDArray[np.uint8]]:
    """Pieces of the two photographs of scikit-learn (CC-BY), 100 to 300
    pixels per side, encoded.
    """
    from sklearn.datasets import load_sample_images

    rng, pieces = np.random.default_rng(0), []
    for i in range(count):
        levels = load_sample_images().images[i % 2]
        height, width = rng.integers(100, 300, size=2)
        top, left = (
            rng.integers(0, levels.shape[0] - height),
            rng.integers(0, levels.shape[1] - width),
        )
        out = io.BytesIO()
        Image.fromarray(levels[top : top + height, left : left + width]).save(out, kind)
        pieces.append(np.frombuffer(out.getvalue(), dtype=np.uint8))
    return pieces


def draw(
    spec: ViewSpec, encoded: list[NDArray[np.uint8]], *, view: int = 1, seed: int = 0
) -> ViewDraws:
    """The draws of the first epoch, image i being sample i."""
    sizes = np.array(
        [Image.open(io.BytesIO(image.tobytes())).size[::-1] for image in encoded], dtype=np.int32
    )
    return draw_views(
        spec, seed=seed, epoch=0, sample_ids=np.arange(len(encoded)), sizes=sizes, view=view
    )
