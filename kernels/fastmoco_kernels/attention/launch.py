"""Launches of the short-sequence kernels: tiles, warps, layout of the results.

Defaults are chosen per chip such that none spills registers under any supported Triton: the
backward of head dimension 64 takes its keys 16 at a time (32 on Blackwell), that of 32 takes 32; a
smaller last tile of queries fits on Hopper alone, and is a default for head dimension 32 only.
float32 has no tiles: its products take their operands from registers, and one head's keys do not
fit in a thread's. `benchmarks/aot` compiles all that can be picked.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastmoco_kernels.attention.choice import TRITON_LONGEST
from fastmoco_kernels.attention.triton_kernels import (
    short_attention_bwd_kernel,
    short_attention_fwd_kernel,
)
from fastmoco_kernels.backends import device_guard
from fastmoco_kernels.tuning import tuned

Rows = tuple[int, int, int]
Tile = tuple[int, ...]
VIT_ROWS = (128, 64, 16)
"""208 rows, for the 197 tokens of a picture of 224 in patches of 16."""
KEY_ROWS: tuple[Rows, ...] = ((64, 0, 0), (128, 0, 0), (128, 64, 0), VIT_ROWS, (256, 0, 0))
"""How the forward splits its keys. Only the last tile may be partly empty: no other is masked."""
QUERY_ROWS: tuple[Rows, ...] = ((16, 0, 0), (64, 0, 0), (128, 0, 0), VIT_ROWS, (256, 0, 0))
"""How the backward splits its queries; rows beyond them add 0, in any tile."""
CHIPS = (80, 90, 100)


def row_tiles(rows: int, cuts: tuple[Rows, ...]) -> Rows:
    """The smallest split that holds `rows` rows.

    Raises:
        ValueError: for more rows than fit on chip.
    """
    for tiles in cuts:
        if sum(tiles) >= rows:
            return tiles
    raise ValueError(
        f"attention: backend='triton' holds {TRITON_LONGEST} rows on chip; {rows} are too many"
    )


def forward_tiles(chip: int, head_dim: int, queries: int, keys: Rows) -> list[Tile]:
    """(rows of queries at a time, rows of the last tile, warps, stages), the default first."""
    if queries <= 16:
        return [(16, 0, 4, 1)]
    if keys != VIT_ROWS:
        return [(64, 0, 8 if keys == KEY_ROWS[-1] else 4, 1)]
    plain: list[Tile] = [(64, 0, 4, 1), (128, 0, 8, 1)]
    if chip != 90 or not 0 < queries % 64 <= 16:
        return plain
    # With the smaller last tile Triton 3.6 spills 132 bytes at head dimension 64; it may still
    # measure faster.
    return [(64, 16, 4, 1), *plain] if head_dim == 32 else [*plain, (64, 16, 4, 1)]


def backward_tiles(chip: int, head_dim: int, queries: Rows) -> list[Tile]:
    """(keys at a time, warps, stages), the default first."""
    if queries != VIT_ROWS:
        return [(32 if head_dim == 32 else 16, 4 if queries == QUERY_ROWS[0] else 8, 2)]
    if head_dim == 64:
        return [(32, 8, 2), (16, 8, 2)] if chip == 100 else [(16, 8, 2)]
    tiles: list[Tile] = [(32, 8, 2), (16, 8, 2)]
    # Four warps leave room for a second program on a processor; only those that spill nowhere.
    return tiles + {90: [(32, 4, 2), (16, 4, 2)], 100: [(16, 4, 2)]}.get(chip, [])


def in_halves(chip: int, head_dim: int, queries: int) -> bool:
    """Whether the backward splits its queries: 256 rows of 64 do not fit Ampere's registers."""
    return chip == 80 and head_dim == 64 and queries > sum(VIT_ROWS)


def _chip(device: torch.device) -> int:
    """The architecture whose defaults a device takes.

    Consumer Blackwell (12.x) has Ampere's MMA.
    """
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return {9: 90, 10: 100, 11: 100}.get(major, 80)


def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output [B, A, L, d], in memory [B, L, A, d]; log2 of the softmax's denominator [B, A, L]."""
    q, k, v = _readable(q), _readable(k), _readable(v)
    B, A, L, d = q.shape
    M = k.shape[2]
    out = torch.empty(B, L, A, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, A, L, dtype=torch.float32, device=q.device)
    keys = row_tiles(M, KEY_ROWS)

    def run(tile: Tile) -> None:
        short_attention_fwd_kernel[(B * A,)](
            q,
            k,
            v,
            out,
            lse,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            A,
            L,
            M,
            d**-0.5 * math.log2(math.e),
            **forward_constants(d, keys, tile),
            num_warps=tile[2],
            num_stages=tile[3],
        )

    with device_guard(q):
        tiles = forward_tiles(_chip(q.device), d, L, keys)
        run(tuned("attention.fwd", (B * A, L, M, d, str(q.dtype)), tiles, tiles[0], run, q.device))
    return out.transpose(1, 2), lse


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to q [B, A, L, d], k and v [B, A, M, d], in memory as [B, rows, A, d].

    Where the queries go `in_halves`, the two parts of dk and dv are rounded before they are added.
    """
    if not in_halves(_chip(q.device), q.shape[3], q.shape[2]):
        return _backward(grad, q, k, v, out, lse)
    parts = [
        _backward(
            grad[:, :, part], q[:, :, part], k, v, out[:, :, part], lse[:, :, part].contiguous()
        )
        for part in (slice(0, 128), slice(128, None))
    ]
    (dq1, dk1, dv1), (dq2, dk2, dv2) = parts
    return (
        torch.cat([dq1.transpose(1, 2), dq2.transpose(1, 2)], dim=1).transpose(1, 2),
        dk1 + dk2,
        dv1 + dv2,
    )


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad, q, k, v, out = (_readable(t) for t in (grad, q, k, v, out))
    B, A, L, d = q.shape
    M = k.shape[2]
    dq = torch.empty(B, L, A, d, dtype=q.dtype, device=q.device)
    dk, dv = (torch.empty(B, M, A, d, dtype=q.dtype, device=q.device) for _ in range(2))
    queries = row_tiles(L, QUERY_ROWS)

    def run(tile: Tile) -> None:
        short_attention_bwd_kernel[(B * A,)](
            q,
            k,
            v,
            out,
            grad,
            lse,
            dq,
            dk,
            dv,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *out.stride()[:3],
            *grad.stride()[:3],
            A,
            L,
            M,
            d**-0.5 * math.log2(math.e),
            d**-0.5,
            **backward_constants(d, queries, tile),
            num_warps=tile[1],
            num_stages=tile[2],
        )

    with device_guard(q):
        tiles = backward_tiles(_chip(q.device), d, queries)
        run(tuned("attention.bwd", (B * A, L, M, d, str(q.dtype)), tiles, tiles[0], run, q.device))
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _readable(t: Tensor) -> Tensor:
    """Contiguous rows of d at 32-bit offsets are read as they are; other layouts are copied."""
    return t if t.stride(3) == 1 and t.shape[2] * t.stride(2) < 2**31 else t.contiguous()


def forward_constants(head_dim: int, keys: Rows, tile: Tile) -> dict[str, Any]:
    """The constexprs of the forward kernel."""
    # "ieee" is for float32 products; it has no effect on 16-bit types.
    names = {"D": head_dim, "QUERIES": tile[0], "TAIL": tile[1], "PRECISION": "ieee"}
    return names | {f"KEYS_{i + 1}": rows for i, rows in enumerate(keys)}


def backward_constants(head_dim: int, queries: Rows, tile: Tile) -> dict[str, Any]:
    """The constexprs of the backward kernel."""
    names = {"D": head_dim, "KEYS": tile[0], "PRECISION": "ieee"}
    return names | {f"QUERIES_{i + 1}": rows for i, rows in enumerate(queries)}
