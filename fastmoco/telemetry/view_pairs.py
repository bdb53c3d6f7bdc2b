"""A picture of the views of a batch: a column for each image, its first view above its second."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastmoco_pipelines.inspecting.preview import denormalise, fit_into
from fastmoco_pipelines.spec import ViewSpec

IMAGES = 8
"""Columns, at most."""
SIDE = 112
"""Pixels of a view."""
_GAP = 4


def pair_grid(views: Sequence[Tensor], specs: Sequence[ViewSpec]) -> NDArray[np.uint8]:
    """Draw the first views of the first images. Waits for the device.

    Args:
        views: each [B, 3, H, W], float32 and normalised, or uint8 levels.
        specs: of these views.

    Returns:
        [H, W, 3] RGB, two rows, or one for a run with one view.
    """
    count = min(IMAGES, len(views[0]))
    pairs = list(zip(views, specs, strict=True))[:2]
    step = SIDE + _GAP
    canvas = Image.new("RGB", (count * step + _GAP, len(pairs) * step + _GAP), "white")
    for row, (view, spec) in enumerate(pairs):
        part = view[:count].detach().cpu()
        whole = not part.is_floating_point()
        levels = part.permute(0, 2, 3, 1).numpy() if whole else denormalise(part.float(), spec)
        for column, pixels in enumerate(levels):
            image = fit_into(Image.fromarray(np.ascontiguousarray(pixels)), SIDE)
            left = _GAP + column * step + (SIDE - image.width) // 2
            canvas.paste(image, (left, _GAP + row * step + (SIDE - image.height) // 2))
    return np.asarray(canvas)
