"""Histograms of oriented gradients against golden numbers, their reference and known images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmoco.objectives.hog import hog, hog_targets, plain_hog
from tests.golden_objective import error, read_sibling_b


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_histograms_match_golden() -> None:
    data = read_sibling_b("maskfeat")
    x = torch.from_numpy(data["x"])
    assert error(hog(x.double()), data["hog"]) <= 1e-9
    assert error(plain_hog(x.double()), data["hog"]) <= 1e-9
    assert error(hog(x), data["hog_float32"]) <= 1e-6
    masked = torch.from_numpy(data["mask"]).bool().flatten(1)
    assert error(hog_targets(x.double(), 16)[masked], data["labels"]) <= 1e-9


@pytest.mark.parametrize(("cell", "size"), [(8, (16, 24)), (2, (8, 8)), (7, (28, 14))])
def test_the_fast_form_is_the_reference(cell: int, size: tuple[int, int]) -> None:
    images = noise(3, 2, *size)
    ours = hog(images, cell)
    assert ours.shape == (3, 2, 9, size[0] // cell, size[1] // cell)
    assert torch.allclose(ours, plain_hog(images, cell), rtol=0, atol=1e-12)


def test_targets_are_the_cells_of_each_patch() -> None:
    """In the order channel, bin, row and column of the cell."""
    images = noise(2, 3, 16, 24)
    cells, targets = hog(images, 4), hog_targets(images, 8, 4)
    assert targets.shape == (2, 6, 108)
    for patch in range(6):
        row, column = divmod(patch, 3)
        own = cells[..., 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(targets[:, patch], own.flatten(1))


def test_the_bin_is_the_direction_of_the_gradient_without_its_sign() -> None:
    """Of a slope to the right, down and to either diagonal; a slope of opposite sign has the same."""
    across = torch.arange(16.0).expand(1, 1, 16, 16)
    for image, number in (
        (across, 4),
        (across.mT, 0),
        (across + across.mT, 2),
        (across - across.mT, 6),
    ):
        for signed in (image, -image):
            inside = hog(signed, 2)[0, 0, :, 2:-2, 2:-2]
            assert (inside.argmax(dim=0) == number).all()
            assert torch.allclose(inside.square().sum(dim=0), torch.ones(()))
    assert hog(torch.full((1, 3, 8, 8), 0.7)).abs().max() == 0


def test_it_is_in_float32_under_autocast_and_has_no_gradient() -> None:
    images = noise(2, 3, 16, 16).float().requires_grad_()
    expected = hog(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for found in (hog(images), hog_targets(images, 16)):
            assert (found.dtype, found.requires_grad) == (torch.float32, False)
        assert torch.equal(hog(images), expected)
        assert torch.allclose(plain_hog(images), expected, rtol=0, atol=1e-5)
    assert hog(images.detach().bfloat16()).dtype == torch.float32


def test_equal_columns_have_no_gradient_across() -> None:
    """Levels of a picture are no round numbers; rounding must not choose between bins 0 and 8."""
    rows = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (64, 1)) / 255)
    image = ((rows.float() - 0.485) / 0.229).expand(1, 1, 64, 64)
    assert hog(image)[:, :, 1:].abs().max() == 0


def test_cells_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of cell=5"):
        hog(noise(1, 3, 16, 16), 5)
    with pytest.raises(ValueError, match=r"side=16: must be a multiple of cell=3"):
        hog_targets(noise(1, 3, 16, 16), 16, 3)
    with pytest.raises(ValueError, match=r"side=12.*divide images of 16 x 16"):
        hog_targets(noise(1, 3, 16, 16), 12, 4)
