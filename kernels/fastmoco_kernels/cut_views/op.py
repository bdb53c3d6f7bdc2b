"""Views of decoded images on the CPU: crop, antialiased resize, and `view_color`, in one call.

One C function takes a batch: each thread takes the next image, resizes its window into three planes
of bytes, which stay in the core's cache, and works on them until the view is written. The loops are
plain C that compilers vectorize, for several instruction sets, one of which is chosen when the
library is loaded (`native/views.h`).

The resize is Pillow's: two passes over bytes with weights in units of 2^-22, first along the rows,
then along the columns, rounded to a byte in between. Pillow up to version 12 always uses this
order; version 13 reverses it for some windows taller than wide and than `size`, where a bilinear
level may differ by one, and a bicubic one by more at edges between 0 and 255.
After the resize, levels are equal to Pillow's to the bit, as those of `view_color` are on every
backend.

Without a C compiler at installation there is no library; plain torch then computes the same, many
times slower.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmoco_kernels.backends import choose_backend
from fastmoco_kernels.cut_views.native import cut_views_native, native_library
from fastmoco_kernels.cut_views.reference import cut_views_reference
from fastmoco_kernels.view_color.op import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    check_normalisation,
    check_ranges,
    level_factors,
)
from fastmoco_kernels.view_color.plan import ViewColorParameters, plan

INTERPOLATIONS = ("bilinear", "bicubic")
"""Filters of the resize."""
_LARGEST = 2**15
"""Most rows or columns, so that sums of weights and offsets within a view fit int32."""


def cut_views(
    images: Sequence[Tensor | NDArray[np.uint8]],
    crops: Tensor,
    parameters: ViewColorParameters,
    *,
    size: int = 224,
    base_size: int = 0,
    corners: Tensor | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
    solarize_threshold: int = 128,
    interpolation: str = "bilinear",
    threads: int = 1,
    backend: str = "auto",
) -> Tensor:
    """Cut a window from every image, resize it to `size` x `size`, and jitter it by its parameters.

    `(level / 255 - mean) / std` of the levels that torchvision's PIL transforms (resized crop,
    color jitter, grayscale, Gaussian blur, solarize, flip) give for the same draws: the
    augmentation of Chen, Xie, He 2021 (MoCo v3). With `dtype=torch.uint8` those levels themselves.

    Args:
        images: B decoded images, each [H, W, 3] uint8 RGB on the CPU, of any height, width and
            distance between rows.
        crops: [B, 4] int32 on the CPU: top, left, height, width of the window in pixels of its
            image.
        parameters: a row for each image, on the CPU.
        size: height and width of a view in pixels, 1 to 32768.
        base_size: height and width to which a window is resized before the view is cut from it, up
            to 32768; 0: `size`, all of it is the view.
        corners: [B, 2] int32 on the CPU, with `base_size` alone: top, left of the view in the
            resized window. Only that part is computed; its levels are those of the whole.
        mean: of the three channels, subtracted after scaling to [0, 1].
        std: of the three channels, divided by; positive.
        dtype: float32; or uint8: levels, not normalised, whatever `mean` and `std` are.
        solarize_threshold: level, 0 to 256, from which solarize inverts.
        interpolation: of the resize, `"bilinear"` or `"bicubic"` (Keys' cubic, a = -1/2), both with
            antialiasing.
        threads: number of threads, including this one; the result does not depend on it.
        backend: `"auto"`, `"native"` (compiled C) or `"torch"`.

    Returns:
        [B, 3, size, size] of `dtype`, contiguous. Not differentiable.

    Raises:
        ValueError: for an image, crops or corners of another type, shape or device, a window that
            leaves its image, a view that leaves its resized window, parameters of another length or
            out of range, another dtype or interpolation, or a backend that cannot run here.
        MemoryError: if a thread gets no memory to work in.

    Numerics: levels are whole numbers, equal on every backend and machine; the last step is one
        product and one sum in float32.
    Memory and cost: the result, and about 3 (window height + 2 size) size bytes a thread.
    Distributed: none.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import ViewColorParameters, cut_views
        >>> photo = torch.full((30, 40, 3), 51, dtype=torch.uint8)
        >>> crops = torch.tensor([[0, 10, 20, 25]], dtype=torch.int32)
        >>> neutral = ViewColorParameters.neutral(1)
        >>> view = cut_views([photo], crops, neutral, size=8, mean=(0, 0, 0), std=(1, 1, 1))
        >>> view.shape, view[0, 0, 0, 0]
        (torch.Size([1, 3, 8, 8]), tensor(0.2000))
    """
    arrays = [_array(image, row) for row, image in enumerate(images)]
    _check(arrays, crops, parameters, size, solarize_threshold, threads)
    _check_corners(corners, len(arrays), base_size, size)
    check_normalisation("cut_views", mean, std)
    if dtype not in (torch.float32, torch.uint8):
        raise ValueError(f"cut_views: dtype={dtype} is neither torch.float32 nor torch.uint8")
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"cut_views: interpolation={interpolation!r} is none of {INTERPOLATIONS}")
    check_ranges("cut_views", parameters)
    default = "native" if native_library() is not None else "torch"
    chosen = choose_backend("cut_views", backend, default, ("native", "torch"))
    if chosen == "native" and native_library() is None:
        raise ValueError(
            "cut_views: backend='native' but fastmoco was installed without its compiled part; "
            "install a C compiler "
            "and fastmoco again, or take backend='auto'"
        )
    scale, shift = (torch.tensor(x, dtype=torch.float32) for x in level_factors(mean, std))
    out = torch.empty(len(arrays), 3, size, size, dtype=dtype)
    if chosen == "native":
        cut_views_native(
            arrays,
            crops,
            corners,
            plan(parameters),
            scale,
            shift,
            solarize_threshold,
            interpolation,
            base_size,
            threads,
            out,
        )
    else:
        cut_views_reference(
            arrays,
            crops,
            corners,
            plan(parameters),
            scale,
            shift,
            solarize_threshold,
            interpolation,
            base_size,
            out,
        )
    return out


def _array(image: Tensor | NDArray[np.uint8], row: int) -> NDArray[np.uint8]:
    """The image, without a copy where each row is contiguous."""
    if isinstance(image, Tensor) and image.device.type != "cpu":
        raise ValueError(f"cut_views: image {row} is on {image.device}; views are cut on the CPU")
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise ValueError(
            f"cut_views: image {row} is {array.dtype} {array.shape}; need uint8 [H, W, 3]"
        )
    side_by_side = array.strides[1:] == (3, 1) and array.strides[0] > 0
    return array if side_by_side else np.ascontiguousarray(array)


def _check(
    images: list[NDArray[np.uint8]],
    crops: Tensor,
    parameters: ViewColorParameters,
    size: int,
    threshold: int,
    threads: int,
) -> None:
    count = len(images)
    if crops.shape != (count, 4) or crops.dtype != torch.int32 or crops.device.type != "cpu":
        raise ValueError(
            f"cut_views: crops are {crops.dtype} {tuple(crops.shape)} on {crops.device} but "
            f"{count} images need "
            f"torch.int32 {(count, 4)} on the CPU"
        )
    for name, value in parameters._asdict().items():
        wanted = (count, 4) if name == "order" else (count,)
        if tuple(value.shape) != wanted or value.device.type != "cpu":
            raise ValueError(
                f"cut_views: {name} is {tuple(value.shape)} on {value.device} but {count} images "
                f"need {wanted} on the CPU"
            )

    if not 1 <= size <= _LARGEST:
        raise ValueError(f"cut_views: size={size} is outside 1 to {_LARGEST}")
    if not 0 <= threshold <= 256:
        raise ValueError(f"cut_views: solarize_threshold={threshold} is outside 0 to 256")
    if threads < 1:
        raise ValueError(f"cut_views: threads={threads}; needs at least one")
    if not count:
        return

    # Every window must be inside its image.
    sizes = np.array([image.shape[:2] for image in images])
    windows = crops.numpy().astype(np.int64)
    bad = np.flatnonzero(
        (windows[:, :2] < 0).any(1)
        | (windows[:, 2:] < 1).any(1)
        | (windows[:, :2] + windows[:, 2:] > sizes).any(1)
        | (windows[:, 2:] > _LARGEST).any(1)
    )
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"cut_views: crop {row} is (top, left, height, width) = "
            f"{tuple(windows[row].tolist())}; image {row} of "
            f"{sizes[row, 0]} x {sizes[row, 1]} pixels does not hold it (windows have 1 to "
            f"{_LARGEST} rows and columns)"
        )


def _check_corners(corners: Tensor | None, count: int, base_size: int, size: int) -> None:
    """Refuse a view that leaves the resized window, or half of what a part needs."""
    if corners is None and not base_size:
        return
    if corners is None or not size <= base_size <= _LARGEST:
        raise ValueError(
            f"cut_views: base_size={base_size} needs corners, which need a base_size from size="
            f"{size} to {_LARGEST}"
        )
    if corners.shape != (count, 2) or corners.dtype != torch.int32 or corners.device.type != "cpu":
        raise ValueError(
            f"cut_views: corners are {corners.dtype} {tuple(corners.shape)} on {corners.device} "
            f"but {count} images need torch.int32 {(count, 2)} on the CPU"
        )
    bad = ((corners < 0) | (corners > base_size - size)).any(1).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"cut_views: corner {row} is (top, left) = {tuple(corners[row].tolist())}; a view of "
            f"{size} pixels leaves the window resized to {base_size}"
        )
