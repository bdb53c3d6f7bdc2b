"""Histograms of oriented gradients, the targets of MaskFeat (Wei et al. 2022, section 3; after Dalal
and Triggs 2005).

Of each channel alone: the gradient by Sobel filters, its length added to one of 9 bins by its
direction without sign, sums over cells, and the 9 numbers of a cell scaled to length 1. There are
no overlapping blocks, no shares between neighbouring bins, no clipping and no Gaussian window.

Directions are discontinuous: a horizontal gradient of rounding noise chooses between the first bin
and the last. So all of it is in float32 at least, also under autocast, and columns of equal numbers
have a gradient of exactly 0: each filter is a sum along one axis, and then a difference along the
other one. `plain_hog` is the reference, with convolutions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 9
"""Directions between 0 and 180 degrees."""
SMALLEST = 1e-12
"""Least length that a cell is divided by."""


@torch.no_grad()
def hog(images: Tensor, cell: int = 8) -> Tensor:
    """The histogram of each cell and channel.

    With u = (1, 2, 1) along one axis and (1, 0, -1) along the other, on images with one reflected
    pixel around: gx is the left minus the right column, gy the upper minus the lower row. The bin of
    a pixel is floor(9 atan2(gx, gy) / pi) mod 9, and counts sqrt(gx^2 + gy^2).

    Args:
        images: [B, C, H, W], floating point, normalised as the encoder reads them.
        cell: side of a cell in pixels, which divides H and W.

    Returns:
        [B, C, 9, H / cell, W / cell], float32 or wider, without gradient: rows of length 1 along the
        bins, or 0 where nothing changes. Takes memory for one bin at a time.

    Raises:
        ValueError: if the cells do not fill the images, or images have one pixel a side.

    Example:
        >>> import torch
        >>> from fastmoco.objectives.hog import hog
        >>> hog(torch.arange(16.0).expand(1, 3, 16, 16))[0, 0, :, 0, 0].tolist()
        [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    """
    padded = _padded(images, cell)
    rows = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    columns = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    gx = rows[..., :-2] - rows[..., 2:]
    gy = columns[:, :, :-2] - columns[:, :, 2:]
    lengths = (gx.square() + gy.square()).sqrt()
    bins = _bins(gx, gy)
    B, C, H, W = images.shape

    # A bin at a time: a sum by index would add in another order each time on a GPU.
    sums = [
        torch.where(bins == number, lengths, 0)
        .view(B, C, H // cell, cell, W // cell, cell)
        .sum(dim=(3, 5))
        for number in range(BINS)
    ]
    return F.normalize(torch.stack(sums, dim=2), dim=2, eps=SMALLEST)


@torch.no_grad()
def plain_hog(images: Tensor, cell: int = 8) -> Tensor:
    """Reference of `hog`: two convolutions of each channel, and all bins at once."""
    padded = _padded(images, cell)
    B, C, H, W = images.shape
    filters = padded.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    channels = padded.reshape(B * C, 1, H + 2, W + 2)
    with torch.autocast(images.device.type, enabled=False):
        gx = F.conv2d(channels, filters[None, None])
        gy = F.conv2d(channels, filters.T[None, None])
    numbers = torch.arange(BINS, device=images.device)[:, None, None]
    lengths = (gx.square() + gy.square()).sqrt() * (_bins(gx, gy) == numbers)
    sums = F.avg_pool2d(lengths, cell) * cell**2
    return F.normalize(sums.view(B, C, BINS, H // cell, W // cell), dim=2, eps=SMALLEST)


def hog_targets(images: Tensor, side: int, cell: int = 8) -> Tensor:
    """The histograms of each patch.

    Args:
        images: [B, C, H, W].
        side: p, pixels per side of a patch, a multiple of `cell` that divides H and W.
        cell: as for `hog`.

    Returns:
        [B, L, C * 9 * (p / cell)^2], patches row by row; inside a patch by channel, bin, row and
        column of the cell. 108 numbers for color images, patches of 16 and cells of 8.

    Raises:
        ValueError: if cells do not fill the patches, or patches the images.
    """
    B, C, H, W = images.shape
    if side % cell or H % side or W % side:
        raise ValueError(
            f"side={side}: must be a multiple of cell={cell}, and divide images of {H} x {W}"
        )
    n = side // cell
    cells = hog(images, cell).view(B, C, BINS, H // side, n, W // side, n)
    return cells.permute(0, 3, 5, 1, 2, 4, 6).reshape(B, (H // side) * (W // side), -1)


def _padded(images: Tensor, cell: int) -> Tensor:
    """The images with one reflected pixel around, float32 or wider."""
    H, W = images.shape[-2:]
    if images.ndim != 4 or cell < 1 or H % cell or W % cell or min(H, W) < 2:
        raise ValueError(
            f"images shape={tuple(images.shape)}: must be [B, C, H, W], H and W multiples of "
            f"cell={cell} and at least 2"
        )
    wide = images.to(torch.promote_types(images.dtype, torch.float32))
    return F.pad(wide, (1, 1, 1, 1), mode="reflect")


def _bins(gx: Tensor, gy: Tensor) -> Tensor:
    """The number of the bin of each direction; both ends of the half circle are the first bin.

    No direction, where a pixel is NaN, is in the first bin too, so that its cell becomes NaN.
    """
    return (BINS * torch.atan2(gx, gy) / math.pi).floor().remainder(BINS).nan_to_num(0)
