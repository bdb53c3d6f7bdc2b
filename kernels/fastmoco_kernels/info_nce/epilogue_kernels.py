"""The kernels after the pass: they add its parts, the positive, and the gradient of the norm.

Separate kernels, because the streaming one would spill registers. All arithmetic is float32. Legend
as in `triton_kernels.py`.
"""

import triton
import triton.language as tl

from fastmoco_kernels.info_nce.triton_kernels import LOG2_E, temperature_log2

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log2_of_1p_exp2(x):
    """`log2(1 + 2^x)`, accurate for small values too, which are the loss late in training."""
    y = tl.exp2(-tl.abs(x))
    w = 1.0 + y
    rest = tl.where(w == 1.0, y, tl.log(w) * y / tl.where(w == 1.0, 1.0, w - 1.0))
    return tl.maximum(x, 0.0) + rest * LOG2_E


@triton.jit
def unit_rows(
    raw_ptr, norm_ptr, row, live, dim, stride_row, stride_column, EPS: tl.constexpr, D: tl.constexpr
):
    """Some raw rows at unit length, and their lengths."""
    column = tl.arange(0, D)
    inside = live[:, None] & (column < dim)[None, :]
    raw = tl.load(
        raw_ptr + row[:, None] * stride_row + column[None, :] * stride_column,
        mask=inside,
        other=0.0,
    )
    norm = tl.load(norm_ptr + row, mask=live, other=1.0)
    return raw.to(tl.float32) / tl.maximum(norm, EPS)[:, None], norm


@triton.jit
def added_parts(
    sum_ptr,
    acc_ptr,
    count_ptr,
    first,
    step,
    splits,
    live,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    GRADIENT: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Sums of some rows over the parts of the keys, in order; part p is at `first + p * step`."""
    column = tl.arange(0, D)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    count = tl.zeros([ROWS], tl.int32)
    for split in range(splits):
        place = first + split * step
        total += tl.load(sum_ptr + place, mask=live, other=1.0)
        if COUNT:
            count += tl.load(count_ptr + place, mask=live, other=0)
        if GRADIENT:
            acc += tl.load(
                acc_ptr + place[:, None] * D + column[None, :], mask=live[:, None], other=0.0
            )
    return total, acc, count


@triton.jit
def info_nce_fold_kernel(
    acc_ptr,  # [splits, rows, D] as the stream kernel wrote them, for all directions
    sum_ptr,  # [splits, rows]
    count_ptr,  # [splits, rows]
    new_acc_ptr,  # [rows, D]
    new_sum_ptr,  # [rows]
    new_count_ptr,  # [rows]
    rows,
    splits,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    GRADIENT: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Add the parts of the keys so far, in order: they become one part of the next."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    total, acc, count = added_parts(
        sum_ptr, acc_ptr, count_ptr, row, rows, splits, live, D, ROWS, GRADIENT, COUNT
    )
    tl.store(new_sum_ptr + row, total, mask=live)
    if COUNT:
        tl.store(new_count_ptr + row, count, mask=live)
    if GRADIENT:
        column = tl.arange(0, D)
        tl.store(new_acc_ptr + row[:, None] * D + column[None, :], acc, mask=live[:, None])


@triton.jit
def info_nce_finish_kernel(
    q1_ptr,  # [B, dim]
    q2_ptr,
    k1_ptr,  # [N, dim]: the keys of q1
    k2_ptr,
    q_norm_ptr,  # [S, B]
    k_norm_ptr,  # [S, N]
    acc_ptr,  # as the stream kernel wrote them
    sum_ptr,
    count_ptr,
    temperature_ptr,
    row_ptr,  # [4, S, B] fp32: loss, d loss / d temperature, positive first, positive in top 5
    dq_ptr,  # [S, B, dim]
    bias_ptr,  # [S, B_padded] fp32: minus log2 of the row's whole softmax sum, for the second pass
    share_ptr,  # [S, B_padded] fp32: share of the negatives in it
    B,
    B_padded,
    N,
    dim,
    q_stride_row,
    q_stride_column,
    k_stride_row,
    k_stride_column,
    positive_offset,
    splits,
    scale_log2,
    factor,  # of every row's loss in the result
    key_shift,
    EPS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    GRADIENT: tl.constexpr,
    COUNT: tl.constexpr,
    KEYS: tl.constexpr,
    ON_DEVICE: tl.constexpr,
    CEILING: tl.constexpr,
):
    """Add the parts of the keys in order; then positive, loss, and the gradient of the query."""
    direction = tl.program_id(1).to(tl.int64)
    directions = tl.num_programs(1)
    q_ptr = q1_ptr
    k_ptr = k1_ptr
    if direction == 1:
        q_ptr = q2_ptr
        k_ptr = k2_ptr
    scale, reference = temperature_log2(temperature_ptr, scale_log2, CEILING, ON_DEVICE)

    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    live = row < B
    inside = live[:, None] & (column < dim)[None, :]

    # Query and positive at unit length, in float32.
    u, q_norm = unit_rows(
        q_ptr, q_norm_ptr + direction * B, row, live, dim, q_stride_row, q_stride_column, EPS, D
    )
    positive = row + positive_offset
    v, _ = unit_rows(
        k_ptr,
        k_norm_ptr + direction * N,
        positive,
        live,
        dim,
        k_stride_row,
        k_stride_column,
        EPS,
        D,
    )
    own_similarity = tl.sum(u * v, 1)

    # Sums over all parts of the keys.
    first = direction * B_padded + row
    step = directions * B_padded
    total, acc, count = added_parts(
        sum_ptr, acc_ptr, count_ptr, first, step, splits, live, D, ROWS, GRADIENT, COUNT
    )
    # log2 of all negatives over the positive: NaN stays NaN, no negatives stay minus infinity
    some = tl.where(total == 0.0, 1.0, total)
    odds = tl.where(total == 0.0, float("-inf"), tl.log2(some) + reference - own_similarity * scale)
    whole = log2_of_1p_exp2(odds)
    share = 1.0 / (1.0 + tl.exp2(-odds))
    out = direction * B + row
    plane = directions.to(tl.int64) * B
    tl.store(row_ptr + out, whole * LN_2 * factor, mask=live)
    if COUNT:
        tl.store(
            row_ptr + 2 * plane + out, ((count < 1) & (total == total)).to(tl.float32), mask=live
        )
        tl.store(
            row_ptr + 3 * plane + out, ((count < 5) & (total == total)).to(tl.float32), mask=live
        )

    # Gradients of the temperature and, through the norm, of the raw query.
    if GRADIENT:
        inverse_temperature = scale * LN_2
        # The mean of the negatives, minus the positive.
        du = (acc * (1.0 / some)[:, None] - v) * share[:, None]
        along = tl.sum(du * u, 1)
        tl.store(
            row_ptr + plane + out,
            -along * (inverse_temperature * inverse_temperature * factor),
            mask=live,
        )
        back = tl.where(q_norm >= EPS, along, 0.0)
        dq = (du - back[:, None] * u) * (inverse_temperature * factor / tl.maximum(q_norm, EPS))[
            :, None
        ]
        tl.store(
            dq_ptr + out[:, None] * dim + column[None, :],
            dq.to(dq_ptr.dtype.element_ty),
            mask=inside,
        )

    # Per-row values for the second pass.
    if KEYS:
        bias = tl.where(live, key_shift - (own_similarity * scale + whole), float("-inf"))
        tl.store(bias_ptr + first, bias, mask=row < B_padded)
        tl.store(share_ptr + first, share, mask=live)


@triton.jit
def info_nce_finish_keys_kernel(
    q_ptr,  # [B, dim]
    k_ptr,  # [N, dim]
    q_norm_ptr,  # [B]
    k_norm_ptr,  # [N]
    acc_ptr,  # [splits, N_padded, D] of the second pass
    share_ptr,  # [B_padded]
    temperature_ptr,
    dk_ptr,  # [N, dim]
    B,
    N,
    N_padded,
    dim,
    q_stride_row,
    q_stride_column,
    k_stride_row,
    k_stride_column,
    positive_offset,
    splits,
    scale_log2,
    factor,
    unshift,  # 2^-key_shift
    EPS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    ON_DEVICE: tl.constexpr,
):
    """The gradient of each key: its softmax column, minus its query, through the norm."""
    if ON_DEVICE:
        scale_log2 = LOG2_E / tl.load(temperature_ptr).to(tl.float32)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    live = row < N
    inside = live[:, None] & (column < dim)[None, :]
    v, k_norm = unit_rows(k_ptr, k_norm_ptr, row, live, dim, k_stride_row, k_stride_column, EPS, D)
    query = row - positive_offset
    paired = (query >= 0) & (query < B)
    share = tl.load(share_ptr + query, mask=paired, other=0.0)
    u, _ = unit_rows(q_ptr, q_norm_ptr, query, paired, dim, q_stride_row, q_stride_column, EPS, D)
    acc = tl.zeros([ROWS, D], tl.float32)
    for split in range(splits):
        place = split * N_padded + row
        acc += tl.load(
            acc_ptr + place[:, None] * D + column[None, :], mask=live[:, None], other=0.0
        )
    dv = acc * unshift - u * share[:, None]
    along = tl.where(k_norm >= EPS, tl.sum(dv * v, 1), 0.0)
    # A tensor: the interpreter cannot divide a constant.
    wide_factor = tl.full([ROWS], 1.0, tl.float32) * scale_log2 * factor
    dk = (dv - along[:, None] * v) * (wide_factor * LN_2 / tl.maximum(k_norm, EPS))[:, None]
    tl.store(
        dk_ptr + row[:, None] * dim + column[None, :], dk.to(dk_ptr.dtype.element_ty), mask=inside
    )
