"""Colors of a batch of views in two sweeps over the pixels, and a third after a blur.

B images, H rows of W pixels, P = H W pixels; levels are int32 in registers. Everything that PIL
keeps in 8 bits is computed in integers, or in float32 where its own arithmetic is float32 (the
blend), without fused multiply-adds.
"""

import triton
import triton.language as tl


@triton.jit
def _luma(r, g, b):
    """PIL's mode L."""
    return (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16


@triton.jit
def _blend(anchor, level, factor):
    """Scale the distance from the anchor, clip, truncate. Not fused: PIL rounds the product."""
    value = anchor.to(tl.float32) + (level - anchor).to(tl.float32) * factor
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)


@triton.jit
def _hue_level(high, amount, weight):
    """`high - round(amount * weight / 65025)`, weight clipped to 0 to 255; no quotient is a tie."""
    weight = tl.minimum(tl.maximum(weight, 0), 255)
    return high - (amount * weight + 32512) // 65025


@triton.jit
def _turn_hue(r, g, b, shift, late_ptr):
    """Through PIL's HSV of 8 bits and back, the hue byte moved on by `shift`."""
    high = tl.maximum(tl.maximum(r, g), b)
    spread = high - tl.minimum(tl.minimum(r, g), b)
    some = tl.maximum(spread, 1)
    numerator = tl.where(
        r == high, g - b, tl.where(g == high, b - r + 2 * spread, r - g + 4 * spread)
    )
    # A quarter keeps both quotients off whole numbers by more than a division's rounding.
    hue = tl.floor((numerator.to(tl.float32) * 42.5 + 0.25) / some.to(tl.float32)).to(tl.int32)
    exact = 85 * numerator == 2 * hue * some
    hue = tl.where(hue < 0, hue + 255, hue)
    hue -= tl.load(late_ptr + hue, mask=exact, other=0).to(tl.int32)
    units = ((hue + shift) & 255) * 6
    top = tl.maximum(high, 1).to(tl.float32)
    amount = tl.floor((spread.to(tl.float32) * 255.0 + 0.25) / top).to(tl.int32) * high
    red = _hue_level(high, amount, 510 - tl.abs(units - 765))
    green = _hue_level(high, amount, tl.abs(units - 510) - 255)
    blue = _hue_level(high, amount, tl.abs(units - 1020) - 255)
    return red, green, blue


@triton.jit
def _step(r, g, b, code, factor_ptr, grey_mean, shift, late_ptr):
    """One jitter operation: 0 brightness, 1 contrast, 2 saturation, 3 hue, 4 none."""
    if code == 3:
        r, g, b = _turn_hue(r, g, b, shift, late_ptr)
    elif code < 3:
        factor = tl.load(factor_ptr + code)
        anchor = tl.where(code == 0, 0, tl.where(code == 1, grey_mean, _luma(r, g, b)))
        r, g, b = _blend(anchor, r, factor), _blend(anchor, g, factor), _blend(anchor, b, factor)
    return r, g, b


@triton.jit
def _write(out_ptr, level, scale, shift, solarize, threshold, inside):
    """Solarize, normalise, cast and store one channel; bytes are only solarized and stored."""
    level = tl.where((level >= threshold) & (solarize != 0), 255 - level, level)
    if out_ptr.dtype.element_ty == tl.uint8:
        tl.store(out_ptr, level.to(tl.uint8), mask=inside)
    else:
        value = level.to(tl.float32) * scale + shift
        tl.store(out_ptr, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def grey_sum_kernel(
    images_ptr,  # [B, H, W, 3] uint8, contiguous
    # [B, 12] int32: codes of four steps, position of contrast, hue shift, grayscale, solarize,
    # flip, slot, -, -
    rows_ptr,
    factors_ptr,  # [B, 4] float32: brightness, contrast, saturation, -
    late_ptr,  # [256] uint8
    sums_ptr,  # [B, cdiv(P, BLOCK)] int32
    pixels,
    BLOCK: tl.constexpr,
):
    """Grid (B, cdiv(P, BLOCK)).

    Sum of the luma of a block after the steps before contrast, if any.
    """
    image = tl.program_id(0)
    row_ptr = rows_ptr + image * 12
    contrast_at = tl.load(row_ptr + 4)
    if contrast_at < 4:
        p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = p < pixels
        pixel_ptr = images_ptr + image.to(tl.int64) * pixels * 3 + p * 3
        r = tl.load(pixel_ptr, mask=inside, other=0).to(tl.int32)
        g = tl.load(pixel_ptr + 1, mask=inside, other=0).to(tl.int32)
        b = tl.load(pixel_ptr + 2, mask=inside, other=0).to(tl.int32)
        shift = tl.load(row_ptr + 5)
        for place in range(contrast_at):
            code = tl.load(row_ptr + place)
            r, g, b = _step(r, g, b, code, factors_ptr + image * 4, 0, shift, late_ptr)
        total = tl.sum(tl.where(inside, _luma(r, g, b), 0), axis=0)
        tl.store(sums_ptr + image * tl.num_programs(1) + tl.program_id(1), total)


@triton.jit
def view_color_kernel(
    images_ptr,  # [B, H, W, 3] uint8, contiguous
    rows_ptr,  # [B, 12] int32, as above; slot: index among the images to blur, or -1
    factors_ptr,  # [B, 4] float32
    late_ptr,  # [256] uint8
    sums_ptr,  # [B, blocks] int32, of grey_sum_kernel
    planes_ptr,  # [slots, 3, H, W] uint8: images to be blurred
    out_ptr,  # [B, 3, H, W]: all other images
    stride_ob,
    stride_oc,
    stride_op,
    pixels,
    width,
    blocks,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    threshold,
    BLOCK: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Grid (B, cdiv(P, BLOCK)). Flip, jitter, grayscale; to planes, or solarized and normalised."""
    image = tl.program_id(0)
    row_ptr = rows_ptr + image * 12
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = p < pixels
    # The mirrored column of the same line, where the image is flipped.
    x = p % width
    source = tl.where(tl.load(row_ptr + 8) != 0, p + width - 1 - 2 * x, p)

    pixel_ptr = images_ptr + image.to(tl.int64) * pixels * 3 + source * 3
    r = tl.load(pixel_ptr, mask=inside, other=0).to(tl.int32)
    g = tl.load(pixel_ptr + 1, mask=inside, other=0).to(tl.int32)
    b = tl.load(pixel_ptr + 2, mask=inside, other=0).to(tl.int32)

    # The grey mean at contrast's position, from the sums of `grey_sum_kernel`.
    grey_mean = tl.load(row_ptr + 4) * 0
    if tl.load(row_ptr + 4) < 4:
        total = tl.zeros([SUMS], dtype=tl.int64)
        for start in range(0, blocks, SUMS):
            at = start + tl.arange(0, SUMS)
            total += tl.load(sums_ptr + image * blocks + at, mask=at < blocks, other=0).to(tl.int64)
        # At most 2^21 pixels: twice that fits int32. (No `.to` on an argument: Triton makes one
        # that is 1 a constant.)
        grey_mean = ((tl.sum(total, axis=0) * 2 + pixels) // (2 * pixels)).to(tl.int32)

    # The jitter in the image's order, then grayscale.
    shift = tl.load(row_ptr + 5)
    for place in range(4):
        code = tl.load(row_ptr + place)
        r, g, b = _step(r, g, b, code, factors_ptr + image * 4, grey_mean, shift, late_ptr)
    if tl.load(row_ptr + 6) != 0:
        r = _luma(r, g, b)
        g = r
        b = r

    # To the planes that are blurred next, or to the result.
    slot = tl.load(row_ptr + 9)
    if slot >= 0:
        plane_ptr = planes_ptr + slot.to(tl.int64) * pixels * 3 + p
        tl.store(plane_ptr, r.to(tl.uint8), mask=inside)
        tl.store(plane_ptr + pixels, g.to(tl.uint8), mask=inside)
        tl.store(plane_ptr + 2 * pixels, b.to(tl.uint8), mask=inside)
    else:
        solarize = tl.load(row_ptr + 7)
        to_ptr = out_ptr + image.to(tl.int64) * stride_ob + p * stride_op
        _write(to_ptr, r, scale_r, shift_r, solarize, threshold, inside)
        _write(to_ptr + stride_oc, g, scale_g, shift_g, solarize, threshold, inside)
        _write(to_ptr + 2 * stride_oc, b, scale_b, shift_b, solarize, threshold, inside)


@triton.jit
def finish_kernel(
    planes_ptr,  # [slots, 3, H, W] uint8, blurred
    images_of_ptr,  # [slots] int32: which image a slot holds
    rows_ptr,  # [B, 12] int32, as above
    out_ptr,  # [B, 3, H, W]
    stride_ob,
    stride_oc,
    stride_op,
    pixels,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    threshold,
    BLOCK: tl.constexpr,
):
    """Grid (slots, cdiv(P, BLOCK)).

    Solarize and normalise blurred planes; empty slots are skipped.
    """
    slot = tl.program_id(0)
    image = tl.load(images_of_ptr + slot)
    row_ptr = rows_ptr + image * 12
    if tl.load(row_ptr + 9) == slot:
        p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = p < pixels
        solarize = tl.load(row_ptr + 7)
        plane_ptr = planes_ptr + slot.to(tl.int64) * pixels * 3 + p
        to_ptr = out_ptr + image.to(tl.int64) * stride_ob + p * stride_op
        r = tl.load(plane_ptr, mask=inside, other=0).to(tl.int32)
        _write(to_ptr, r, scale_r, shift_r, solarize, threshold, inside)
        g = tl.load(plane_ptr + pixels, mask=inside, other=0).to(tl.int32)
        _write(to_ptr + stride_oc, g, scale_g, shift_g, solarize, threshold, inside)
        b = tl.load(plane_ptr + 2 * pixels, mask=inside, other=0).to(tl.int32)
        _write(to_ptr + 2 * stride_oc, b, scale_b, shift_b, solarize, threshold, inside)
