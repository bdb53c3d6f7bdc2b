"""Launches of a fused block's backward, with the tiles of `residual_norm` and `gelu_bias`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco_kernels.backends import device_guard
from fastmoco_kernels.column_sums.launch import add_partial_sums, parts
from fastmoco_kernels.fused_block.triton_kernels import block_gelu_bwd_kernel, block_norm_bwd_kernel
from fastmoco_kernels.gelu_bias.launch import WARPS as GELU_WARPS
from fastmoco_kernels.gelu_bias.launch import columns as gelu_columns
from fastmoco_kernels.gelu_bias.launch import programs_of as gelu_programs
from fastmoco_kernels.gelu_bias.launch import tiles as gelu_tiles
from fastmoco_kernels.residual_norm.launch import backward_tiles as norm_tiles
from fastmoco_kernels.residual_norm.launch import columns as norm_columns
from fastmoco_kernels.residual_norm.launch import programs_of as norm_programs
from fastmoco_kernels.tuning import tuned

Tile = tuple[int, ...]


def norm_backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dbranch (empty unless `branch_dtype`), y, float32 sums over rows [3 or 2, E]."""
    dy, x, weight, bias = dy.contiguous(), x.contiguous(), weight.contiguous(), bias.contiguous()
    dsum = None if dsum is None else dsum.contiguous()
    branch = None if branch is None else branch.contiguous()
    E = x.shape[-1]
    rows = x.numel() // E

    dx, y = torch.empty_like(x), torch.empty(x.shape, dtype=dy.dtype, device=x.device)
    shape = (0,) if branch_dtype is None else x.shape
    dbranch = torch.empty(shape, dtype=branch_dtype or x.dtype, device=x.device)
    sums = torch.empty(2 if branch is None else 3, E, dtype=torch.float32, device=x.device)
    if rows == 0:
        return dx, dbranch, y, sums.zero_()
    flags = {
        "HAS_DSUM": dsum is not None,
        "HAS_BRANCH": branch is not None,
        "HAS_DBRANCH": branch_dtype is not None,
    }

    def run(tile: Tile) -> None:
        programs = norm_programs(rows, tile, x.device)
        partial = torch.empty(programs, sums.numel(), dtype=torch.float32, device=x.device)
        block_norm_bwd_kernel[(programs,)](
            dy,
            # Placeholders where a tensor is None: the kernel does not read them.
            x if dsum is None else dsum,
            x,
            x if branch is None else branch,
            weight,
            bias,
            mean,
            rstd,
            dx,
            dx if branch_dtype is None else dbranch,
            y,
            partial,
            rows,
            **flags,
            E=E,
            COLS=norm_columns(E),
            ROWS=tile[0],
            num_warps=tile[1],
        )
        add_partial_sums(partial, sums.view(-1))

    with device_guard(x):
        tiles = norm_tiles(E)
        given = (x, dsum, branch, dy, dbranch)
        types = ("none" if t is None else str(t.dtype).removeprefix("torch.") for t in given)
        key: tuple[int | str, ...] = (f"2**{rows.bit_length()} rows", E, *types)
        run(tuned("fused_block.norm_bwd", key, tiles, tiles[0], run, x.device))
    return dx, dbranch, y, sums


def gelu_backward(dg: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """GELU of h, dh, and the float32 sum over rows of dh: as the reference."""
    dg, h = dg.contiguous(), h.contiguous()
    F = h.shape[-1]
    rows = h.numel() // F
    g, dh = torch.empty_like(h), torch.empty_like(h)
    total = torch.empty(F, dtype=torch.float32, device=h.device)
    if rows == 0:
        return g, dh, total.zero_()

    def run(tile: Tile) -> None:
        programs = gelu_programs(rows, F, tile, h.device)
        partial = torch.empty(programs, F, dtype=torch.float32, device=h.device)
        block_gelu_bwd_kernel[(parts(F, gelu_columns(F)), programs)](
            dg,
            h,
            g,
            dh,
            partial,
            rows,
            F=F,
            COLS=gelu_columns(F),
            ROWS=tile[0],
            num_warps=GELU_WARPS,
        )
        add_partial_sums(partial, total)

    with device_guard(h):
        key = (f"2**{rows.bit_length()} rows", F, str(h.dtype).removeprefix("torch."))
        run(tuned("fused_block.gelu_bwd", key, gelu_tiles(F), gelu_tiles(F)[0], run, h.device))
    return g, dh, total
