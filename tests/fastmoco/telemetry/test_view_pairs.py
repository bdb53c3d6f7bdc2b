"""The picture of view pairs shows the levels of the views."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastmoco.telemetry.view_pairs import IMAGES, SIDE, pair_grid
from fastmoco_pipelines.spec import moco_v3_views


def views(size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Twelve images of one level each: 10, 20, ...; in the second view one more."""
    spec = moco_v3_views()[0]
    levels = (torch.arange(12) * 10 + 10).reshape(12, 1, 1, 1).expand(12, 3, size, size)
    both = [levels, levels + 1]
    if dtype == torch.uint8:
        return [level.to(torch.uint8) for level in both]
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (spec.mean, spec.std))
    return [(level / 255 - mean) / std for level in both]


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("size", [28, 224])
def test_a_column_is_an_image_and_a_row_a_view(size, dtype):
    spec = replace(moco_v3_views()[0], size=size)
    picture = pair_grid(views(size, dtype), [spec, spec])
    assert picture.dtype == np.uint8
    rows, columns, _ = picture.shape
    for row in range(2):
        for column in range(IMAGES):
            y, x = rows * (2 * row + 1) // 4, columns * (2 * column + 1) // (2 * IMAGES)
            assert (picture[y, x] == 10 * column + 10 + row).all()
    assert columns > IMAGES * SIDE


def test_one_view_and_few_images():
    spec = moco_v3_views()[0]
    one = pair_grid([torch.zeros(2, 3, 224, 224, dtype=torch.uint8)], [spec])
    assert one.shape[0] < SIDE + 16
    crops = [torch.zeros(3, 3, size, size, dtype=torch.uint8) for size in (224, 224, 96, 96)]
    assert pair_grid(crops, [spec] * 4).shape[0] < 2 * SIDE + 24
