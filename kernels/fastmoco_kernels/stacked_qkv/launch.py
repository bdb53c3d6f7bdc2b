"""Launches of the stack of gradients: blocks of columns of one part, programs that share rows.

A thread holds about 16 numbers of its tile. The gradients' strides are read as they are: flash
attention leaves [B, L, A, d] in memory, others [B, A, L, d].
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastmoco_kernels.backends import device_guard
from fastmoco_kernels.column_sums.launch import (
    Tile,
    add_partial_sums,
    parts,
    row_programs,
    shared_tiles,
)
from fastmoco_kernels.stacked_qkv.triton_kernels import split_qkv_bwd_kernel
from fastmoco_kernels.tuning import tuned

WARPS = 4


def columns(E: int) -> int:
    """Columns of a block: the widest of 64, 128, 256 that divides E, else a power of two."""
    for cols in (256, 128, 64):
        if E % cols == 0:
            return cols
    return min(256, max(32, 1 << (E - 1).bit_length()))


@functools.cache
def tiles(E: int) -> list[Tile]:
    """(rows at a time, programs a processor), the default first."""
    return shared_tiles(columns(E), WARPS)


def programs_of(rows: int, E: int, tile: Tile, device: torch.device) -> int:
    """Programs that share the rows."""
    return row_programs(rows, tile[0], 3 * parts(E, columns(E)), tile[1], device)


def backward(
    dq: Tensor, dk: Tensor, dv: Tensor, bias_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """dqkv [B, L, 3 E], and its sums over rows in the bias's dtype (empty without one)."""
    dq, dk, dv = (t if t.stride(3) == 1 else t.contiguous() for t in (dq, dk, dv))
    B, A, L, d = dq.shape
    E, rows = A * d, B * L
    dqkv = torch.empty(B, L, 3 * E, dtype=dq.dtype, device=dq.device)
    shape = (0,) if bias_dtype is None else (3 * E,)
    dbias = torch.empty(shape, dtype=bias_dtype or dq.dtype, device=dq.device)
    if rows == 0:
        return dqkv, dbias.zero_()
    constants = {"HAS_BIAS": bias_dtype is not None, "E": E, "D": d, "COLS": columns(E)}
    strides = [stride for t in (dq, dk, dv) for stride in t.stride()[:3]]

    def run(tile: Tile) -> None:
        programs = programs_of(rows, E, tile, dq.device)
        partial = (
            dqkv
            if bias_dtype is None
            else torch.empty(programs, 3 * E, dtype=torch.float32, device=dq.device)
        )
        grid = (3 * parts(E, columns(E)), programs)
        split_qkv_bwd_kernel[grid](
            dq, dk, dv, *strides, dqkv, partial, rows, L, **constants, ROWS=tile[0], num_warps=WARPS
        )
        if bias_dtype is not None:
            add_partial_sums(partial, dbias)

    with device_guard(dq):
        order = "by token" if dq.stride(1) < dq.stride(2) else "by head"
        key = (
            f"2**{rows.bit_length()} rows",
            E,
            d,
            str(dq.dtype).removeprefix("torch."),
            order,
            str(bias_dtype),
        )
        run(tuned("stacked_qkv.bwd", key, tiles(E), tiles(E)[0], run, dq.device))
    return dqkv, dbias
