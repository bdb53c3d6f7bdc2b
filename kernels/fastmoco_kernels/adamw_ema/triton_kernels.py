"""AdamW and the moving average in one sweep over the table of `tables.py`.

Two launches: `adamw_ema_prepare_kernel` reads `found_inf`, counts the step and works out every
scalar in float64, once a tensor; `adamw_ema_sweep_kernel` touches every parameter once. What passes
between them:

    shared [8] float32: live (0: change nothing), decay, 1 - beta1, beta2, 1 - beta2, eps,
        1 - ema_momentum, 1 / grad_scale
    per_row [2, rows] float32: lr / (1 - beta1^step), sqrt(1 - beta2^step)

Columns of the table: 0 params, 1 grads, 2 exp_avgs, 3 exp_avg_sqs, 4 averages, 5 steps. GRAD is the
gradients' element type; everything else is float32. Address 0 means no average: its loads and
stores are masked by one scalar, which leaves them 128 bits wide.
"""

import triton
import triton.language as tl

from fastmoco_kernels.ema.triton_kernels import lerp


@triton.jit
def adamw_ema_prepare_kernel(
    pointers_ptr,  # [6, rows] int64
    shared_ptr,  # [8] float32, written
    per_row_ptr,  # [2, rows] float32, written
    rows,
    lr,
    weight_decay,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    one_minus_momentum,
    # ON_DEVICE: [6] float64 instead of those above: lr, weight_decay, beta1, beta2, eps, momentum.
    scalars_ptr,
    found_inf_ptr,  # one element, where HAS_FOUND_INF
    grad_scale_ptr,  # one element, where HAS_GRAD_SCALE
    ON_DEVICE: tl.constexpr,
    HAS_FOUND_INF: tl.constexpr,
    HAS_GRAD_SCALE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Count one step for ROWS tensors and write the scalars of the sweep."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    one = tl.full([ROWS], 1.0, tl.float64)

    # The numbers, from the host or from the device.
    if ON_DEVICE:
        lr64 = one * tl.load(scalars_ptr)
        decay = 1.0 - lr64 * tl.load(scalars_ptr + 1)
        beta1 = one * tl.load(scalars_ptr + 2)
        beta2 = one * tl.load(scalars_ptr + 3)
        eps64 = one * tl.load(scalars_ptr + 4)
        momentum = one * tl.load(scalars_ptr + 5)
    else:
        # Complements are arguments: float32 keeps 1 - beta to 24 bits, but of beta only 14 bits are
        # left in 1 - beta.
        lr64 = one * lr
        decay = 1.0 - lr64 * weight_decay
        beta1 = one - one_minus_beta1
        beta2 = one - one_minus_beta2
        eps64 = one * eps
        momentum = one - one_minus_momentum

    live = tl.full([ROWS], 1.0, tl.float32)
    if HAS_FOUND_INF:
        # NaN counts as found.
        live = tl.where(tl.load(found_inf_ptr).to(tl.float32) == 0.0, live, 0.0)
    unscale = one
    if HAS_GRAD_SCALE:
        unscale = one / tl.load(grad_scale_ptr).to(tl.float64)

    # Count the step, and correct the bias of both moments.
    step_ptr = tl.load(pointers_ptr + 5 * rows + row, mask=mask, other=0).to(
        tl.pointer_type(tl.float32)
    )
    step = tl.load(step_ptr, mask=mask, other=0.0) + live
    tl.store(step_ptr, step, mask=mask)
    exponent = tl.maximum(step, 1.0).to(tl.float64)
    bias1 = 1.0 - tl.exp2(exponent * tl.log2(tl.maximum(beta1, 1e-30)))  # beta 0 has no logarithm
    bias2 = 1.0 - tl.exp2(exponent * tl.log2(tl.maximum(beta2, 1e-30)))
    tl.store(per_row_ptr + row, (lr64 / bias1).to(tl.float32), mask=mask)
    tl.store(per_row_ptr + rows + row, tl.sqrt(bias2).to(tl.float32), mask=mask)

    # The scalars that all tensors share, written by one program.
    first = row == 0
    offset = tl.arange(0, ROWS)
    tl.store(shared_ptr + offset, live, mask=first)
    tl.store(shared_ptr + offset + 1, decay.to(tl.float32), mask=first)
    tl.store(shared_ptr + offset + 2, (1.0 - beta1).to(tl.float32), mask=first)
    tl.store(shared_ptr + offset + 3, beta2.to(tl.float32), mask=first)
    tl.store(shared_ptr + offset + 4, (1.0 - beta2).to(tl.float32), mask=first)
    tl.store(shared_ptr + offset + 5, eps64.to(tl.float32), mask=first)
    tl.store(shared_ptr + offset + 6, (1.0 - momentum).to(tl.float32), mask=first)
    tl.store(shared_ptr + offset + 7, unscale.to(tl.float32), mask=first)


@triton.jit
def adamw_ema_chunk(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    average_ptr,
    mask,
    average_mask,
    shared_ptr,
    per_row_ptr,
    rows,
    CHUNK: tl.constexpr,
):
    """Update CHUNK elements; a mask of None means all of them."""
    offset = tl.arange(0, CHUNK)
    param = tl.load(param_ptr + offset, mask=mask)
    grad = tl.load(grad_ptr + offset, mask=mask).to(tl.float32) * tl.load(shared_ptr + 7)
    exp_avg = tl.load(exp_avg_ptr + offset, mask=mask)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offset, mask=mask)
    average = tl.load(average_ptr + offset, mask=average_mask, other=0.0)
    zero = tl.full([CHUNK], 0.0, tl.float32)
    param = param * tl.load(shared_ptr + 1)
    exp_avg = lerp(exp_avg, grad, zero + tl.load(shared_ptr + 2))
    exp_avg_sq = tl.fma(
        grad * grad, zero + tl.load(shared_ptr + 4), exp_avg_sq * tl.load(shared_ptr + 3)
    )
    root = tl.div_rn(tl.sqrt_rn(exp_avg_sq), zero + tl.load(per_row_ptr + rows))
    ratio = tl.div_rn(exp_avg, root + tl.load(shared_ptr + 5))
    param = tl.fma(ratio, zero - tl.load(per_row_ptr), param)
    average = lerp(average, param, zero + tl.load(shared_ptr + 6))
    tl.store(param_ptr + offset, param, mask=mask)
    tl.store(exp_avg_ptr + offset, exp_avg, mask=mask)
    tl.store(exp_avg_sq_ptr + offset, exp_avg_sq, mask=mask)
    tl.store(average_ptr + offset, average, mask=average_mask)


@triton.jit
def adamw_ema_sweep_kernel(
    pointers_ptr,  # [6, rows] int64
    sizes_ptr,  # [rows] int64
    chunk_rows_ptr,  # [chunks] int32
    chunk_starts_ptr,  # [chunks] int64
    shared_ptr,  # [8] float32
    per_row_ptr,  # [2, rows] float32
    rows,
    GRAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One chunk of one parameter with its gradient, moments and average."""
    if tl.load(shared_ptr) == 0.0:
        return
    program = tl.program_id(0)
    row = tl.load(chunk_rows_ptr + program)
    start = tl.load(chunk_starts_ptr + program)
    left = tl.load(sizes_ptr + row) - start

    # Addresses of the parameter and of its tensors.
    param = tl.load(pointers_ptr + row)
    grad = tl.load(pointers_ptr + rows + row)
    exp_avg = tl.load(pointers_ptr + 2 * rows + row)
    exp_avg_sq = tl.load(pointers_ptr + 3 * rows + row)
    average = tl.load(pointers_ptr + 4 * rows + row)
    param_ptr = param.to(tl.pointer_type(tl.float32)) + start
    grad_ptr = grad.to(tl.pointer_type(GRAD)) + start
    exp_avg_ptr = exp_avg.to(tl.pointer_type(tl.float32)) + start
    exp_avg_sq_ptr = exp_avg_sq.to(tl.pointer_type(tl.float32)) + start
    average_ptr = average.to(tl.pointer_type(tl.float32)) + start

    # Aligned full chunks without a mask, others with one.
    anywhere = param | grad | exp_avg | exp_avg_sq | average
    everywhere = tl.full([CHUNK], 1, tl.int1)
    has_average = everywhere & (average != 0)
    if (left >= CHUNK) & ((anywhere & 15) == 0):
        # Equal numbers of elements a load for all types: otherwise layouts are converted in shared
        # memory.
        adamw_ema_chunk(
            tl.multiple_of(param_ptr, 16),
            tl.multiple_of(grad_ptr, GRAD.primitive_bitwidth // 2),
            tl.multiple_of(exp_avg_ptr, 16),
            tl.multiple_of(exp_avg_sq_ptr, 16),
            tl.multiple_of(average_ptr, 16),
            None,
            has_average,
            shared_ptr,
            per_row_ptr + row,
            rows,
            CHUNK,
        )
    else:
        mask = tl.arange(0, CHUNK) < left
        adamw_ema_chunk(
            param_ptr,
            grad_ptr,
            exp_avg_ptr,
            exp_avg_sq_ptr,
            average_ptr,
            mask,
            has_average & mask,
            shared_ptr,
            per_row_ptr + row,
            rows,
            CHUNK,
        )
