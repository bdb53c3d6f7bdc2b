"""Launches of the gradient of GELU: blocks of columns, and programs that share the rows.

A thread holds about 16 numbers of every tensor; 256 columns are one warp's 16-byte reads of 16-bit
numbers.
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
from fastmoco_kernels.gelu_bias.triton_kernels import gelu_bwd_kernel
from fastmoco_kernels.tuning import tuned

WARPS = 4


def columns(F: int) -> int:
    """Columns of a block: a power of two."""
    return min(256, max(32, 1 << (F - 1).bit_length()))


@functools.cache
def tiles(F: int) -> list[Tile]:
    """(rows at a time, programs a processor), the default first."""
    return shared_tiles(columns(F), WARPS)


def programs_of(rows: int, F: int, tile: Tile, device: torch.device) -> int:
    """Programs that share the rows."""
    return row_programs(rows, tile[0], parts(F, columns(F)), tile[1], device)


def backward(dy: Tensor, h: Tensor, bias_dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """dh, and its sums over rows in the bias's dtype (empty without one)."""
    dy, h = dy.contiguous(), h.contiguous()
    F = h.shape[-1]
    rows = h.numel() // F
    dh = torch.empty_like(h)
    shape = (0,) if bias_dtype is None else (F,)
    dbias = torch.empty(shape, dtype=bias_dtype or h.dtype, device=h.device)
    if rows == 0:
        return dh, dbias.zero_()
    constants = {"HAS_BIAS": bias_dtype is not None, "F": F, "COLS": columns(F)}

    def run(tile: Tile) -> None:
        programs = programs_of(rows, F, tile, h.device)
        partial = (
            dh
            if bias_dtype is None
            else torch.empty(programs, F, dtype=torch.float32, device=h.device)
        )
        gelu_bwd_kernel[(parts(F, columns(F)), programs)](
            dy, h, dh, partial, rows, **constants, ROWS=tile[0], num_warps=WARPS
        )
        if bias_dtype is not None:
            add_partial_sums(partial, dbias)

    with device_guard(h):
        key = (
            f"2**{rows.bit_length()} rows",
            F,
            str(h.dtype).removeprefix("torch."),
            "bias" if dbias.numel() else "",
        )
        run(tuned("gelu_bias.bwd", key, tiles(F), tiles(F)[0], run, h.device))
    return dh, dbias
