"""dq, dk and dv of any strides into one [B, L, 3 E], and its sums over rows.

A program takes COLS columns of one of the three and goes through rows (image and token); its sums
stay in registers and are written once. No atomics: `column_sums` adds the table of partial sums.

Legend: L tokens, E width, D columns of a head, COLS columns and ROWS rows at a time.
"""

import triton
import triton.language as tl


@triton.jit
def _stack(
    part_ptr,  # [B, A, L, d] by its strides
    stride_b,
    stride_a,
    stride_l,
    stack_ptr,  # [B, L, 3 E] from this part's first column
    partial_ptr,  # [programs, 3 E] from this part's first column
    rows,
    L,
    col,
    HAS_BIAS: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One of the three."""
    program, programs = tl.program_id(1), tl.num_programs(1)
    row = tl.arange(0, ROWS)
    from_col = (col // D) * stride_a + col % D
    to = row[:, None] * (3 * E) + col[None, :]
    total = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(program * ROWS, rows, programs * ROWS):
        there = first + row < rows
        inside = there[:, None] & (col < E)[None, :]
        image, token = (first + row) // L, (first + row) % L
        from_row = image.to(tl.int64) * stride_b + token.to(tl.int64) * stride_l
        part = tl.load(part_ptr + from_row[:, None] + from_col[None, :], mask=inside, other=0.0)
        tl.store(stack_ptr + tl.full((), first, tl.int64) * (3 * E) + to, part, mask=inside)
        if HAS_BIAS:
            total += part.to(tl.float32)
    if HAS_BIAS:
        tl.store(partial_ptr + program * (3 * E) + col, tl.sum(total, 0), mask=col < E)


@triton.jit(do_not_specialize=["rows", "L"])
def split_qkv_bwd_kernel(
    dq_ptr,  # [B, A, L, d]
    dk_ptr,
    dv_ptr,
    stride_qb,
    stride_qa,
    stride_ql,
    stride_kb,
    stride_ka,
    stride_kl,
    stride_vb,
    stride_va,
    stride_vl,
    dqkv_ptr,  # [B, L, 3 E]
    partial_ptr,  # [programs, 3 E] float32; not written without HAS_BIAS
    rows,
    L,
    HAS_BIAS: tl.constexpr,
    E: tl.constexpr,
    D: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dqkv, and partial sums over its rows."""
    blocks: tl.constexpr = (E + COLS - 1) // COLS
    which = tl.program_id(0) // blocks
    col = (tl.program_id(0) % blocks) * COLS + tl.arange(0, COLS)
    # The same code three times: of a pointer chosen by a condition the compiler does not know the
    # alignment.
    if which == 0:
        _stack(
            dq_ptr,
            stride_qb,
            stride_qa,
            stride_ql,
            dqkv_ptr,
            partial_ptr,
            rows,
            L,
            col,
            HAS_BIAS,
            E,
            D,
            COLS,
            ROWS,
        )
    elif which == 1:
        dqkv_ptr, partial_ptr = dqkv_ptr + E, partial_ptr + E
        _stack(
            dk_ptr,
            stride_kb,
            stride_ka,
            stride_kl,
            dqkv_ptr,
            partial_ptr,
            rows,
            L,
            col,
            HAS_BIAS,
            E,
            D,
            COLS,
            ROWS,
        )
    else:
        dqkv_ptr, partial_ptr = dqkv_ptr + 2 * E, partial_ptr + 2 * E
        _stack(
            dv_ptr,
            stride_vb,
            stride_va,
            stride_vl,
            dqkv_ptr,
            partial_ptr,
            rows,
            L,
            col,
            HAS_BIAS,
            E,
            D,
            COLS,
            ROWS,
        )
