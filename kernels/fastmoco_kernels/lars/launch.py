"""Launches of the LARS kernels: two for the norms and one for the update of all tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from fastmoco_kernels.backends import device_guard
from fastmoco_kernels.lars.triton_kernels import (
    lars_fold_kernel,
    lars_norms_kernel,
    lars_update_kernel,
)
from fastmoco_kernels.tables import pointer_table
from fastmoco_kernels.tensors import same_layout

FOLD_BLOCK = 256
"""Partial sums that one step of the fold adds; 16.8 million elements have 8192."""
NUM_WARPS = 4
_WORDS = {torch.float32: tl.float32, torch.float64: tl.float64}


def squares_triton(
    params: Sequence[Tensor], grads: Sequence[Tensor], weight_decay: float, adapt: Sequence[bool]
) -> Tensor:
    """First pass, as `op.lars_squares`."""
    # Held until the launch: the table has only addresses.
    columns = [params, matching_grads(params, grads)]
    table = pointer_table("lars_squares", columns, [_scaled(params, adapt)])
    first = params[0]

    squares = torch.empty(table.rows, 2, dtype=torch.float64, device=first.device)
    partials = torch.empty(max(table.chunks, 1), 2, dtype=first.dtype, device=first.device)
    with device_guard(first):
        if table.chunks:
            lars_norms_kernel[(table.chunks,)](
                table.pointers,
                table.sizes,
                table.chunk_rows,
                table.chunk_starts,
                partials,
                table.rows,
                weight_decay,
                WORD=_WORDS[first.dtype],
                CHUNK=table.chunk,
                num_warps=NUM_WARPS,
            )
        lars_fold_kernel[(table.rows,)](
            table.pointers,
            table.first_chunks,
            partials,
            squares,
            table.rows,
            BLOCK=FOLD_BLOCK,
            num_warps=1,
        )
    return squares


def update_triton_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    squares_T2: Tensor,
    lr: Tensor,
    adapt: Sequence[bool],
    *,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    found_inf: Tensor | None,
    lr_in_buffer: bool = False,
) -> None:
    """Second pass, as `op.lars_update_`. Does not wait: an `lr` on the device is read there."""
    columns = [params, matching_grads(params, grads), momentum_buffers]
    table = pointer_table("lars_update_", columns, [_scaled(params, adapt)])
    if not table.chunks:
        return
    with device_guard(params[0]):
        lars_update_kernel[(table.chunks,)](
            table.pointers,
            table.sizes,
            table.chunk_rows,
            table.chunk_starts,
            squares_T2,
            found_inf,
            lr if lr.is_cuda else None,
            table.rows,
            0.0 if lr.is_cuda else lr.item(),
            momentum,
            weight_decay,
            trust_coefficient,
            WORD=_WORDS[params[0].dtype],
            CHUNK=table.chunk,
            LR_IN_BUFFER=lr_in_buffer,
            num_warps=NUM_WARPS,
        )
    torch.autograd.graph.increment_version([*params, *momentum_buffers])


def matching_grads(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The gradients in their parameters' dtype and memory order; what fits already is passed on."""
    return [
        grad
        if grad.dtype == param.dtype and same_layout(param, grad)
        else torch.empty_like(param).copy_(grad)
        for param, grad in zip(params, grads, strict=True)
    ]


def _scaled(params: Sequence[Tensor], adapt: Sequence[bool]) -> list[Tensor | None]:
    """The column that marks tensors that are decayed and scaled."""
    return [param if adapted else None for param, adapted in zip(params, adapt, strict=True)]
