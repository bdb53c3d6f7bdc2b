"""Cost of the loss, and the numeric range of its kernels.

Legend: B local queries, N keys of all ranks, D projection dimension.
"""

from __future__ import annotations

import math

LOG2_E = math.log2(math.e)
MAX_DIM = 512
"""Widest D of the kernels: a tile of queries, one of keys and the sums live on chip."""
PRECISIONS = ("bf16", "fp16", "tf32", "fp32")
BLOCK = 128
"""Scratch tensors are padded to a multiple of this, so that no load in the loop is masked."""


def exponent_ceiling(precision: str) -> float:
    """Largest exponent (of 2) that the kernels give one term of their sums.

    Sums of up to 2^30 terms of 2^90 stay in float32; fp16, which holds each term on its way into
    the tensor cores, ends at 2^16.
    """
    return 15.0 if precision == "fp16" else 90.0


def smallest_temperature(precision: str) -> float:
    """The smallest temperature that the kernels take.

    Exponents (of 2) are in `[-2 c, 0] + ceiling` with `c = log2(e) / temperature`, and normal
    numbers end at -126: from 0.0134 upwards no term of a softmax over cosines is lost, whatever the
    data. fp16 ends at -24: at 0.05 it drops negatives of a cosine below -0.35 from the gradient
    (not from the loss), which weigh e^-27 of one that equals the query.
    """
    return 0.05 if precision == "fp16" else 2 * LOG2_E / (exponent_ceiling(precision) + 126.0)


def padded(rows: int) -> int:
    """Rows of a scratch tensor."""
    return -(-rows // BLOCK) * BLOCK


def padded_dim(dim: int) -> int:
    """Width of a scratch tensor: a power of two, at least half a shared-memory swizzle line."""
    return max(64, 1 << (dim - 1).bit_length())


def flops(
    B: int,
    N: int,
    D: int,
    *,
    directions: int = 1,
    gradient: bool = True,
    key_gradient: bool = False,
) -> int:
    """FLOPs of the matrix products: logits, gradient, and the second pass for the keys.

    `2 B N D` for the loss alone, 4 with the gradient of the queries, 8 with that of the keys.
    """
    return directions * 2 * B * N * D * (1 + gradient + 2 * key_gradient)


def bytes_moved(
    B: int,
    N: int,
    D: int,
    *,
    directions: int = 1,
    splits: int = 1,
    itemsize: int = 4,
    scratch_itemsize: int = 2,
    gradient: bool = True,
) -> int:
    """Bytes that the launches of loss and query gradient move, each tensor once a launch.

    Rows to unit length: the raw rows in, the padded unit rows and lengths out. The pass: both unit
    rows in, the sums of each part of the keys out. The epilogue: raw rows, lengths and sums in,
    gradient and rows of results out. Repeated reads of the keys from the L2 cache, for every block
    of queries, are not counted. About `16 B D + 8 N D + 8 splits B D`.

    Args:
        B: queries.
        N: keys.
        D: width.
        directions: 1 or 2.
        splits: parts of the keys, as `tiles.key_splits` gives.
        itemsize: bytes of an element of the raw rows, and of the gradient.
        scratch_itemsize: of the unit rows: 2 for bf16 and fp16, 4 for tf32 and fp32.
        gradient: whether it is computed.
    """
    wide, x, y = padded_dim(D), padded(B), padded(N)
    raw = (B + N) * D * itemsize
    units = (x + y) * wide * scratch_itemsize
    lengths = 4 * (B + N)
    sums = splits * x * 4 * (1 + (wide if gradient else 0))
    results = 4 * 4 * B + (B * D * itemsize if gradient else 0)
    return directions * (
        (raw + units + lengths) + (units + sums) + (raw + lengths + sums + results)
    )
