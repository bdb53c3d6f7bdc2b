"""The gradient of GELU and its sums over rows: a program takes COLS columns of many rows.

Sums stay in registers, one for each element of the tile, and are written once. No atomics:
`column_sums` adds the table of partial sums.

Legend: F width, COLS columns and ROWS rows at a time. All arithmetic is float32, whatever is
stored.
"""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)


@triton.jit(do_not_specialize=["rows"])
def gelu_bwd_kernel(
    dy_ptr,  # [rows, F]
    h_ptr,  # [rows, F]
    dh_ptr,  # [rows, F]
    partial_ptr,  # [programs, F] float32; not written without HAS_BIAS
    rows,
    HAS_BIAS: tl.constexpr,
    F: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dh = dy * (Phi(h) + h * phi(h)); partial sums of dh as it is stored."""
    program, programs = tl.program_id(1), tl.num_programs(1)
    row, col = tl.arange(0, ROWS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    at = row[:, None] * F + col[None, :]
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        start = tl.full((), first, tl.int64)
        inside = (start + row < rows)[:, None] & (col < F)[None, :]
        h = tl.load(h_ptr + start * F + at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + start * F + at, mask=inside, other=0.0).to(tl.float32)
        distribution = 0.5 + 0.5 * tl.erf(h * SQRT_HALF)
        density = DENSITY_AT_0 * tl.exp(-0.5 * h * h)
        dh = (dy * (distribution + h * density)).to(dh_ptr.dtype.element_ty)
        tl.store(dh_ptr + start * F + at, dh, mask=inside)
        if HAS_BIAS:
            total += dh.to(tl.float32)
    if HAS_BIAS:
        tl.store(partial_ptr + program * F + col, tl.sum(total, 0), mask=col < F)
