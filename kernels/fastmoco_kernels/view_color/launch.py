"""The launches of one batch: grey sums, colors, six blur boxes, a finish; each only if needed."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fastmoco_kernels.backends import device_guard
from fastmoco_kernels.blur.launch import blur_triton
from fastmoco_kernels.view_color.plan import Plan, late_hues
from fastmoco_kernels.view_color.triton_kernels import (
    finish_kernel,
    grey_sum_kernel,
    view_color_kernel,
)

BLOCK, WARPS, SUMS = 1024, 4, 64  # the result does not depend on them: every sum is one of integers


class Normalisation(NamedTuple):
    """`level * scale + shift` of each channel, in float32, and the threshold of solarize.

    Of bytes only the threshold is used.
    """

    scale: tuple[float, float, float]
    shift: tuple[float, float, float]
    threshold: int


def view_color_triton(
    images: Tensor, tables: Plan, normalisation: Normalisation, out: Tensor
) -> None:
    """Compute a batch into `out`.

    Args:
        images: [B, H, W, 3] uint8, contiguous.
        tables: of the batch, on the CPU or on the images' device.
        normalisation: what makes numbers of levels.
        out: [B, 3, H, W] on the images' device, one stride over all its pixels.
    """
    batch, height, width, _ = images.shape
    pixels, blocks = height * width, triton.cdiv(height * width, BLOCK)
    means, slots = _needs(tables)
    rows, factors, boxes, images_of = _on_device(tables, slots, images.device)

    late = _late_hues(images.device)
    sums = torch.empty(batch, blocks, dtype=torch.int32, device=images.device)
    planes = torch.empty(slots, 3, height, width, dtype=torch.uint8, device=images.device)
    strides = (out.stride(0), out.stride(1), out.stride(3))
    numbers = (*normalisation.scale, *normalisation.shift, normalisation.threshold)
    # Fused multiply-adds would skip a rounding of PIL's.
    options = {"BLOCK": BLOCK, "num_warps": WARPS, "enable_fp_fusion": False}

    with device_guard(images):
        if means:
            grey_sum_kernel[(batch, blocks)](images, rows, factors, late, sums, pixels, **options)
        view_color_kernel[(batch, blocks)](
            images,
            rows,
            factors,
            late,
            sums,
            planes,
            out,
            *strides,
            pixels,
            width,
            blocks,
            *numbers,
            SUMS=SUMS,
            **options,
        )
        if slots:
            blurred = blur_triton(planes, boxes)
            finish_kernel[(slots, blocks)](
                blurred, images_of, rows, out, *strides, pixels, *numbers, **options
            )


def _needs(tables: Plan) -> tuple[bool, int]:
    """Whether a grey mean is needed, and how many images are blurred; on a GPU upper bounds."""
    if tables.steps.is_cuda:
        return True, len(tables.steps)
    return bool((tables.contrast_at < 4).any()), int((tables.boxes[:, 0] >= 0).sum())


def _on_device(
    tables: Plan, slots: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows [B, 12], factors [B, 4], boxes [slots, 4] and images [slots], by one transfer."""
    batch = len(tables.steps)
    blurred = tables.boxes[:, 0] >= 0
    if slots == batch:
        images_of = torch.arange(batch, dtype=torch.int32, device=blurred.device)
        slot = torch.where(blurred, images_of, -1)
        boxes = tables.boxes
    else:
        images_of = blurred.nonzero().view(-1).to(torch.int32)
        slot = torch.where(blurred, blurred.cumsum(0) - 1, -1).to(torch.int32)
        boxes = tables.boxes[blurred]

    # One row of integers an image; all tables in one transfer.
    rest = torch.zeros(batch, 2, dtype=torch.int32, device=slot.device)
    columns = [
        tables.steps,
        tables.contrast_at[:, None],
        tables.shift[:, None],
        tables.flags,
        slot[:, None],
        rest,
    ]
    rows = torch.cat(columns, 1).to(torch.int32)
    parts = (rows, tables.factors.view(torch.int32), boxes, images_of)
    packed = torch.cat([part.reshape(-1) for part in parts]).to(device)
    on_device = torch.split(packed, [part.numel() for part in parts])

    return (
        on_device[0].view(rows.shape),
        on_device[1].view(torch.float32).view(batch, 4),
        on_device[2].view(boxes.shape),
        on_device[3],
    )


@functools.cache
def _late_hues(device: torch.device) -> Tensor:
    return torch.tensor(late_hues(), dtype=torch.uint8, device=device)
