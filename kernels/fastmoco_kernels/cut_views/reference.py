"""The views in plain torch, image by image: the reference, and the path without a library."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmoco_kernels.view_color.plan import Plan
from fastmoco_kernels.view_color.reference import view_color_reference

_WEIGHT_BITS = 22


def cut_views_reference(
    images: list[NDArray[np.uint8]],
    crops: Tensor,
    corners: Tensor | None,
    tables: Plan,
    scale: Tensor,
    shift: Tensor,
    threshold: int,
    interpolation: str,
    base_size: int,
    out: Tensor,
) -> None:
    """Compute a batch into `out`, float32 or uint8; arguments as `cut_views_native`."""
    size = out.shape[-1]
    places = [None] * len(images) if corners is None else corners.tolist()
    for row, (image, crop, corner) in enumerate(zip(images, crops.tolist(), places, strict=True)):
        top, left, height, width = crop
        window = torch.from_numpy(image[top : top + height, left : left + width].copy())
        rows = slice(row, row + 1)
        side = size if corner is None else base_size
        resized = resize_reference(window, size, interpolation, side, corner or (0, 0))[None]
        view_color_reference(
            resized, Plan(*(table[rows] for table in tables)), scale, shift, threshold, out[rows]
        )


def resize_reference(
    window: Tensor,
    size: int,
    interpolation: str = "bilinear",
    base_size: int | None = None,
    corner: Sequence[int] = (0, 0),
) -> Tensor:
    """Resize with antialiasing, along the rows first: [H, W, 3] uint8 to [size, size, 3] uint8.

    A level of a pass is `(2^21 + sum of weight * level) >> 22` with whole weights; in float64 all
    of it is exact. With `base_size` the result is the part of the window, resized to that, whose
    upper left is `corner` (top, left).
    """
    height, width, _ = window.shape
    top, left = corner
    across = resize_weights(width, base_size or size, interpolation)[left : left + size]
    down = resize_weights(height, base_size or size, interpolation)[top : top + size]
    narrow = _whole(torch.einsum("xw,hwc->hxc", across, window.double()))
    return _whole(torch.einsum("yh,hxc->yxc", down, narrow)).to(torch.uint8)


def _whole(sums: Tensor) -> Tensor:
    half, one = 2.0 ** (_WEIGHT_BITS - 1), 2.0**_WEIGHT_BITS
    return ((sums + half) / one).floor_().clamp_(0.0, 255.0)


def resize_weights(length: int, size: int, interpolation: str = "bilinear") -> Tensor:
    """[size, length] float64: weights of an axis's levels in each result, times 2^22; integers.

    "bilinear": a triangle that reaches one pixel to each side, or `length / size` pixels where the
    axis shrinks. "bicubic": Keys' cubic with a = -1/2, which reaches twice as far. About their
    centre `(place + 0.5) length / size`, and with a sum of 1 before rounding.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    reach = stretch * (2.0 if interpolation == "bicubic" else 1.0)
    centre = (torch.arange(size, dtype=torch.float64)[:, None] + 0.5) * scale
    taps = torch.arange(length, dtype=torch.float64)[None]
    first = (centre - reach + 0.5).trunc().clamp(min=0.0)
    end = (centre + reach + 0.5).trunc().clamp(max=float(length))
    away = ((taps - centre + 0.5) * (1.0 / stretch)).abs()
    weights = _cubic(away) if interpolation == "bicubic" else (1.0 - away).clamp(min=0.0)
    weights = torch.where((taps >= first) & (taps < end), weights, 0.0)
    # Added one by one as in Pillow: the last bit decides the rounding of a weight near a tie.
    total = weights.cumsum(1)[:, -1:]
    shares = weights / total
    half = torch.where(shares < 0, -0.5, 0.5).double()
    return (half + shares * 2.0**_WEIGHT_BITS).trunc()


def _cubic(away: Tensor) -> Tensor:
    """Keys' cubic at distances >= 0, its operations in Pillow's order."""
    near = (1.5 * away - 2.5) * away * away + 1.0
    far = (((away - 5.0) * away + 8.0) * away - 4.0) * -0.5
    return torch.where(away < 1.0, near, torch.where(away < 2.0, far, 0.0))
