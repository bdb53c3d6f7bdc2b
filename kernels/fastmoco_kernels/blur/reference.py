"""The blur in plain torch, box by box, in integers: the reference, and the path on CPUs."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco_kernels.blur.boxes import OFFSET, PASSES, WEIGHT_BITS

_PIECE = 2**16
"""Levels per piece: three int32 buffers of this size stay in a core's cache.

So a view of 224 pixels is processed plane by plane, 1.5 times as fast as all three at once, and
small images many at a time.
"""


def blur_reference(images: Tensor, boxes: Tensor) -> Tensor:
    """Blur every image with its box.

    Args:
        images: [B, C, H, W] uint8.
        boxes: [B, 4] int32 from `extended_boxes`, on the CPU; images with radius -1 are copied.

    Returns:
        [B, C, H, W] uint8, a new tensor.
    """
    batch, channels, height, width = images.shape
    out = images.clone(memory_format=torch.contiguous_format)
    planes = out.view(batch * channels, height, width)
    radii = [radius for radius in boxes[:, 0].tolist() for _ in range(channels)]
    together = max(1, _PIECE // (height * width))
    for radius in sorted(set(radii) - {-1}):
        rows = [i for i, r in enumerate(radii) if r == radius]
        for start in range(0, len(rows), together):
            some = rows[start : start + together]
            box = boxes[[row // channels for row in some]].to(out.device)
            if len(some) == 1:
                plane = planes[some[0] : some[0] + 1]
                plane.copy_(_blur(plane.to(torch.int32), box, radius))
            else:
                index = torch.tensor(some, device=out.device)
                planes[index] = _blur(planes[index].to(torch.int32), box, radius).to(torch.uint8)
    return out


def _blur(levels: Tensor, boxes: Tensor, radius: int) -> Tensor:
    """Blur [n, H, W] int32 levels, all with boxes of one radius; the argument is overwritten."""
    whole, edge, bias = boxes[:, 1:, None, None].unbind(1)
    # A tensor: a Python number would be converted at every use.
    bits = torch.tensor(WEIGHT_BITS, dtype=torch.int32)
    shared = int(edge[0]) if len(levels) == 1 else None  # a number then, which saves a sweep a pass

    levels = levels.sub_(OFFSET)
    far = torch.empty_like(levels)

    # Three boxes along the width, then three along the height.
    for dim in (2, 1):
        size, beyond = levels.shape[dim], radius + 1
        room = list(levels.shape)
        room[dim] += 2 * beyond
        padded = levels.new_empty(room)
        taps = [padded.narrow(dim, start, size) for start in range(2 * beyond + 1)]
        middle = taps[beyond].copy_(levels)
        before, first = padded.narrow(dim, 0, beyond), middle.narrow(dim, 0, 1)
        after, last = padded.narrow(dim, beyond + size, beyond), middle.narrow(dim, size - 1, 1)

        for _ in range(PASSES):
            # Beyond the border this pass's last level is repeated.
            before.copy_(first)
            after.copy_(last)

            # The whole taps, each of equal weight.
            if radius == 0:
                torch.mul(middle, whole, out=levels)
            else:
                torch.add(middle, taps[1], out=levels)
                for tap in set(range(2, 2 * radius + 2)) - {beyond}:
                    levels.add_(taps[tap])
                levels.mul_(whole)

            # The two edge taps.
            torch.add(taps[0], taps[-1], out=far)
            if shared is None:
                levels.add_(far.mul_(edge))
            else:
                levels.add_(far, alpha=shared)
            torch.bitwise_right_shift(levels.add_(bias), bits, out=middle)
        levels.copy_(middle)
    return levels.add_(OFFSET)
