"""The kernels of the soft cross-entropy: statistics of a row, value and gradient.

Legend: V views, Q views with targets, B images, K outputs; a row is one image of one view, number
`view * B + image`. A program takes a row, or a part of it, in pieces of BLOCK numbers. All
arithmetic is float32, whatever is stored. Exponentials are of base 2: `scale` is
log2(e) / temperature. Nothing is masked by the host, and there are no atomics: reproducible bit by
bit on one GPU and tile.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _logits(ptr, centre_ptr, place, inside, scale, CENTRED: tl.constexpr):
    """Logits over the temperature, in base 2; -inf beyond the row."""
    x = tl.load(ptr + place, mask=inside, other=float("-inf")).to(tl.float32)
    if CENTRED:
        x -= tl.load(centre_ptr + place, mask=inside, other=0.0).to(tl.float32)
    return x * scale


@triton.jit
def _others(
    targets_ptr,  # [Q, B, K] at the image
    centre_ptr,
    lse_ptr,  # [Q, B] at the image
    view,
    B,
    K,
    place,
    inside,
    scale,
    SOFTMAX: tl.constexpr,
    CENTRED: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sum of the targets of all views but one."""
    total = tl.zeros([BLOCK], tl.float32)
    for q in range(Q):
        if q != view:
            own_ptr = targets_ptr + tl.cast(q, tl.int64) * B * K
            if SOFTMAX:
                x = _logits(own_ptr, centre_ptr, place, inside, scale, CENTRED)
                total += tl.exp2(x - tl.load(lse_ptr + q * B))
            else:
                total += tl.load(own_ptr + place, mask=inside, other=0.0).to(tl.float32)
    return total


@triton.jit
def soft_cross_entropy_target_kernel(
    targets_ptr,  # [Q * B, K]
    centre_ptr,  # [K]; not read without CENTRED
    lse_ptr,  # [Q * B] fp32: the log2 of the sum of the exponentials
    K,
    scale,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The denominators of the teacher's softmax."""
    row = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, K, BLOCK):
        place = first + offset
        x = _logits(targets_ptr + row * K, centre_ptr, place, place < K, scale, CENTRED)
        higher = tl.maximum(highest, x)
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(highest - reference) + tl.exp2(x - reference)
        highest = higher
    top = tl.max(highest, 0)
    total = tl.sum(total * tl.exp2(highest - top), 0)
    tl.store(lse_ptr + row, top + tl.log2(total))


@triton.jit
def soft_cross_entropy_value_kernel(
    logits_ptr,  # [V * B, K]
    targets_ptr,  # [Q, B, K]
    centre_ptr,  # [K]; not read without CENTRED
    target_lse_ptr,  # [Q, B] fp32; not read without SOFTMAX
    lse_ptr,  # [V * B] fp32: the log2 of the sum of the exponentials of a row
    mass_ptr,  # [V * B] fp32: the sum of all targets of a row
    loss_ptr,  # [V * B] fp32
    B,
    K,
    scale,
    target_scale,
    SOFTMAX: tl.constexpr,
    CENTRED: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loss and statistics of a row, from one pass over it and its targets.

    Sums are taken relative to the highest logit of their lane so far: nothing overflows, and an
    offset that all logits share takes no digits.
    """
    row = tl.program_id(0).to(tl.int64)
    view = row // B
    image = row % B
    offset = tl.arange(0, BLOCK)
    logits_ptr += row * K
    targets_ptr += image * K
    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    product = tl.zeros([BLOCK], tl.float32)
    for first in range(0, K, BLOCK):
        place = first + offset
        inside = place < K
        x = _logits(logits_ptr, centre_ptr, place, inside, scale, False)
        target = _others(
            targets_ptr,
            centre_ptr,
            target_lse_ptr + image,
            view,
            B,
            K,
            place,
            inside,
            target_scale,
            SOFTMAX,
            CENTRED,
            Q,
            BLOCK,
        )

        # Everything so far is moved to the new reference; without a finite logit it is 0.
        higher = tl.maximum(highest, x)
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        before = tl.where(highest == float("-inf"), reference, highest)
        total = total * tl.exp2(highest - reference) + tl.exp2(x - reference)
        product += mass * (before - reference)
        nothing = (target == 0) & (x == float("-inf"))
        product += tl.where(nothing, 0.0, target * (x - reference))
        mass += target
        highest = higher

    # From lanes to the row.
    top = tl.max(highest, 0)
    total = tl.sum(total * tl.exp2(highest - top), 0)
    reference = tl.where(highest == float("-inf"), 0.0, highest)
    shift = tl.where(mass == 0, 0.0, mass * (reference - top))
    all_mass = tl.sum(mass, 0)
    log_total = tl.log2(total)
    loss = all_mass * log_total - tl.sum(product + shift, 0)
    tl.store(lse_ptr + row, top + log_total)
    tl.store(mass_ptr + row, all_mass)
    tl.store(loss_ptr + row, loss * LN_2)


@triton.jit
def soft_cross_entropy_gradient_kernel(
    logits_ptr,  # [V * B, K]
    targets_ptr,  # [Q, B, K]
    centre_ptr,  # [K]; not read without CENTRED
    target_lse_ptr,  # [Q, B] fp32; not read without SOFTMAX
    lse_ptr,  # [V * B] fp32
    mass_ptr,  # [V * B] fp32
    incoming_ptr,  # scalar; not read without INCOMING
    gradient_ptr,  # [V * B, K]; may be the logits
    B,
    K,
    scale,
    target_scale,
    factor,  # 1 / (temperature pairs images)
    SOFTMAX: tl.constexpr,
    CENTRED: tl.constexpr,
    INCOMING: tl.constexpr,
    Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`(mass softmax - targets) factor incoming`, of a piece of a row."""
    row = tl.program_id(0).to(tl.int64)
    view = row // B
    image = row % B
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < K
    x = _logits(logits_ptr + row * K, centre_ptr, place, inside, scale, False)
    target = _others(
        targets_ptr + image * K,
        centre_ptr,
        target_lse_ptr + image,
        view,
        B,
        K,
        place,
        inside,
        target_scale,
        SOFTMAX,
        CENTRED,
        Q,
        BLOCK,
    )
    if INCOMING:
        factor *= tl.load(incoming_ptr).to(tl.float32)
    share = tl.load(mass_ptr + row) * tl.exp2(x - tl.load(lse_ptr + row))
    gradient = (share - target) * factor
    tl.store(
        gradient_ptr + row * K + place, gradient.to(gradient_ptr.dtype.element_ty), mask=inside
    )
