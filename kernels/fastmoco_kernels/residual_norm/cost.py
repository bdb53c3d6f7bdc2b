"""What a residual layer norm moves, by shape: R rows of width E, each tensor once."""

from __future__ import annotations


def residual_norm_bytes(
    R: int,
    E: int,
    *,
    x: int = 4,
    branch: int = 2,
    out: int = 2,
    weight: int = 4,
    x_new: int | None = None,
) -> int:
    """Bytes that the forward reads and writes.

    Reads x, the branch, weight and bias; writes x_new, y and two float32 a row.

    Args:
        R: rows.
        E: width.
        x: bytes of one element of x.
        branch: of the branch; 0 where there is none, and then x_new is not written.
        out: of y.
        weight: of weight and bias.
        x_new: of x_new; by default the wider of x and branch.
    """
    written = (max(x, branch) if x_new is None else x_new) if branch else 0
    return R * E * (x + branch + written + out) + 2 * E * weight + 8 * R


def residual_norm_backward_bytes(
    R: int,
    E: int,
    *,
    x: int = 4,
    branch: int = 2,
    out: int = 2,
    weight: int = 4,
    x_new: int | None = None,
    dx_new: bool = True,
    programs: int = 0,
    branch_bias: int = 0,
) -> int:
    """Bytes that the backward reads and writes.

    Reads dy, dx_new, x_new, the weight and two float32 a row; writes dx, dbranch, dweight and
    dbias. Partial sums are written once and read once.

    Args:
        R: rows.
        E: width.
        x: bytes of one element of x and dx.
        branch: of the branch; 0 where there is none. dbranch is dx itself where `branch == x`: one
            type, one tensor.
        out: of dy.
        weight: of weight and bias.
        x_new: of x_new and dx_new; by default the wider of x and branch.
        dx_new: whether x_new has another use than its norm.
        programs: that keep partial sums.
        branch_bias: bytes of one element of the branch's bias; 0 where there is none.
    """
    wide = max(x, branch) if x_new is None else x_new
    moved = R * E * (out + (2 if dx_new else 1) * wide + x + (0 if branch == x else branch))
    sums = 3 if branch_bias else 2
    return moved + 3 * E * weight + E * branch_bias + 8 * R + 2 * sums * programs * E * 4


def eager_bytes(R: int, E: int, *, backward: bool = False) -> int:
    """Bytes that torch's operations move for a float32 x and a 16-bit branch.

    Forward: add (10 an element), layer norm (8), cast (6). Backward: cast of dy (6), layer norm (x,
    dy; dx: 12, and 8 more for weight and bias, which another kernel sums), sum with dx_new (12),
    cast of the branch's gradient (6).
    """
    return R * E * (44 if backward else 24)
