"""A batch of views in plain torch, in PIL's arithmetic: the reference, and the path on CPUs.

Images are planes of whole numbers in float32, a cache-sized piece at a time; operations that change
nothing are skipped. As in PIL, every operation rounds and clips to 8 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco_kernels.blur.reference import blur_reference
from fastmoco_kernels.view_color.hue import shift_hue_
from fastmoco_kernels.view_color.plan import BRIGHTNESS, CONTRAST, HUE, NOTHING, Plan

_PIECE = 2**16
"""Pixels worked on at once."""
_EXACT_SUM = 2**24 // 256
"""Levels whose sum is exact in float32."""


def view_color_reference(
    images: Tensor, tables: Plan, scale: Tensor, shift: Tensor, threshold: int, out: Tensor
) -> None:
    """Compute a batch into `out`.

    Args:
        images: [B, H, W, 3] uint8.
        tables: of the batch, on the CPU.
        scale: [3] float32, factor of a level in the result.
        shift: [3] float32, what is added then.
        threshold: level from which solarize inverts.
        out: [B, 3, H, W] of any floating-point type and strides; or uint8, for levels without
            factor and summand.
    """
    batch, height, width, _ = images.shape
    together = max(1, _PIECE // (height * width))
    for start in range(0, batch, together):
        rows = slice(start, start + together)
        piece = Plan(*(table[rows] for table in tables))
        planes = _planes(images[rows], _places(piece.flags[:, 2]))
        _jitter_(planes.flatten(2), piece)
        _grey_(planes, _places(piece.flags[:, 0]))
        _blur_(planes, piece.boxes, _places(piece.boxes[:, 0] >= 0))
        _solarize_(planes, _places(piece.flags[:, 1]), threshold)
        if out.dtype == torch.uint8:
            planes = planes.to(torch.int32)  # as in `_blur_`
        else:
            planes.mul_(scale[:, None, None, None]).add_(shift[:, None, None, None])
        out[rows].copy_(planes.transpose(0, 1))


def _places(flags: Tensor) -> list[int]:
    return [place for place, flag in enumerate(flags.tolist()) if flag]


def _planes(pixels: Tensor, flipped: list[int]) -> Tensor:
    """[3, n, H, W] float32 levels of [n, H, W, 3] bytes, some of them flipped."""
    if len(flipped) == len(pixels):
        pixels = pixels.flip(2)
    elif flipped:
        index = torch.tensor(flipped, device=pixels.device)
        pixels = pixels.index_copy(0, index, pixels[index].flip(2))
    return pixels.permute(3, 0, 1, 2).contiguous().to(torch.float32)


def _jitter_(levels: Tensor, piece: Plan) -> None:
    """The steps of every image of [3, n, P]; at each position, images of one operation together."""
    count = levels.shape[1]
    factors, shift = piece.factors.to(levels.device), piece.shift.to(levels.device)
    for codes in piece.steps.t().tolist():
        for step in set(codes) - {NOTHING}:
            chosen = [place for place, code in enumerate(codes) if code == step]
            if len(chosen) == count:
                _step_(levels, step, factors, shift)
            else:
                index = torch.tensor(chosen, device=levels.device)
                some = levels[:, index]
                _step_(some, step, factors[index], shift[index])
                levels[:, index] = some


def _step_(levels: Tensor, step: int, factors: Tensor, shift: Tensor) -> None:
    if step == HUE:
        shift_hue_(levels, shift)
    else:
        _blend_(levels, step, factors[:, step, None])


def _grey_(planes: Tensor, chosen: list[int]) -> None:
    if len(chosen) == planes.shape[1]:
        planes.copy_(luma(planes).expand_as(planes))
    elif chosen:
        index = torch.tensor(chosen, device=planes.device)
        planes[:, index] = luma(planes[:, index]).expand(3, -1, -1, -1)


def _blur_(planes: Tensor, boxes: Tensor, chosen: list[int]) -> None:
    if not chosen:
        return
    index = None if len(chosen) == planes.shape[1] else torch.tensor(chosen, device=planes.device)
    some = planes if index is None else planes[:, index]
    # By way of int32: in one step torch converts four times as slowly.
    sharp = some.to(torch.int32).to(torch.uint8).transpose(0, 1)
    blurred = blur_reference(sharp, boxes[chosen]).transpose(0, 1)
    if index is None:
        planes.copy_(blurred)
    else:
        planes[:, index] = blurred.to(torch.float32)


def luma(levels: Tensor) -> Tensor:
    """[n, ...] float32: PIL's mode L, `(19595 R + 38470 G + 7471 B + 32768) >> 16`, exact."""
    grey = (
        levels[0]
        .mul(19595 / 65536)
        .add_(levels[1], alpha=38470 / 65536)
        .add_(levels[2], alpha=7471 / 65536)
    )
    return grey.add_(0.5).floor_()


def _blend_(levels: Tensor, step: int, factor: Tensor) -> None:
    """PIL's blend with black, the image's grey mean, or the pixel's grey, truncated."""
    if step == BRIGHTNESS:
        levels.mul_(factor)
    else:
        anchor = luma(levels)
        if step == CONTRAST:
            count = anchor.shape[1]
            total = anchor.sum(1) if count <= _EXACT_SUM else anchor.sum(1, dtype=torch.float64)
            total = total.double()
            mean = total / torch.full_like(total, count)  # by a tensor: see `extended_boxes`
            anchor = (mean + 0.5).floor_().to(torch.float32)[:, None]
        levels.sub_(anchor).mul_(factor).add_(anchor)
    if bool((factor > 1).any()):
        levels.clamp_(0.0, 255.0)
    levels.floor_()


def _solarize_(planes: Tensor, chosen: list[int], threshold: int) -> None:
    if not chosen:
        return
    index = None if len(chosen) == planes.shape[1] else torch.tensor(chosen, device=planes.device)
    some = planes if index is None else planes[:, index]
    bright = torch.ge(some, threshold, out=torch.empty_like(some))
    some.addcmul_(bright, some.mul(-2.0).add_(255.0))
    if index is not None:
        planes[:, index] = some
