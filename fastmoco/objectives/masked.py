"""Targets and loss of objectives that predict what is masked.

Legend: B images, L patches (row by row), P = 3 p^2 numbers of a patch of p pixels per side.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-6
"""Added to the variance of a patch."""


def pixel_patches(images: Tensor, side: int) -> Tensor:
    """The pixels of each patch, in the order row, column, channel (He et al. 2022, MAE).

    Args:
        images: [B, 3, H, W].
        side: p, which divides H and W.

    Returns:
        [B, L, P], at least float32.
    """
    B, C, H, W = images.shape
    grid = images.view(B, C, H // side, side, W // side, side).permute(0, 2, 4, 3, 5, 1)
    patches = grid.reshape(B, (H // side) * (W // side), side * side * C)
    return patches.to(torch.promote_types(images.dtype, torch.float32))


def normalised_patches(patches: Tensor) -> Tensor:
    """(t - mean) / sqrt(var + 1e-6) of each patch [..., P], with the unbiased variance."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + FLOOR).sqrt()


def masked_mean(values: Tensor, mask: Tensor, count: float) -> Tensor:
    """The sum of the values of masked patches over their number.

    The denominator is given, so that what ranks and chunks compute adds up to the whole batch. With
    equally many masked patches in each image it is their number, and the loss the mean of the
    result. Otherwise it is the mean number of an image of the global batch.

    Args:
        values: [B, L], of each patch.
        mask: [B, L] bool, True where masked.
        count: masked patches of an image.

    Returns:
        [B].
    """
    return (values * mask).sum(dim=1) / count


def square_errors(predictions: Tensor, targets: Tensor) -> Tensor:
    """The mean squared difference of each patch: [B, L, P] twice -> [B, L], in the wider dtype."""
    wide = torch.promote_types(predictions.dtype, targets.dtype)
    return (predictions.to(wide) - targets.to(wide)).square().mean(dim=-1)
