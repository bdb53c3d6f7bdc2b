"""Views as uint8 levels, and the normalisation that a loader of float32 views would have done.

A level is what Pillow's transforms hand to torchvision's ToTensor: uint8 loses nothing, and a batch takes a quarter of the
bytes. The consumer normalises where it needs the numbers, a part of a batch at a time.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastmoco_kernels.view_color.op import level_factors
from fastmoco_pipelines.spec import ViewSpec


def normalise(view: Tensor, spec: ViewSpec, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make of levels what a loader with ``view_dtype="float32"`` delivers: ``(level / 255 - mean) / std``.

    Args:
        view: [B, 3, H, W] uint8, any strides, any device.
        spec: the view's; its mean, std and color are used.
        dtype: of the result, a floating-point type.

    Returns:
        [B, 3, H, W] of ``dtype`` on the view's device, computed in float32 and rounded once more where ``dtype`` is narrower.
        A new tensor, with the strides of ``view`` where these are dense.

    Raises:
        ValueError: for a view of another type or number of channels.

    Numerics: equal to the loader's float32 views to the bit, as each ``color`` rounds: ``exact`` a product and then a sum,
        both in float32; ``dali`` one fused multiply-add, as DALI does (on a CPU that is tested; its kernels for GPUs say
        the same). Where torch.compile fuses the product and the sum of ``exact``, the last bit may differ.
    Memory and cost: the result; with ``color="dali"`` twice that meanwhile.
    """
    if view.dtype != torch.uint8 or view.dim() != 4 or view.shape[1] != 3:
        raise ValueError(f"normalise: the view is {view.dtype} {tuple(view.shape)}; needs uint8 [B, 3, H, W]")
    # A graph that is being traced must not leave its tensors in the cache.
    plain = type(view) is Tensor and not torch.compiler.is_compiling()
    scale, shift = (_factors if plain else _factors.__wrapped__)(spec.mean, spec.std, spec.color, view.device)
    # A product of 8 and 24 bits and its sum are exact in float64: rounded once, they are a fused multiply-add in float32.
    return (view * scale).add_(shift).to(torch.float32).to(dtype)


@functools.cache
def _factors(
    mean: tuple[float, ...], std: tuple[float, ...], color: str, device: torch.device
) -> tuple[Tensor, Tensor]:
    """[3, 1, 1], factor of a level and summand: float32 values, in float64 where product and sum are rounded together."""
    if color == "exact":
        scale, shift = (torch.tensor(x, dtype=torch.float32) for x in level_factors(mean, std))
    else:
        deviation = torch.tensor([255 * s for s in std], dtype=torch.float32)
        scale = torch.ones_like(deviation) / deviation
        shift = (-torch.tensor([255 * m for m in mean], dtype=torch.float32) * scale).double()
        scale = scale.double()
    return scale[:, None, None].to(device), shift[:, None, None].to(device)
