"""Partial sums over rows, added in a fixed order: reproducible bit by bit on one GPU and tile."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["programs"])
def column_sum_kernel(
    partial_ptr,  # [programs, E] float32
    sum_ptr,  # [E]
    programs,
    E: tl.constexpr,
    COLS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The sums over all programs of COLS columns."""
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    row = tl.arange(0, ROWS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, programs, ROWS):
        inside = (start + row < programs)[:, None] & (col < E)[None, :]
        total += tl.load(
            partial_ptr + (start + row)[:, None] * E + col[None, :], mask=inside, other=0.0
        )
    tl.store(sum_ptr + col, tl.sum(total, 0).to(sum_ptr.dtype.element_ty), mask=col < E)
