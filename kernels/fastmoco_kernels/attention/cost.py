"""What attention costs, by shape: B images, A heads, L queries, M keys, head dimension d."""

from __future__ import annotations


def attention_flops(B: int, A: int, L: int, M: int, d: int, *, backward: bool = False) -> int:
    """Multiplications and additions of the matrix products.

    Two products forward (scores, output). A backward that keeps no weights has five: the scores
    again, and the gradients to weights, values, queries and keys.
    """
    return (10 if backward else 4) * B * A * L * M * d


def attention_bytes(
    B: int, A: int, L: int, M: int, d: int, itemsize: int, *, backward: bool = False
) -> int:
    """The fewest bytes that cross device memory when weights stay on chip; every tensor once.

    Forward reads q, k, v and writes the output and a float32 a query (the logarithm of the
    softmax's denominator). Backward reads q, k, v, the output, its gradient and that logarithm, and
    writes three gradients.
    """
    of_queries, of_keys = (4, 4) if backward else (2, 2)
    return B * A * ((of_queries * L + of_keys * M) * d * itemsize + 4 * L)


def explicit_weights_bytes(B: int, A: int, L: int, M: int, itemsize: int) -> int:
    """Bytes of the [B, A, L, M] softmax weights that `"explicit"` keeps for its backward."""
    return B * A * L * M * itemsize
