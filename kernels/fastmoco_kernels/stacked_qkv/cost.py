"""Bytes that stacking the gradients of q, k, v moves: B images of L tokens and width E."""

from __future__ import annotations


def split_qkv_backward_bytes(
    B: int, L: int, E: int, *, size: int = 2, bias: int = 0, programs: int = 0
) -> int:
    """Bytes that the backward moves: dq, dk, dv, the stack, and partial sums once each way.

    Args:
        B: images.
        L: tokens of an image.
        E: width, of q alone.
        size: bytes of one element.
        bias: of the bias; 0 where there is none.
        programs: that share the rows and keep partial sums.
    """
    return 2 * B * L * 3 * E * size + (3 * E * bias + 2 * programs * 3 * E * 4 if bias else 0)


def eager_backward_bytes(B: int, L: int, E: int, *, size: int = 2) -> int:
    """What torch's two operations move: the stack, then the sum over its rows."""
    return 3 * B * L * 3 * E * size
