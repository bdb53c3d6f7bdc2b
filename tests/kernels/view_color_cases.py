"""Images and parameters for the tests of view_color, and Pillow's results."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch
from PIL import Image

from fastmoco_kernels.view_color.plan import ViewColorParameters
from fastmoco_pipelines.views import reference

ORDERS = np.array(list(permutations(range(4))), dtype=np.uint8)
LEVELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
"""Normalisation that gives the levels themselves."""


def pictures(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """[count, H, W, 3] uint8: noise of all colors, dark noise, and almost grey
    pixels, with the least certain hues.
    """
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    images[1::4] //= 5
    images[2::4] = images[2::4, ..., :1] // 2 + rng.integers(
        0, 40, images[2::4].shape, dtype=np.uint8
    )
    return torch.from_numpy(images)


def drawn(count: int, seed: int = 0, **changes: object) -> ViewColorParameters:
    """MoCo v3's ranges and beyond, the 24 orders in turn; one image in five is not jittered."""
    rng = np.random.default_rng(seed)
    jitter = rng.random(count) < 0.8

    def uniform(low: float, high: float, where: np.ndarray, otherwise: float) -> torch.Tensor:
        return torch.from_numpy(
            np.where(where, rng.uniform(low, high, count), otherwise).astype(np.float32)
        )

    parameters = ViewColorParameters(
        brightness=uniform(0.3, 1.7, jitter, 1),
        contrast=uniform(0.3, 1.7, jitter, 1),
        saturation=uniform(0.0, 2.0, jitter, 1),
        hue=uniform(-0.5, 0.5, jitter, 0),
        order=torch.from_numpy(ORDERS[np.arange(count) % 24]),
        grayscale=torch.from_numpy(rng.random(count) < 0.2),
        blur_sigma=uniform(0.1, 3.0, rng.random(count) < 0.5, 0),
        solarize=torch.from_numpy(rng.random(count) < 0.3),
        flip=torch.from_numpy(rng.random(count) < 0.5),
    )
    return parameters._replace(**changes)


def by_pillow(
    images: torch.Tensor, parameters: ViewColorParameters, threshold: int = 128
) -> torch.Tensor:
    """[B, 3, H, W] float32 levels."""
    done = [np.asarray(_one(image, parameters, i, threshold)) for i, image in enumerate(images)]
    return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2).float()


def _one(levels: torch.Tensor, p: ViewColorParameters, i: int, threshold: int) -> Image.Image:
    image = Image.fromarray(levels.contiguous().numpy())
    for operation in p.order[i].tolist():
        if operation == 0:
            image = reference.adjust_brightness(image, float(p.brightness[i]))
        elif operation == 1:
            image = reference.adjust_contrast(image, float(p.contrast[i]))
        elif operation == 2:
            image = reference.adjust_saturation(image, float(p.saturation[i]))
        elif p.hue[i] != 0:  # Pillow's conversion to HSV and back is lossy
            image = reference.adjust_hue(image, float(p.hue[i]))
    image = reference.to_grayscale(image) if p.grayscale[i] else image
    image = reference.gaussian_blur(image, float(p.blur_sigma[i])) if p.blur_sigma[i] > 0 else image
    image = reference.solarize(image, threshold) if p.solarize[i] else image
    return reference.flip_horizontally(image) if p.flip[i] else image
