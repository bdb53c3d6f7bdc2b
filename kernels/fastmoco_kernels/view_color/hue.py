"""PIL's hue shift in plain torch: RGB to HSV of 8 bits each, the hue byte moved on, and back.

Every value is a whole number below 2^24 and so exact in float32; every division is rounded to
nearest. Comparisons return floats, not bools: on CPUs torch computes and selects with those ten
times as fast.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastmoco_kernels.view_color.plan import late_hues

_SECTORS = 512
"""Entries of a hue table: twice 256 floors from -43 to 212, not exact and exact."""


def shift_hue_(levels: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue of every pixel, in place.

    HSV of a pixel, as PIL rounds it: V = max, S = floor(255 (max - min) / max), H = floor(42.5 N /
    (max - min)) with N the numerator of its sector, but for `late_hues`. Back: a channel is
    `V - round(V S w / 65025)`, with w from 0 to 255 the channel's distance, in the hue circle of
    1530 units, from where it equals V.

    Args:
        levels: [3, n, P] float32, whole numbers from 0 to 255.
        shift: [n] int32, 0 to 255.

    Returns:
        `levels`.
    """
    r, g, b = levels.unbind(0)
    high = torch.maximum(torch.maximum(r, g), b)
    low = torch.minimum(torch.minimum(r, g), b)
    spread = torch.sub(high, low, out=low)
    units = _hue_units(r, g, b, high, spread, shift)
    # S of black is 0 / 0 in exact arithmetic; its numerator is 0 whatever it is divided by.
    amount = spread.mul_(255.0).add_(0.5).div_(high.clamp(min=1.0)).floor_().mul_(high)
    for channel, centre in enumerate((765.0, 510.0, 1020.0)):
        away = torch.sub(units, centre, out=levels[channel]).abs_()
        away = away.neg_().add_(510.0) if channel == 0 else away.sub_(255.0)
        # The rounded quotient is never a tie: 2 V S w is even, 65025 is odd.
        lost = (
            away.clamp_(0.0, 255.0)
            .mul_(amount)
            .add_(32512.0)
            .div_(_whole(65025.0, levels))
            .floor_()
        )
        torch.sub(high, lost, out=lost)
    return levels


def _hue_units(
    r: Tensor, g: Tensor, b: Tensor, high: Tensor, spread: Tensor, shift: Tensor
) -> Tensor:
    """[n, P] six times the shifted hue byte: the position on a circle of 6 x 255 units."""
    is_red, is_green = torch.empty_like(r), torch.empty_like(r)
    torch.eq(r, high, out=is_red)
    torch.eq(g, high, out=is_green)
    numerator = torch.sub(r, g).add_(spread, alpha=4.0)
    numerator.addcmul_(is_green, torch.sub(b, r).add_(spread, alpha=2.0).sub_(numerator))
    numerator.addcmul_(is_red, torch.sub(g, b).sub_(numerator)).mul_(42.5)
    some = spread.clamp(min=1.0)
    # A quarter moves exact quotients off the whole number; others are at least 1/510 away.
    floor = torch.add(numerator, 0.25, out=is_red).div_(some).floor_()
    rest = numerator.addcmul_(floor, some, value=-1.0)
    exact = torch.eq(rest, 0.0, out=is_green)
    index = exact.add_(floor, alpha=2.0).add_(86.0)
    if len(shift) > 1:
        index.add_(torch.arange(len(shift), device=r.device)[:, None] * float(_SECTORS))
    table = ((_hue_bytes().to(r.device) + shift[:, None]) % 256 * 6).to(torch.float32)
    return table.view(-1).index_select(0, index.view(-1).to(torch.int32)).view_as(r)


@functools.cache
def _hue_bytes() -> Tensor:
    """[512] int32: PIL's hue byte by 2 (floor + 43) + exact."""
    byte = (torch.arange(_SECTORS) // 2 - 43) % 255
    late = torch.tensor(late_hues())[byte] & (torch.arange(_SECTORS) % 2 == 1)
    return (byte - late.int()).to(torch.int32)


def _whole(value: float, like: Tensor) -> Tensor | float:
    """A divisor as a tensor: on CUDA torch multiplies by a number's reciprocal and rounds twice."""
    return torch.tensor(value, device=like.device) if like.is_cuda else value
