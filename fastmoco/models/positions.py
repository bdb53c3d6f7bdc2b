"""Tables of the positions of patches, fixed ones and how any of them goes to another size."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastmoco.config.model import Positions


def sincos_positions(grid: int, width: int) -> Tensor:
    """The fixed two-dimensional sine-cosine table of MoCo v3.

    Row 0 belongs to the class token and is zero. The token at row r and column c holds
    `[sin(r w), cos(r w), sin(c w), cos(c w)]`, a quarter of the width each, with
    `w_i = 10000^(-i / (width / 4))`. The row block comes first; `column_first_positions` is the
    table of MAE.

    Args:
        grid: tokens per side.
        width: channels, divisible by 4.

    Returns:
        [1 + grid * grid, width] float32.
    """
    # In float32 throughout, which makes the table bit-equal to that of the released checkpoints.
    quarter = width // 4
    w = 1.0 / 10000.0 ** (torch.arange(quarter, dtype=torch.float32) / quarter)
    return _table(*_waves(grid, w))


def column_first_positions(grid: int, width: int) -> Tensor:
    """The fixed two-dimensional sine-cosine table of MAE (He et al. 2022).

    As `sincos_positions`, but the token at row r and column c holds
    `[sin(c w), cos(c w), sin(r w), cos(r w)]`.

    Args:
        grid: tokens per side.
        width: channels, divisible by 4.

    Returns:
        [1 + grid * grid, width] float32.
    """
    # In float64 and rounded once, as the released checkpoints.
    quarter = width // 4
    w = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    by_row, by_column = _waves(grid, w)
    return _table(by_column, by_row).float()


def _waves(grid: int, w: Tensor) -> tuple[Tensor, Tensor]:
    """Sines and cosines by row, and by column, of frequencies [E / 4]: each [grid, grid, E / 2]."""
    angle = torch.arange(grid, dtype=w.dtype)[:, None] * w
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)
    return waves[:, None, :].expand(grid, grid, -1), waves[None, :, :].expand(grid, grid, -1)


def _table(first: Tensor, second: Tensor) -> Tensor:
    """[1 + grid * grid, E] of two halves [grid, grid, E / 2], behind a row of zeros."""
    table = torch.cat([first, second], dim=2).flatten(0, 1)
    return torch.cat([table.new_zeros(1, table.shape[1]), table])


FIXED_POSITIONS: dict[Positions, Callable[[int, int], Tensor]] = {
    "sincos": sincos_positions,
    "sincos_columns": column_first_positions,
}
"""Kinds of positions that never train, and what makes their table of a grid and a width."""


def resized_positions(table: Tensor, grid: int) -> Tensor:
    """A table of positions for images of another size, by the rule of DINO (Caron et al. 2021).

    Bicubic interpolation with corners not aligned. The sampling points follow from the factor
    `(grid + 0.1) / old_grid`, not from the two sizes: `size=` would give other numbers. Gradients
    flow to the table.

    Args:
        table: [1, old_grid * old_grid, E], row by row, without a class token.
        grid: tokens per side.

    Returns:
        [1, grid * grid, E]; the table itself where `grid` is its own.
    """
    old = math.isqrt(table.shape[1])
    if grid == old:
        return table
    square = table.transpose(1, 2).reshape(1, -1, old, old)
    factor = (grid + 0.1) / old
    found: Tensor = interpolate(
        square, scale_factor=(factor, factor), mode="bicubic", align_corners=False
    )
    return found.flatten(2).transpose(1, 2)
