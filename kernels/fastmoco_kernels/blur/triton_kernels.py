"""One box of the blur along one axis, in integers.

B images, C channels, H rows of W levels; a plane is one channel of one image, P = H W levels.
"""

import triton
import triton.language as tl


@triton.jit
def box_pass_kernel(
    source_ptr,  # [B, C, H, W] uint8, contiguous
    target_ptr,  # the same
    boxes_ptr,  # [B, 4] int32: radius, weight of a whole tap, weight of an edge tap, bias
    channels,
    height,
    width,
    ALONG_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B C, cdiv(P, BLOCK)). An image of radius -1 is copied.

    Levels are shifted by 128, so that 2^24 times a level fits int32.
    """
    plane = tl.program_id(0).to(tl.int64)
    box_ptr = boxes_ptr + plane // channels * 4
    radius = tl.load(box_ptr)
    whole = tl.load(box_ptr + 1)
    edge = tl.load(box_ptr + 2)
    bias = tl.load(box_ptr + 3)

    count = height * width
    p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = p < count
    source_ptr += plane * count
    target_ptr += plane * count
    if radius < 0:
        tl.store(target_ptr + p, tl.load(source_ptr + p, mask=inside, other=0), mask=inside)
    else:
        if ALONG_WIDTH:
            at = p % width
            line_ptr = source_ptr + (p - at)
            last = width - 1
            stride = 1
        else:
            at = p // width
            line_ptr = source_ptr + (p - at * width)
            last = height - 1
            stride = width

        # The whole taps, then the two edge taps; positions beyond the border are clamped.
        inner = tl.zeros([BLOCK], dtype=tl.int32)
        for tap in range(2 * radius + 1):
            to = tl.minimum(tl.maximum(at + (tap - radius), 0), last)
            inner += tl.load(line_ptr + to * stride, mask=inside, other=0).to(tl.int32) - 128
        before = tl.maximum(at - radius - 1, 0)
        after = tl.minimum(at + radius + 1, last)
        far = tl.load(line_ptr + before * stride, mask=inside, other=0).to(tl.int32)
        far += tl.load(line_ptr + after * stride, mask=inside, other=0).to(tl.int32) - 256
        blurred = ((inner * whole + far * edge + bias) >> 24) + 128
        tl.store(target_ptr + p, blurred.to(tl.uint8), mask=inside)
