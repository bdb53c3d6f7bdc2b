"""Sums over rows without atomics: programs leave partial sums in a table, one kernel adds them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastmoco_kernels.column_sums.triton_kernels import column_sum_kernel

Tile = tuple[int, ...]
COLS, ROWS, WARPS = 32, 64, 4
_WITHOUT_GPU = 3
"""Processors in the interpreter, where tests want more than one."""


def parts(whole: int, part: int) -> int:
    """`whole / part`, rounded up; triton.cdiv takes the host microseconds."""
    return -(-whole // part)


def add_partial_sums(partial: Tensor, out: Tensor) -> None:
    """`out` [E] = the sums over rows of `partial` [programs, E] float32, in out's dtype."""
    programs, E = partial.shape
    column_sum_kernel[(parts(E, COLS),)](
        partial, out, programs, E=E, COLS=COLS, ROWS=ROWS, num_warps=WARPS
    )


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    if device.type != "cuda":
        return _WITHOUT_GPU
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def shared_tiles(columns: int, warps: int) -> list[Tile]:
    """Tiles for a pass over a block of columns by programs that share the rows.

    (rows at a time, programs a processor), the default first: 16 numbers a thread, then 8 and 32.
    """
    return [
        (numbers * 32 * warps // columns, share)
        for numbers, share in ((16, 8), (8, 12), (32, 4), (16, 12))
    ]


def row_programs(
    rows: int, rows_at_a_time: int, blocks: int, per_processor: int, device: torch.device
) -> int:
    """Programs that share the rows: as many as run at once, divided among `blocks` blocks."""
    return min(parts(rows, rows_at_a_time), max(1, per_processor * processors(device) // blocks))
