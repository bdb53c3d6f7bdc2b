"""Backward of a fused block's norm and GELU, which also recompute what the forward returned.

As in `residual_norm` a program of the norm takes ROWS whole rows at a time, which stay in
registers; as in `gelu_bias` one of GELU takes COLS columns and goes through rows. Programs leave
partial sums in a table that `column_sums` adds in a fixed order: no atomics, reproducible bit by
bit on one GPU and tile.

Legend: E or F width, COLS columns and ROWS rows at a time. All arithmetic is float32, whatever is
stored.
"""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
DENSITY_AT_0 = tl.constexpr(0.3989422804014327)


@triton.jit
def _read(ptr, start, at, inside, E: tl.constexpr):
    return tl.load(ptr + start * E + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def block_norm_bwd_kernel(
    dy_ptr,  # [rows, E]
    dsum_ptr,  # [rows, E]; not read without HAS_DSUM
    x_ptr,  # [rows, E]
    branch_ptr,  # [rows, E]; not read without HAS_BRANCH
    weight_ptr,  # [E]
    bias_ptr,  # [E]
    mean_ptr,  # [rows] float32, of x + branch
    rstd_ptr,  # [rows] float32
    dx_ptr,  # [rows, E]
    dbranch_ptr,  # [rows, E]; not written without HAS_DBRANCH
    y_ptr,  # [rows, E]
    partial_ptr,  # [programs, 3 or 2, E] float32: dweight, dbias, with HAS_BRANCH sum of dbranch
    rows,
    HAS_DSUM: tl.constexpr,
    HAS_BRANCH: tl.constexpr,
    HAS_DBRANCH: tl.constexpr,
    E: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dx = dsum + rstd * (g - mean(g) - xhat * mean(g * xhat)), g = weight * dy.

    y = xhat * weight + bias

    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    # Four columns at a time for all types, so that float32 and 16-bit tensors have one register
    # layout.
    row, col = tl.arange(0, ROWS), tl.max_contiguous(tl.arange(0, COLS), 4)
    at = row[:, None] * E + col[None, :]
    weight = tl.load(weight_ptr + col, mask=col < E, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + col, mask=col < E, other=0.0).to(tl.float32)
    dweight, dbias = tl.zeros([COLS], tl.float32), tl.zeros([COLS], tl.float32)
    total = tl.zeros([COLS], tl.float32)

    for first in range(program * ROWS, rows, programs * ROWS):
        start = tl.full((), first, tl.int64)
        there = start + row < rows
        inside = there[:, None] & (col < E)[None, :]

        # The forward again: sum, normalised rows, result.
        x = _read(x_ptr, start, at, inside, E)
        if HAS_BRANCH:
            x = (
                (x + _read(branch_ptr, start, at, inside, E))
                .to(x_ptr.dtype.element_ty)
                .to(tl.float32)
            )
        mean = tl.load(mean_ptr + start + row, mask=there, other=0.0)
        rstd = tl.load(rstd_ptr + start + row, mask=there, other=0.0)
        xhat = (x - mean[:, None]) * rstd[:, None]
        y = xhat * weight[None, :] + bias[None, :]
        tl.store(y_ptr + start * E + at, y.to(y_ptr.dtype.element_ty), mask=inside)

        # Gradients of weight and bias, then of the sum.
        dy = _read(dy_ptr, start, at, inside, E)
        dweight += tl.sum(dy * xhat, 0)  # beyond the width and the rows dy is 0
        dbias += tl.sum(dy, 0)
        g = dy * weight[None, :]
        along_xhat = tl.sum(g * xhat, 1) / E
        along_one = tl.sum(g, 1) / E
        dx = (g - along_one[:, None] - xhat * along_xhat[:, None]) * rstd[:, None]
        if HAS_DSUM:
            dx += _read(dsum_ptr, start, at, inside, E)

        # Stored in one or both types; the branch's columns are summed as they are stored.
        stored = dx.to(dx_ptr.dtype.element_ty)
        tl.store(dx_ptr + start * E + at, stored, mask=inside)
        if HAS_DBRANCH:
            narrow = stored.to(dbranch_ptr.dtype.element_ty)
            tl.store(dbranch_ptr + start * E + at, narrow, mask=inside)
            if HAS_BRANCH:
                # Beyond the rows rstd and dx are 0; columns beyond E are not stored.
                total += tl.sum(narrow.to(tl.float32), 0)
        elif HAS_BRANCH:
            total += tl.sum(stored.to(tl.float32), 0)

    SUMS: tl.constexpr = 3 if HAS_BRANCH else 2
    partial_ptr += program * (SUMS * E)
    tl.store(partial_ptr + col, dweight, mask=col < E)
    tl.store(partial_ptr + E + col, dbias, mask=col < E)
    if HAS_BRANCH:
        tl.store(partial_ptr + 2 * E + col, total, mask=col < E)


@triton.jit(do_not_specialize=["rows"])
def block_gelu_bwd_kernel(
    dg_ptr,  # [rows, F]
    h_ptr,  # [rows, F]
    g_ptr,  # [rows, F]
    dh_ptr,  # [rows, F]
    partial_ptr,  # [programs, F] float32
    rows,
    F: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """g = h * Phi(h); dh = dg * (Phi(h) + h * phi(h)); partial sums of dh as it is stored."""
    program, programs = tl.program_id(1), tl.num_programs(1)
    row, col = tl.arange(0, ROWS), tl.program_id(0) * COLS + tl.arange(0, COLS)
    at = row[:, None] * F + col[None, :]
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        start = tl.full((), first, tl.int64)
        inside = (start + row < rows)[:, None] & (col < F)[None, :]
        h = _read(h_ptr, start, at, inside, F)
        dg = _read(dg_ptr, start, at, inside, F)
        distribution = 0.5 + 0.5 * tl.erf(h * SQRT_HALF)
        tl.store(g_ptr + start * F + at, (h * distribution).to(g_ptr.dtype.element_ty), mask=inside)
        density = DENSITY_AT_0 * tl.exp(-0.5 * h * h)
        dh = (dg * (distribution + h * density)).to(dh_ptr.dtype.element_ty)
        tl.store(dh_ptr + start * F + at, dh, mask=inside)
        total += dh.to(tl.float32)
    tl.store(partial_ptr + program * F + col, tl.sum(total, 0), mask=col < F)
