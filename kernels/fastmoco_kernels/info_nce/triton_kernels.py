"""The kernels of the pass: rows to unit length, and one pass over the keys.

Legend: x rows that stay on chip (queries; keys in the second pass), y rows that stream past (keys;
queries in the second pass), D the padded dimension, S the direction (view 1 or view 2). Scratch
tensors are padded with zero rows and columns to whole tiles, so nothing in the loop is masked but
the positive and the end of the keys.

A term of the sums is `2^(s * scale_log2 - reference)`. The reference is a constant: cosines are
bounded, so no running maximum is needed, and parts of the keys add.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def round_to_tf32(x):
    """The nearest float32 with a 10-bit mantissa; tensor cores truncate, which biases products."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def temperature_log2(temperature_ptr, scale_log2, CEILING: tl.constexpr, ON_DEVICE: tl.constexpr):
    """`c = log2(e) / temperature` and the constant reference `max(c - CEILING, 0)`."""
    if ON_DEVICE:
        scale_log2 = LOG2_E / tl.load(temperature_ptr).to(tl.float32)
    return scale_log2, tl.maximum(scale_log2 - CEILING, 0.0)


@triton.jit
def info_nce_unit_rows_kernel(
    first_ptr,  # [rows, dim]
    second_ptr,  # [rows, dim]
    unit_ptr,  # [S, rows_padded, D]
    norm_ptr,  # [S, rows] fp32
    rows,
    rows_padded,
    dim,
    stride_row,
    stride_column,
    EPS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    TF32: tl.constexpr,
    NORMALISE: tl.constexpr,
):
    """Rows at unit length in the operands' type, padded with zero rows, and their lengths.

    Without NORMALISE rows stay as long as they are.
    """
    direction = tl.program_id(1)
    raw_ptr = first_ptr
    if direction == 1:
        raw_ptr = second_ptr
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    inside = (row < rows)[:, None] & (column < dim)[None, :]
    raw = tl.load(
        raw_ptr + row[:, None] * stride_row + column[None, :] * stride_column,
        mask=inside,
        other=0.0,
    )
    raw = raw.to(tl.float32)
    norm = tl.sqrt(tl.sum(raw * raw, 1))
    unit = raw
    if NORMALISE:
        unit = raw / tl.maximum(norm, EPS)[:, None]
    if TF32:
        unit = round_to_tf32(unit)
    unit_ptr += direction.to(tl.int64) * rows_padded * D
    tl.store(unit_ptr + row[:, None] * D + column[None, :], unit.to(unit_ptr.dtype.element_ty))
    tl.store(norm_ptr + direction.to(tl.int64) * rows + row, norm, mask=row < rows)


@triton.jit
def info_nce_own_kernel(
    x_ptr,  # [S, x_padded, D]
    y_ptr,  # [S, y_padded, D]
    own_ptr,  # [S, x_padded] fp32
    x_padded,
    y_padded,
    y_rows,
    positive_shift,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Cosine of each x and its positive from the rounded rows, as the ranks compare it."""
    direction = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    positive = row + positive_shift
    x = tl.load(x_ptr + (direction * x_padded + row)[:, None] * D + column[None, :])
    inside = (positive < y_rows)[:, None] & (column < D)[None, :]
    y = tl.load(
        y_ptr + (direction * y_padded + positive)[:, None] * D + column[None, :],
        mask=inside,
        other=0.0,
    )
    tl.store(own_ptr + direction * x_padded + row, tl.sum(x.to(tl.float32) * y.to(tl.float32), 1))


@triton.jit
def info_nce_stream_kernel(
    x_ptr,  # [S, x_padded, D]
    y_ptr,  # [S, y_padded, D]
    acc_ptr,  # [splits, S, x_padded, D] fp32: sum_j term_ij y_j without the positive
    sum_ptr,  # [splits, S, x_padded] fp32: sum_j term_ij without the positive
    count_ptr,  # [splits, S, x_padded] i32: negatives at least as similar as the positive
    own_ptr,  # [S, x_padded] fp32: cosine of each x and its positive, from rounded rows
    bias_ptr,  # [S, y_padded] fp32: minus the reference of each y, in the second pass
    temperature_ptr,
    scale_log2,
    x_padded,
    y_rows,
    y_padded,
    positive_shift,  # the positive of x row i is y row i + positive_shift
    tiles_per_split,
    D: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    GRADIENT: tl.constexpr,
    COUNT: tl.constexpr,
    BIAS: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    CEILING: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sums of one block of x over one part of the y.

    The epilogue is a separate kernel, or it spills.
    """
    split = tl.program_id(1)
    direction = tl.program_id(2).to(tl.int64)
    scale, reference = temperature_log2(temperature_ptr, scale_log2, CEILING, ON_DEVICE)
    row = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    offset = tl.arange(0, BLOCK_Y)
    column = tl.arange(0, D)
    x_ptr += direction * x_padded * D + tl.program_id(0).to(tl.int64) * BLOCK_X * D
    y_ptr += direction * y_padded * D

    x = tl.load(x_ptr + tl.arange(0, BLOCK_X)[:, None] * D + column[None, :])
    positive = row + positive_shift
    first = split * tiles_per_split
    last = tl.minimum(first + tiles_per_split, tl.cdiv(y_rows, BLOCK_Y))

    total = tl.zeros([BLOCK_X], tl.float32)
    acc = tl.zeros([BLOCK_X, D], tl.float32)
    count = tl.zeros([BLOCK_X], tl.float32)
    if COUNT:
        # 64 units in the last place lower: equal rows must tie in any order of summation
        own = tl.load(own_ptr + direction * x_padded + row) - 7.6e-6
        own_term = tl.exp2(tl.maximum(own, -1.0) * scale - reference)
    # one 64-bit base and 32-bit offsets: a tensor of pointers would hold registers in the loop
    y_ptr += first.to(tl.int64) * BLOCK_Y * D
    y_place = offset[:, None] * D + column[None, :]
    for tile in range(first, last):
        y = tl.load(y_ptr + y_place)
        similarity = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        place = tile * BLOCK_Y + offset
        bias = -reference
        if BIAS:
            bias = tl.load(bias_ptr + direction * y_padded + place)[None, :]

        # Terms of all negatives; positives and padding are 0.
        term = tl.exp2(
            tl.fma(
                similarity,
                tl.full(similarity.shape, scale, tl.float32),
                bias + tl.zeros_like(similarity),
            )
        )
        negative = place[None, :] != positive[:, None]
        if not BIAS:  # in the second pass the padding's reference is infinite
            negative = negative & (place < y_rows)[None, :]
        term = tl.where(negative, term, 0.0)

        if COUNT:  # terms rise with cosines, and those that are masked are 0
            count += tl.sum(tl.where(term >= own_term[:, None], 1.0, 0.0), 1)
        total += tl.sum(term, 1)
        if GRADIENT:
            if PRECISION == "tf32":
                term = round_to_tf32(term)
            acc = tl.dot(term.to(y.dtype), y, acc, input_precision=PRECISION)
        y_ptr += BLOCK_Y * D

    out = (split * tl.num_programs(2) + direction) * x_padded + tl.program_id(0) * BLOCK_X
    local = tl.arange(0, BLOCK_X)
    if not BIAS:
        tl.store(sum_ptr + out + local, total)
    if COUNT:
        tl.store(count_ptr + out + local, count.to(tl.int32))
    if GRADIENT:
        tl.store(acc_ptr + out * D + (local[:, None] * D + column[None, :]), acc)
