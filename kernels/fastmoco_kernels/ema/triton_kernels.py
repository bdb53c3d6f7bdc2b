"""The moving average of many tensors in one launch, over the table of `tables.py`.

Legend: a program handles CHUNK elements of one tensor. AVERAGE and SOURCE are the element types. A
chunk that is full and whose addresses allow it is read and written 128 bits at a time; the last
chunk of a tensor, and tensors at odd addresses, element by element.
"""

import triton
import triton.language as tl


@triton.jit
def lerp(start, end, weight):
    """`start + weight * (end - start)`; mirrored from 1/2 on, so that weight 1 gives `end` itself.

    `start` comes back bit for bit where it equals `end`, at any weight.
    """
    difference = end - start
    near_start = tl.fma(difference, weight, start)
    near_end = tl.fma(difference, weight - 1.0, end)
    return tl.where(weight < 0.5, near_start, near_end)


@triton.jit
def lerp_chunk(average_ptr, source_ptr, offsets, mask, weight):
    """Update the elements at `offsets`; `mask` None means all of them."""
    average = tl.load(average_ptr + offsets, mask=mask)
    source = tl.load(source_ptr + offsets, mask=mask).to(tl.float32)
    weights = tl.full(average.shape, 0.0, tl.float32) + weight
    tl.store(average_ptr + offsets, lerp(average, source, weights), mask=mask)


@triton.jit
def ema_kernel(
    pointers_ptr,  # [2, rows] int64: averages, sources
    sizes_ptr,  # [rows] int64
    chunk_rows_ptr,  # [chunks] int32
    chunk_starts_ptr,  # [chunks] int64
    rows,
    weight,  # 1 - momentum; ON_DEVICE: a pointer to one momentum
    ON_DEVICE: tl.constexpr,
    SOURCE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """averages <- lerp(averages, sources, weight), averages in float32."""
    program = tl.program_id(0)
    row = tl.load(chunk_rows_ptr + program)
    start = tl.load(chunk_starts_ptr + program)
    left = tl.load(sizes_ptr + row) - start
    average_address = tl.load(pointers_ptr + row)
    source_address = tl.load(pointers_ptr + rows + row)
    average_ptr = average_address.to(tl.pointer_type(tl.float32)) + start
    source_ptr = source_address.to(tl.pointer_type(SOURCE)) + start
    if ON_DEVICE:
        weight = (1.0 - tl.load(weight).to(tl.float64)).to(tl.float32)
    offsets = tl.arange(0, CHUNK)
    if (left >= CHUNK) & (((average_address | source_address) & 15) == 0):
        # Equal numbers of elements a load for both types: otherwise a layout is converted in shared
        # memory.
        source_ptr = tl.multiple_of(source_ptr, 4 * SOURCE.primitive_bitwidth // 8)
        lerp_chunk(tl.multiple_of(average_ptr, 16), source_ptr, offsets, None, weight)
    else:
        lerp_chunk(average_ptr, source_ptr, offsets, offsets < left, weight)
