"""Six launches: three boxes along the width, three along the height, between two buffers."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from fastmoco_kernels.backends import device_guard
from fastmoco_kernels.blur.boxes import PASSES
from fastmoco_kernels.blur.triton_kernels import box_pass_kernel

BLOCK, WARPS = 1024, 4  # the result does not depend on them: every sum is one of integers


def blur_triton(images: Tensor, boxes: Tensor) -> Tensor:
    """Blur every image with its box, on the GPU.

    Args:
        images: [B, C, H, W] uint8, contiguous; read only.
        boxes: [B, 4] int32 on the same device, from `extended_boxes`.

    Returns:
        [B, C, H, W] uint8, a new tensor. One more of its size is allocated temporarily.
    """
    batch, channels, height, width = images.shape
    source, buffers = images, (torch.empty_like(images), torch.empty_like(images))
    grid = (batch * channels, triton.cdiv(height * width, BLOCK))
    with device_guard(images):
        for number in range(2 * PASSES):
            target = buffers[number % 2]
            along_width = number < PASSES
            box_pass_kernel[grid](
                source,
                target,
                boxes,
                channels,
                height,
                width,
                ALONG_WIDTH=along_width,
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
            source = target
    return source
