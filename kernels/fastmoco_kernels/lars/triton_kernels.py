"""The three kernels of LARS. `tables.py` defines rows, chunks and columns.

`lars_norms_kernel` and `lars_update_kernel` have one program a chunk, `lars_fold_kernel` one a
tensor. WORD is the tensors' type, float32 or float64. Addresses come from a table, so the compiler
does not know their alignment: where all of a row's are multiples of 16 bytes and the chunk is
full, a branch tells the compiler, and loads are 128 bits wide; other chunks are masked.
"""

import triton
import triton.language as tl


@triton.jit
def squares_of_chunk(p_ptr, g_ptr, offsets, mask, weight_decay, WORD: tl.constexpr):
    """Sums of `p^2` and `(g + weight_decay * p)^2` over a chunk; `mask` None means all of it."""
    if mask is None:
        p, g = tl.load(p_ptr + offsets), tl.load(g_ptr + offsets)
    else:
        p, g = (
            tl.load(p_ptr + offsets, mask=mask, other=0.0),
            tl.load(g_ptr + offsets, mask=mask, other=0.0),
        )
    u = tl.fma(p, tl.full(p.shape, weight_decay, WORD), g)
    return tl.sum(p * p, axis=0), tl.sum(u * u, axis=0)


@triton.jit
def lars_norms_kernel(
    pointers_ptr,  # [3, rows] int64: parameter, gradient, and the parameter if scaled, else 0
    sizes_ptr,  # [rows] int64
    chunk_rows_ptr,  # [chunks] int32
    chunk_starts_ptr,  # [chunks] int64
    partials_ptr,  # [chunks, 2] WORD: out
    rows,
    weight_decay: tl.float64,
    WORD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """First pass: each chunk's part of both squared norms of its tensor."""
    chunk = tl.program_id(0)
    row = tl.load(chunk_rows_ptr + chunk)
    if tl.load(pointers_ptr + 2 * rows + row) != 0:
        start = tl.load(chunk_starts_ptr + chunk)
        left = tl.load(sizes_ptr + row) - start
        p_address = tl.load(pointers_ptr + row)
        g_address = tl.load(pointers_ptr + rows + row)
        p_ptr = p_address.to(tl.pointer_type(WORD)) + start
        g_ptr = g_address.to(tl.pointer_type(WORD)) + start
        offsets = tl.arange(0, CHUNK)
        if (left >= CHUNK) & (((p_address | g_address) & 15) == 0):
            p_ptr, g_ptr = tl.multiple_of(p_ptr, 16), tl.multiple_of(g_ptr, 16)
            p_sum, u_sum = squares_of_chunk(p_ptr, g_ptr, offsets, None, weight_decay, WORD)
        else:
            p_sum, u_sum = squares_of_chunk(
                p_ptr, g_ptr, offsets, offsets < left, weight_decay, WORD
            )
        tl.store(partials_ptr + 2 * chunk, p_sum)
        tl.store(partials_ptr + 2 * chunk + 1, u_sum)


@triton.jit
def lars_fold_kernel(
    pointers_ptr,  # [3, rows] int64, as above
    first_chunks_ptr,  # [rows + 1] int32
    partials_ptr,  # [chunks, 2]
    squares_ptr,  # [rows, 2] float64: out
    rows,
    BLOCK: tl.constexpr,
):
    """A tensor's partial sums added in float64 and in their order: the same bits every time."""
    row = tl.program_id(0)
    first = tl.load(first_chunks_ptr + row)
    last = tl.load(first_chunks_ptr + row + 1)
    last = tl.where(tl.load(pointers_ptr + 2 * rows + row) != 0, last, first)
    p_sum = tl.zeros((BLOCK,), tl.float64)
    u_sum = tl.zeros((BLOCK,), tl.float64)
    for at in range(first, last, BLOCK):
        chunks = at + tl.arange(0, BLOCK)
        inside = chunks < last
        p_sum += tl.load(partials_ptr + 2 * chunks, mask=inside, other=0.0).to(tl.float64)
        u_sum += tl.load(partials_ptr + 2 * chunks + 1, mask=inside, other=0.0).to(tl.float64)
    tl.store(squares_ptr + 2 * row, tl.sum(p_sum, axis=0))
    tl.store(squares_ptr + 2 * row + 1, tl.sum(u_sum, axis=0))


@triton.jit
def update_chunk(
    p_ptr, g_ptr, b_ptr, offsets, mask, decay, ratio, momentum, lr, WORD: tl.constexpr
):
    """Buffer and parameter at `offsets`; `mask` None means all of them."""
    p = tl.load(p_ptr + offsets, mask=mask)
    g = tl.load(g_ptr + offsets, mask=mask)
    b = tl.load(b_ptr + offsets, mask=mask)
    u = tl.fma(p, tl.full(p.shape, decay, WORD), g) * tl.full(p.shape, ratio, WORD)
    b = tl.fma(b, tl.full(p.shape, momentum, WORD), u)
    p = tl.fma(b, tl.full(p.shape, -lr, WORD), p)
    tl.store(b_ptr + offsets, b, mask=mask)
    tl.store(p_ptr + offsets, p, mask=mask)


@triton.jit
def lars_update_kernel(
    pointers_ptr,  # [4, rows] int64: parameter, gradient, buffer, the parameter if scaled, else 0
    sizes_ptr,  # [rows] int64
    chunk_rows_ptr,  # [chunks] int32
    chunk_starts_ptr,  # [chunks] int64
    squares_ptr,  # [rows, 2] float64
    found_inf_ptr,  # one element, or None
    lr_ptr,  # one element that replaces lr, or None
    rows,
    lr: tl.float64,
    momentum: tl.float64,
    weight_decay: tl.float64,
    trust_coefficient: tl.float64,
    WORD: tl.constexpr,
    CHUNK: tl.constexpr,
    LR_IN_BUFFER: tl.constexpr,
):
    """Second pass: the trust ratio from whole norms, then buffer and parameter."""
    chunk = tl.program_id(0)
    row = tl.load(chunk_rows_ptr + chunk)
    start = tl.load(chunk_starts_ptr + chunk)
    left = tl.load(sizes_ptr + row) - start
    if found_inf_ptr is not None:
        left = tl.where(tl.load(found_inf_ptr) != 0, 0, left)
    if lr_ptr is not None:
        lr = tl.load(lr_ptr).to(tl.float64)

    # The trust ratio of the whole tensor.
    scaled = tl.load(pointers_ptr + 3 * rows + row) != 0
    p_square = tl.load(squares_ptr + 2 * row)
    u_square = tl.load(squares_ptr + 2 * row + 1)
    both = scaled & (p_square > 0) & (u_square > 0)
    ratio = trust_coefficient * tl.sqrt(p_square) / tl.sqrt(tl.where(both, u_square, 1.0))
    ratio = tl.where(both, ratio, 1.0)
    decay = tl.where(scaled, tl.full((), weight_decay, tl.float64), 0.0)
    if LR_IN_BUFFER:
        ratio *= lr
        lr = tl.full((), 1.0, tl.float64)

    p_address = tl.load(pointers_ptr + row)
    g_address = tl.load(pointers_ptr + rows + row)
    b_address = tl.load(pointers_ptr + 2 * rows + row)
    p_ptr = p_address.to(tl.pointer_type(WORD)) + start
    g_ptr = g_address.to(tl.pointer_type(WORD)) + start
    b_ptr = b_address.to(tl.pointer_type(WORD)) + start
    offsets = tl.arange(0, CHUNK)
    if (left >= CHUNK) & (((p_address | g_address | b_address) & 15) == 0):
        p_ptr, g_ptr, b_ptr = (
            tl.multiple_of(p_ptr, 16),
            tl.multiple_of(g_ptr, 16),
            tl.multiple_of(b_ptr, 16),
        )
        update_chunk(p_ptr, g_ptr, b_ptr, offsets, None, decay, ratio, momentum, lr, WORD)
    else:
        update_chunk(p_ptr, g_ptr, b_ptr, offsets, offsets < left, decay, ratio, momentum, lr, WORD)
