"""What GELU and its backward move, by shape: R rows of width F, each tensor once."""

from __future__ import annotations


def gelu_bytes(R: int, F: int, *, size: int = 2) -> int:
    """Bytes that the forward reads and writes; `size` bytes an element."""
    return 2 * R * F * size


def gelu_backward_bytes(R: int, F: int, *, size: int = 2, bias: int = 0, programs: int = 0) -> int:
    """Bytes that the backward reads and writes: dy, h, dh, and partial sums once each way.

    Args:
        R: rows.
        F: width.
        size: bytes of one element of h.
        bias: of the bias; 0 where there is none.
        programs: that share the rows and keep partial sums.
    """
    return 3 * R * F * size + (F * bias + 2 * programs * F * 4 if bias else 0)


def eager_backward_bytes(R: int, F: int, *, size: int = 2) -> int:
    """What torch's two operations move: the gradient of GELU, then the sum over its rows."""
    return 4 * R * F * size
