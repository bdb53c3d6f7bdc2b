"""One launch of the moving average over all tensors of one source type."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from fastmoco_kernels.backends import device_guard
from fastmoco_kernels.ema.triton_kernels import ema_kernel
from fastmoco_kernels.tables import PointerTable

NUM_WARPS = 4
"""With CHUNK: 16 elements a thread, four 128-bit loads an array before the first is used."""

ELEMENT = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
"""Triton's names of the element types that kernels over pointer tables read."""


def launch_(
    table: PointerTable, averages: Sequence[Tensor], source: torch.dtype, momentum: float | Tensor
) -> None:
    """Update flat float32 averages from flat sources of one type, all on one device.

    Args:
        table: addresses of averages and sources.
        averages: float32, at least one.
        source: type of the sources, one of `ELEMENT`.
        momentum: number, or a tensor of one element on the same device.
    """
    on_device = isinstance(momentum, Tensor)
    if table.chunks:
        with device_guard(averages[0]):
            ema_kernel[(table.chunks,)](
                table.pointers,
                table.sizes,
                table.chunk_rows,
                table.chunk_starts,
                table.rows,
                momentum if on_device else float(1 - momentum),
                ON_DEVICE=on_device,
                SOURCE=ELEMENT[source],
                CHUNK=table.chunk,
                num_warps=NUM_WARPS,
            )
    torch.autograd.graph.increment_version(averages)
