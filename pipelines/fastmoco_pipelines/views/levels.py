"""Views as uint8 levels, and the normalisation that a loader of float32 views would have done.

A level is what Pillow's transforms hand to torchvision's ToTensor: uint8 loses nothing, and a batch
takes a quarter of the bytes. The consumer normalises where it needs the numbers, a part of a batch
at a time.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch._guards import active_fake_mode

from fastmoco_kernels.view_color.op import level_factors
from fastmoco_pipelines.spec import ViewSpec


def normalise(view: Tensor, spec: ViewSpec, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make of levels what a loader with `view_dtype="float32"` delivers: `(level / 255 - mean) /
    std`.

    Args:
        view: [B, 3, H, W] uint8, any strides, any device.
        spec: the view's; its mean, std and color are used.
        dtype: of the result, a floating-point type.

    Returns:
        [B, 3, H, W] of `dtype` on the view's device, computed in float32 and rounded once more
        where `dtype` is narrower. A new tensor, with the strides of `view` where these are dense.

    Raises:
        ValueError: for a view of another type or number of channels.

    Numerics: equal to the loader's float32 views to the bit, on every device. Two operations in
        float32, each rounded: `exact` multiplies and adds, `dali` subtracts and multiplies, as DALI
        does on a CPU. Where torch.compile fuses a product and a sum, the last bit may differ.
    Memory and cost: the result, written, read and written again.
    """
    if view.dtype != torch.uint8 or view.dim() != 4 or view.shape[1] != 3:
        raise ValueError(
            f"normalise: the view is {view.dtype} {tuple(view.shape)}; needs uint8 [B, 3, H, W]"
        )
    return normalise_by(
        view, *numbers(spec, view.device), multiply_first=spec.color == "exact", dtype=dtype
    )


def normalise_by(
    view: Tensor, first: Tensor, second: Tensor, *, multiply_first: bool, dtype: torch.dtype
) -> Tensor:
    """The arithmetic of `normalise` alone, for callers that compile it.

    Args:
        view: [B, 3, H, W] uint8.
        first: [3, 1, 1] float32, of `numbers`.
        second: the same.
        multiply_first: whether `view * first + second`; else `(view - first) * second`.
        dtype: of the result.
    """
    result = (view * first).add_(second) if multiply_first else (view - first).mul_(second)
    return result.to(dtype)


def numbers(spec: ViewSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """What `normalise_by` takes for a view: kept on the device from the first call on, so that
    later ones copy nothing there."""
    # Neither a graph that is being traced nor tensors without memory may leave theirs in the cache.
    plain = not torch.compiler.is_compiling() and active_fake_mode() is None
    made = _numbers if plain else _numbers.__wrapped__
    return made(tuple(spec.mean), tuple(spec.std), spec.color, device)


@functools.cache
def _numbers(
    mean: tuple[float, ...], std: tuple[float, ...], color: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """[3, 1, 1] float32 each: factor of a level and summand, or the mean and one over the
    deviation, in levels."""
    if color == "exact":
        first, second = (torch.tensor(x, dtype=torch.float32) for x in level_factors(mean, std))
    else:
        first, second = (
            torch.tensor([255 * x for x in numbers], dtype=torch.float32) for numbers in (mean, std)
        )
        second = torch.ones_like(second) / second
    return first[:, None, None].to(device), second[:, None, None].to(device)
