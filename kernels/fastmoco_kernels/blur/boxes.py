"""The three extended boxes that approximate a Gaussian, in Pillow's fixed point.

Source: Gwosdek, Grewenig, Bruhn, Weickert 2011, "Theoretical foundations of Gaussian convolution by
extended box filtering". A box of 2 r + 1 whole taps and two edge taps of a smaller weight has any
variance; n of them in a row have n times that. Pillow takes n = 3 and weights in units of 2^-24.
"""

from __future__ import annotations

import torch
from torch import Tensor

PASSES = 3
"""Boxes along each axis."""
WEIGHT_BITS = 24
"""A weight of 1 is 2^24."""
OFFSET = 128
"""Subtracted from every level, so that 2^24 times a level fits an int32."""


def extended_boxes(sigmas: Tensor) -> Tensor:
    """The box of each image.

    Args:
        sigmas: [B] float32, standard deviations in pixels; 0 for none. Any device.

    Returns:
        [B, 4] int32 on the same device: radius r (-1 where sigma is 0), weight of each of the 2 r +
        1 whole taps, weight of the two edge taps, and what is added before the shift by 24 bits.
        Exact: it rounds where Pillow rounds.
    """
    sigma = sigmas.to(torch.float32)
    # Divisors are tensors: on CUDA torch multiplies by a number's reciprocal, which rounds twice.
    variance = sigma * sigma / torch.full_like(sigma, PASSES)
    length = torch.sqrt(12.0 * variance.double() + 1.0).float()
    whole_radius = torch.floor((length.double() - 1.0) / 2.0).float()
    share = (2 * whole_radius + 1) * (whole_radius * (whole_radius + 1) - 3 * variance)
    share = share / (6 * (variance - (whole_radius + 1) * (whole_radius + 1)))
    width = (whole_radius + share) * 2 + 1
    radius = (whole_radius + share).to(torch.int32)
    whole = torch.full_like(width, 2.0**WEIGHT_BITS).div(width).to(torch.int32)
    edge = (2**WEIGHT_BITS - (2 * radius + 1) * whole) // 2
    # 0 or 1: two equal edges share the rest.
    missing = 2**WEIGHT_BITS - (2 * radius + 1) * whole - 2 * edge
    bias = 2 ** (WEIGHT_BITS - 1) - OFFSET * missing
    return (
        torch.stack([torch.where(sigma > 0, radius, -1), whole, edge, bias], dim=1)
        .to(torch.int32)
        .contiguous()
    )
