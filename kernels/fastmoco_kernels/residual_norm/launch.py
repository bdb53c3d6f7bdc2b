"""Launches of the residual layer norm: rows at a time, warps, programs that share the backward.

Warps are along a row, 128 columns each (up to eight), so that a sum over rows stays in a thread; a
thread holds about 16 numbers of every tensor. The backward starts as many programs as run at once,
each for many rows: partial sums stay few. `benchmarks/aot` compiles it at the widths of vision
transformers and at odd ones.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastmoco_kernels.backends import device_guard
from fastmoco_kernels.column_sums.launch import parts, row_programs
from fastmoco_kernels.residual_norm.triton_kernels import (
    residual_norm_bwd_kernel,
    residual_norm_fwd_kernel,
    residual_norm_sum_kernel,
)
from fastmoco_kernels.tuning import tuned

Tile = tuple[int, ...]
SUM_COLS, SUM_ROWS, SUM_WARPS = 32, 64, 4


def columns(E: int) -> int:
    """The power of two that holds a row."""
    return max(32, 1 << (E - 1).bit_length())


@functools.cache
def forward_tiles(E: int) -> list[Tile]:
    """(rows at a time, warps): 16 numbers a thread, the default, then 8, 32, and one warp a row."""
    cols, warps = columns(E), _warps(E)
    tiles: list[Tile] = [(_rows(numbers, warps, cols), warps) for numbers in (16, 8, 32)]
    return list(dict.fromkeys([*tiles, (1, 1)] if cols <= 1024 else tiles))


@functools.cache
def backward_tiles(E: int) -> list[Tile]:
    """(rows at a time, warps, programs a processor): 16 numbers a thread, 8, more programs."""
    cols, warps = columns(E), _warps(E)
    sixteen, eight = (_rows(numbers, warps, cols) for numbers in (16, 8))
    return list(
        dict.fromkeys(
            [
                (sixteen, warps, 16 // warps),
                (eight, warps, 24 // warps),
                (sixteen, warps, 32 // warps),
            ]
        )
    )


def _warps(E: int) -> int:
    return min(8, max(1, columns(E) // 128))


def _rows(numbers: int, warps: int, cols: int) -> int:
    """Rows that make `numbers` a thread."""
    return max(1, numbers * 32 * warps // cols)


def forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_new (empty without a branch), y, and of each row the mean and 1 / standard deviation."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    E = x.shape[-1]
    rows = x.numel() // E
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    if branch is None:
        x_new = torch.empty(0, dtype=x.dtype, device=x.device)
        read, written = x, x  # placeholders: the kernel does not touch them
    else:
        x_new = torch.empty(
            x.shape, dtype=torch.promote_types(x.dtype, branch.dtype), device=x.device
        )
        read, written = branch.contiguous(), x_new
    constants = {"HAS_BRANCH": branch is not None, "E": E, "COLS": columns(E)}

    def run(tile: Tile) -> None:
        residual_norm_fwd_kernel[(parts(rows, tile[0]),)](
            x,
            read,
            weight,
            bias,
            written,
            y,
            mean,
            rstd,
            rows,
            eps,
            **constants,
            ROWS=tile[0],
            num_warps=tile[1],
        )

    if rows:
        with device_guard(x):
            tiles = forward_tiles(E)
            run(
                tuned(
                    "residual_norm.fwd", _key(rows, E, x, branch, y), tiles, tiles[0], run, x.device
                )
            )
    return x_new, y, mean, rstd


def backward(
    dy: Tensor,
    dx_new: Tensor | None,
    x_new: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x_dtype: torch.dtype,
    branch_dtype: torch.dtype | None,
    branch_bias_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dbranch (empty unless `branch_dtype`), dweight, dbias, dbranch_bias (or empty)."""
    dy, x_new, weight = dy.contiguous(), x_new.contiguous(), weight.contiguous()
    dx_new = None if dx_new is None else dx_new.contiguous()
    E = x_new.shape[-1]
    rows = x_new.numel() // E

    # Results; those not needed are empty.
    dx = torch.empty(x_new.shape, dtype=x_dtype, device=x_new.device)
    shape = (0,) if branch_dtype is None else x_new.shape
    dbranch = torch.empty(shape, dtype=branch_dtype or x_dtype, device=x_new.device)
    dweight, dbias = (
        torch.zeros_like(weight) if rows == 0 else torch.empty_like(weight) for _ in range(2)
    )
    sums = 2 if branch_bias_dtype is None else 3
    dbranch_bias = weight.new_zeros(0 if sums == 2 else E, dtype=branch_bias_dtype)

    flags = {
        "HAS_DX_NEW": dx_new is not None,
        "HAS_DBRANCH": branch_dtype is not None,
        "HAS_BRANCH_BIAS": sums == 3,
    }

    def run(tile: Tile) -> None:
        programs = programs_of(rows, tile, x_new.device)
        partial = torch.empty(sums, programs, E, dtype=torch.float32, device=x_new.device)
        residual_norm_bwd_kernel[(programs,)](
            dy,
            x_new if dx_new is None else dx_new,
            x_new,
            weight,
            mean,
            rstd,
            dx,
            dx if branch_dtype is None else dbranch,
            partial,
            rows,
            **flags,
            E=E,
            COLS=columns(E),
            ROWS=tile[0],
            num_warps=tile[1],
        )
        residual_norm_sum_kernel[(parts(E, SUM_COLS), sums)](
            partial,
            dweight,
            dbias,
            dbias if sums == 2 else dbranch_bias,
            programs,
            E=E,
            COLS=SUM_COLS,
            ROWS=SUM_ROWS,
            num_warps=SUM_WARPS,
        )

    if rows:
        with device_guard(x_new):
            tiles = backward_tiles(E)
            key = (*_key(rows, E, x_new, None if branch_dtype is None else dbranch, dy), sums)
            run(tuned("residual_norm.bwd", key, tiles, tiles[0], run, x_new.device))
    return dx, dbranch, dweight, dbias, dbranch_bias


def programs_of(rows: int, tile: Tile, device: torch.device) -> int:
    """Programs of the backward: as many as the device runs at once; none without rows."""
    return row_programs(rows, tile[0], 1, tile[2], device)


def _key(rows: int, E: int, x: Tensor, branch: Tensor | None, y: Tensor) -> tuple[int | str, ...]:
    """What the best tile depends on; of the rows, only their order of magnitude."""
    return (
        f"2**{rows.bit_length()} rows",
        E,
        _name(x.dtype),
        "none" if branch is None else _name(branch.dtype),
        _name(y.dtype),
    )


@functools.cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
