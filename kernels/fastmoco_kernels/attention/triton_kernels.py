"""Attention over short sequences: a program computes one head of one image, all keys on chip.

With all keys at once the softmax is exact in two phases (maximum, then sum), without a running
maximum or rescaling. Rows are split into up to three tiles of decreasing power-of-two size: 197 =
128 + 64 + 5 of 16, so that 208 are computed and not 256. Forward: the keys stay on chip, the
queries pass in tiles. Backward: the queries and their gradient stay, the keys pass, and the
gradients of a tile of keys are complete after one iteration. Each program writes its own results
once: no atomics, reproducible bit by bit.

Legend: A heads, L queries, M keys, D head dimension. Scores are held times log2(e) / sqrt(D),
because exp2 is what the hardware computes; `lse` is the logarithm to base 2 of the softmax's
denominator.
"""

import triton
import triton.language as tl


@triton.jit
def _load_rows(ptr, start, rows, stride, ROWS: tl.constexpr, D: tl.constexpr):
    """[ROWS, D] from row `start` on; rows from `rows` on read as 0."""
    row = start + tl.arange(0, ROWS)
    at = row[:, None] * stride + tl.arange(0, D)[None, :]
    return tl.load(ptr + at, mask=row[:, None] < rows, other=0.0)


@triton.jit
def _store_rows(ptr, value, start, rows, stride, ROWS: tl.constexpr, D: tl.constexpr):
    """[ROWS, D] to row `start` on; rows from `rows` on are left out."""
    row = start + tl.arange(0, ROWS)
    at = row[:, None] * stride + tl.arange(0, D)[None, :]
    tl.store(ptr + at, value.to(ptr.dtype.element_ty), mask=row[:, None] < rows)


@triton.jit
def _scores(q, k, start, M, KEYS: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr):
    """[QUERIES, KEYS] dot products; only the last tile can hold columns beyond the keys."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if LAST:
        scores = tl.where((start + tl.arange(0, KEYS))[None, :] < M, scores, float("-inf"))
    return scores


@triton.jit
def _attend(
    q_ptr,
    out_ptr,
    lse_ptr,
    k1,
    v1,
    k2,
    v2,
    k3,
    v3,
    start,
    L,
    M,
    stride_ql,
    stride_ol,
    scale_log2,
    D: tl.constexpr,
    KEYS_1: tl.constexpr,
    KEYS_2: tl.constexpr,
    KEYS_3: tl.constexpr,
    QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output and lse of one tile of queries."""
    q = _load_rows(q_ptr, start, L, stride_ql, QUERIES, D)
    s1 = _scores(q, k1, 0, M, KEYS_1, KEYS_2 == 0, PRECISION)
    top = tl.max(s1, 1)
    if KEYS_2 > 0:
        s2 = _scores(q, k2, KEYS_1, M, KEYS_2, KEYS_3 == 0, PRECISION)
        top = tl.maximum(top, tl.max(s2, 1))
    if KEYS_3 > 0:
        s3 = _scores(q, k3, KEYS_1 + KEYS_2, M, KEYS_3, True, PRECISION)
        top = tl.maximum(top, tl.max(s3, 1))
    top = top * scale_log2
    p1 = tl.exp2(tl.fma(s1, scale_log2, -top[:, None]))
    total = tl.sum(p1, 1)
    out = tl.dot(p1.to(v1.dtype), v1, input_precision=PRECISION)
    if KEYS_2 > 0:
        p2 = tl.exp2(tl.fma(s2, scale_log2, -top[:, None]))
        total += tl.sum(p2, 1)
        out = tl.dot(p2.to(v2.dtype), v2, out, input_precision=PRECISION)
    if KEYS_3 > 0:
        p3 = tl.exp2(tl.fma(s3, scale_log2, -top[:, None]))
        total += tl.sum(p3, 1)
        out = tl.dot(p3.to(v3.dtype), v3, out, input_precision=PRECISION)
    row = start + tl.arange(0, QUERIES)
    tl.store(lse_ptr + row, top + tl.log2(total), mask=row < L)
    _store_rows(out_ptr, out / total[:, None], start, L, stride_ol, QUERIES, D)


@triton.jit
def short_attention_fwd_kernel(
    q_ptr,  # [B, A, L, D] by strides, as are k and v [B, A, M, D]
    k_ptr,
    v_ptr,
    out_ptr,  # [B, L, A, D] contiguous
    lse_ptr,  # [B, A, L] float32, contiguous
    stride_qb,
    stride_qa,
    stride_ql,
    stride_kb,
    stride_ka,
    stride_kl,
    stride_vb,
    stride_va,
    stride_vl,
    A,
    L,
    M,
    scale_log2,
    D: tl.constexpr,
    KEYS_1: tl.constexpr,
    KEYS_2: tl.constexpr,  # 0: no such tile
    KEYS_3: tl.constexpr,
    QUERIES: tl.constexpr,
    TAIL: tl.constexpr,  # rows of a smaller last tile, 0: none
    PRECISION: tl.constexpr,
):
    """out = softmax(q k^T / sqrt(D)) v and its lse, for one head of one image."""
    head = tl.program_id(0).to(tl.int64)
    b, a = head // A, head % A
    q_ptr += b * stride_qb + a * stride_qa
    k_ptr += b * stride_kb + a * stride_ka
    v_ptr += b * stride_vb + a * stride_va
    out_ptr += (b * L * A + a) * D
    lse_ptr += head * L

    # All keys and values, in up to three tiles.
    k1 = _load_rows(k_ptr, 0, M, stride_kl, KEYS_1, D)
    v1 = _load_rows(v_ptr, 0, M, stride_vl, KEYS_1, D)
    k2, v2, k3, v3 = k1, v1, k1, v1  # not read where there is no such tile
    if KEYS_2 > 0:
        k2 = _load_rows(k_ptr, KEYS_1, M, stride_kl, KEYS_2, D)
        v2 = _load_rows(v_ptr, KEYS_1, M, stride_vl, KEYS_2, D)
    if KEYS_3 > 0:
        k3 = _load_rows(k_ptr, KEYS_1 + KEYS_2, M, stride_kl, KEYS_3, D)
        v3 = _load_rows(v_ptr, KEYS_1 + KEYS_2, M, stride_vl, KEYS_3, D)

    # Queries in full tiles, then a smaller last one.
    full = L // QUERIES * QUERIES if TAIL > 0 else L
    for start in range(0, full, QUERIES):
        _attend(
            q_ptr,
            out_ptr,
            lse_ptr,
            k1,
            v1,
            k2,
            v2,
            k3,
            v3,
            start,
            L,
            M,
            stride_ql,
            A * D,
            scale_log2,
            D,
            KEYS_1,
            KEYS_2,
            KEYS_3,
            QUERIES,
            PRECISION,
        )
    if TAIL > 0:
        _attend(
            q_ptr,
            out_ptr,
            lse_ptr,
            k1,
            v1,
            k2,
            v2,
            k3,
            v3,
            full,
            L,
            M,
            stride_ql,
            A * D,
            scale_log2,
            D,
            KEYS_1,
            KEYS_2,
            KEYS_3,
            TAIL,
            PRECISION,
        )


@triton.jit
def _backward_tile(
    k,
    v,
    q,
    do,
    lse,
    delta,
    dq,
    dk,
    dv,
    start,
    M,
    scale_log2,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one tile of queries and one of keys add to dq [QUERIES, D], dk and dv [KEYS, D]."""
    p = tl.exp2(
        tl.fma(tl.dot(q, tl.trans(k), input_precision=PRECISION), scale_log2, -lse[:, None])
    )
    # A column beyond the keys scores 0, and exp2(-lse) may be infinite.
    p = tl.where((start + tl.arange(0, KEYS))[None, :] < M, p, 0.0)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
    ds = (p * (dp - delta[:, None])).to(q.dtype)
    dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
    dq = tl.dot(ds, k, dq, input_precision=PRECISION)
    return dq, dk, dv


@triton.jit
def _query_tile(
    q_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,
    start,
    L,
    stride_ql,
    stride_ol,
    stride_gl,
    QUERIES: tl.constexpr,
    D: tl.constexpr,
):
    """Operands of one tile of queries; rows beyond the queries are 0 and add 0 to gradients."""
    row = start + tl.arange(0, QUERIES)
    q = _load_rows(q_ptr, start, L, stride_ql, QUERIES, D)
    do = _load_rows(dout_ptr, start, L, stride_gl, QUERIES, D)
    out = _load_rows(out_ptr, start, L, stride_ol, QUERIES, D)
    lse = tl.load(lse_ptr + row, mask=row < L, other=0.0)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1)
    return q, do, lse, delta, tl.zeros([QUERIES, D], tl.float32)


@triton.jit
def short_attention_bwd_kernel(
    q_ptr,  # [B, A, L, D] by strides, as are k, v [B, A, M, D], out and its gradient [B, A, L, D]
    k_ptr,
    v_ptr,
    out_ptr,
    dout_ptr,
    lse_ptr,  # [B, A, L] float32, contiguous
    dq_ptr,  # [B, L, A, D] contiguous
    dk_ptr,  # [B, M, A, D] contiguous
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
    stride_ob,
    stride_oa,
    stride_ol,
    stride_gb,
    stride_ga,
    stride_gl,
    A,
    L,
    M,
    scale_log2,
    scale,
    D: tl.constexpr,
    QUERIES_1: tl.constexpr,
    QUERIES_2: tl.constexpr,  # 0: no such tile
    QUERIES_3: tl.constexpr,
    KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, dk and dv of one head of one image; queries and dq stay on chip while the keys pass."""
    head = tl.program_id(0).to(tl.int64)
    b, a = head // A, head % A
    q_ptr += b * stride_qb + a * stride_qa
    k_ptr += b * stride_kb + a * stride_ka
    v_ptr += b * stride_vb + a * stride_va
    out_ptr += b * stride_ob + a * stride_oa
    dout_ptr += b * stride_gb + a * stride_ga
    lse_ptr += head * L
    dq_ptr += (b * L * A + a) * D
    dk_ptr += (b * M * A + a) * D
    dv_ptr += (b * M * A + a) * D

    # All queries, in up to three tiles.
    q1, do1, lse1, delta1, dq1 = _query_tile(
        q_ptr, out_ptr, dout_ptr, lse_ptr, 0, L, stride_ql, stride_ol, stride_gl, QUERIES_1, D
    )
    if QUERIES_2 > 0:
        q2, do2, lse2, delta2, dq2 = _query_tile(
            q_ptr,
            out_ptr,
            dout_ptr,
            lse_ptr,
            QUERIES_1,
            L,
            stride_ql,
            stride_ol,
            stride_gl,
            QUERIES_2,
            D,
        )
    if QUERIES_3 > 0:
        q3, do3, lse3, delta3, dq3 = _query_tile(
            q_ptr,
            out_ptr,
            dout_ptr,
            lse_ptr,
            QUERIES_1 + QUERIES_2,
            L,
            stride_ql,
            stride_ol,
            stride_gl,
            QUERIES_3,
            D,
        )

    # After all tiles of queries, the gradients of a tile of keys are complete.
    for start in range(0, M, KEYS):
        k = _load_rows(k_ptr, start, M, stride_kl, KEYS, D)
        v = _load_rows(v_ptr, start, M, stride_vl, KEYS, D)
        dk, dv = tl.zeros([KEYS, D], tl.float32), tl.zeros([KEYS, D], tl.float32)
        dq1, dk, dv = _backward_tile(
            k, v, q1, do1, lse1, delta1, dq1, dk, dv, start, M, scale_log2, KEYS, PRECISION
        )
        if QUERIES_2 > 0:
            dq2, dk, dv = _backward_tile(
                k, v, q2, do2, lse2, delta2, dq2, dk, dv, start, M, scale_log2, KEYS, PRECISION
            )
        if QUERIES_3 > 0:
            dq3, dk, dv = _backward_tile(
                k, v, q3, do3, lse3, delta3, dq3, dk, dv, start, M, scale_log2, KEYS, PRECISION
            )
        _store_rows(dk_ptr, dk * scale, start, M, A * D, KEYS, D)
        _store_rows(dv_ptr, dv, start, M, A * D, KEYS, D)

    _store_rows(dq_ptr, dq1 * scale, 0, L, A * D, QUERIES_1, D)
    if QUERIES_2 > 0:
        _store_rows(dq_ptr, dq2 * scale, QUERIES_1, L, A * D, QUERIES_2, D)
    if QUERIES_3 > 0:
        _store_rows(dq_ptr, dq3 * scale, QUERIES_1 + QUERIES_2, L, A * D, QUERIES_3, D)
