"""Residual add and layer norm: a program keeps ROWS whole rows in registers.

A row is read once: mean, then the mean square of the difference, from registers. The backward also
needs two sums a row, and the sums over all rows for weight and bias; a program keeps its part of
those in registers while it goes through rows in a fixed order, and writes it to a table that a
small kernel adds. No atomics: reproducible bit by bit on one GPU and tile.

Legend: E width, COLS the power of two that holds it, ROWS rows at a time. All arithmetic is
float32, whatever is stored.
"""

import triton
import triton.language as tl


@triton.jit
def _columns(COLS: tl.constexpr):
    """0 .. COLS - 1, four at a time for all types: one register layout for float32 and 16-bit.

    Otherwise one of them is converted through shared memory.
    """
    return tl.max_contiguous(tl.arange(0, COLS), 4)


@triton.jit(do_not_specialize=["rows"])
def residual_norm_fwd_kernel(
    x_ptr,  # [rows, E]
    branch_ptr,  # [rows, E]; not read without HAS_BRANCH
    weight_ptr,  # [E]
    bias_ptr,  # [E]
    x_new_ptr,  # [rows, E]; not written without HAS_BRANCH
    y_ptr,  # [rows, E]
    mean_ptr,  # [rows] float32
    rstd_ptr,  # [rows] float32
    rows,
    eps,
    HAS_BRANCH: tl.constexpr,
    E: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """x_new = x + branch; y = (x_new - mean) * rstd * weight + bias."""
    start = tl.program_id(0).to(tl.int64) * ROWS
    row, col = tl.arange(0, ROWS), _columns(COLS)
    filled = (col < E)[None, :]
    inside = (start + row < rows)[:, None] & filled
    at = row[:, None] * E + col[None, :]
    x = tl.load(x_ptr + start * E + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        x += tl.load(branch_ptr + start * E + at, mask=inside, other=0.0).to(tl.float32)
        x_new = x.to(x_new_ptr.dtype.element_ty)
        tl.store(x_new_ptr + start * E + at, x_new, mask=inside)
        x = x_new.to(tl.float32)  # the statistics are those of what is stored
    mean = tl.sum(x, 1) / E
    centred = tl.where(filled, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / E + eps)
    weight = tl.load(weight_ptr + col, mask=col < E, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=col < E, other=0.0).to(tl.float32)
    y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + start * E + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + start + row, mean, mask=start + row < rows)
    tl.store(rstd_ptr + start + row, rstd, mask=start + row < rows)


@triton.jit(do_not_specialize=["rows"])
def residual_norm_bwd_kernel(
    dy_ptr,  # [rows, E]
    dx_new_ptr,  # [rows, E]; not read without HAS_DX_NEW
    x_new_ptr,  # [rows, E]
    weight_ptr,  # [E]
    mean_ptr,  # [rows] float32
    rstd_ptr,  # [rows] float32
    dx_ptr,  # [rows, E]
    dbranch_ptr,  # [rows, E]; not written without HAS_DBRANCH
    partial_ptr,  # [2 or 3, programs, E] float32: parts of dweight, dbias, dbranch_bias
    rows,
    HAS_DX_NEW: tl.constexpr,
    HAS_DBRANCH: tl.constexpr,
    HAS_BRANCH_BIAS: tl.constexpr,
    E: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dx = dx_new + rstd * (g - mean(g) - xhat * mean(g * xhat)), g = weight * dy.

    dbranch is dx in its own type.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    row, col = tl.arange(0, ROWS), _columns(COLS)
    at = row[:, None] * E + col[None, :]
    weight = tl.load(weight_ptr + col, mask=col < E, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
    dbranch_bias = tl.zeros([COLS], tl.float32)

    for first in range(program * ROWS, rows, programs * ROWS):
        start = tl.full((), first, tl.int64)
        there = start + row < rows
        inside = there[:, None] & (col < E)[None, :]

        dy = tl.load(dy_ptr + start * E + at, mask=inside, other=0.0).to(tl.float32)
        x_new = tl.load(x_new_ptr + start * E + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_DX_NEW:
            dx = tl.load(dx_new_ptr + start * E + at, mask=inside, other=0.0).to(tl.float32)
        else:
            dx = tl.zeros([ROWS, COLS], tl.float32)
        mean = tl.load(mean_ptr + start + row, mask=there, other=0.0)
        rstd = tl.load(rstd_ptr + start + row, mask=there, other=0.0)

        xhat = (x_new - mean[:, None]) * rstd[:, None]
        g = dy * weight[None, :]
        along_xhat = tl.sum(g * xhat, 1) / E  # beyond the width and the rows g is 0
        along_one = tl.sum(g, 1) / E
        dx += (g - along_one[:, None] - xhat * along_xhat[:, None]) * rstd[:, None]
        tl.store(dx_ptr + start * E + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if HAS_DBRANCH:
            tl.store(dbranch_ptr + start * E + at, dx.to(dbranch_ptr.dtype.element_ty), mask=inside)

        # This program's part of the sums over rows.
        dweight += tl.sum(dy * xhat, 0)
        dbias += tl.sum(dy, 0)
        if HAS_BRANCH_BIAS:  # of what is stored; beyond the rows dx is 0
            if HAS_DBRANCH:
                dbranch_bias += tl.sum(dx.to(dbranch_ptr.dtype.element_ty).to(tl.float32), 0)
            else:
                dbranch_bias += tl.sum(dx.to(dx_ptr.dtype.element_ty).to(tl.float32), 0)

    tl.store(partial_ptr + program * E + col, dweight, mask=col < E)
    tl.store(partial_ptr + (programs + program) * E + col, dbias, mask=col < E)
    if HAS_BRANCH_BIAS:
        tl.store(partial_ptr + (2 * programs + program) * E + col, dbranch_bias, mask=col < E)


@triton.jit(do_not_specialize=["programs"])
def residual_norm_sum_kernel(
    partial_ptr,  # [2 or 3, programs, E] float32
    dweight_ptr,  # [E]
    dbias_ptr,  # [E]
    dbranch_bias_ptr,  # [E]; not written where the grid has two rows
    programs,
    E: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dweight, dbias, dbranch_bias: the sums over all programs, COLS columns of one of them."""
    which = tl.program_id(1)
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    row = tl.arange(0, ROWS)
    partial_ptr += which * programs * E
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, programs, ROWS):
        inside = (start + row < programs)[:, None] & (col < E)[None, :]
        total += tl.load(
            partial_ptr + (start + row)[:, None] * E + col[None, :], mask=inside, other=0.0
        )
    summed = tl.sum(total, 0)
    if which == 0:
        tl.store(dweight_ptr + col, summed.to(dweight_ptr.dtype.element_ty), mask=col < E)
    elif which == 1:
        tl.store(dbias_ptr + col, summed.to(dbias_ptr.dtype.element_ty), mask=col < E)
    else:
        tl.store(dbranch_bias_ptr + col, summed.to(dbranch_bias_ptr.dtype.element_ty), mask=col < E)
