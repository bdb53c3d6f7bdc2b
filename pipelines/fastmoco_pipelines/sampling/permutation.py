"""A keyed permutation of 0..count-1, any value of which is computed alone: no table, no sort.

A Feistel network on a grid (Black and Rogaway 2002, "Ciphers with arbitrary finite domains"). A
position is a cell of a grid of `rows` rows and `columns` columns, the smallest that holds `count`
cells with columns a power of two near the square root. One pass rotates every row by a drawn number
of cells, then every column:

    column = (column + draw(row)) mod columns
    row    = (row + draw'(column)) mod rows

with draws of its own in each pass. Values of `count` or more, fewer than one in `rows`, go through
all passes again until they are below it; that keeps the permutation one of 0..count-1. Rotations by
odd numbers are odd permutations where columns are even, so both parities occur for every count;
with XOR only even ones would, for a count of 2**k.

The distance of pairs of values from uniform falls by the factor `columns` a pass (exactly, for
ideal draws), so small counts, with narrow grids, take more passes:
docs/decisions/0012-order-without-a-table.md has the figures. All numbers are unsigned 64-bit
integers: the same on every machine and under every version of numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.sampling.philox import shuffle_words

BLOCK = 8192
"""Positions computed at once: enough that calls of numpy cost little, few enough for the cache of a
core."""
# "permute": second word of the Philox key, so that no other use of the seed shares a stream with it
PERMUTE_TAG = 0x7065726D757465
MOST = 2**62
"""The largest count: products of a draw of 32 bits and a number of rows fit into 64."""
_LEAST_PASSES = 12
_DISTANCE_BITS = 48  # of pairs of values: 2**-48
_FEW = 8  # positions for which the calls of numpy cost more
_WORD = 2**64 - 1
_MIX = 0xD6E8FEB86659FD93  # odd, with its bits spread (Rrmxmx, Pelle Evensen 2018)
_MIX_WORD = np.uint64(_MIX)
_SHIFT32 = np.uint64(32)


@dataclass(frozen=True, slots=True, eq=False)
class KeyedPermutation:
    """A permutation of 0..count-1.

    Attributes:
        count: 0 to `MOST`.
        words: [passes, 4] uint64: factor and offset of the draws of each pass, first those for the
            rows, then those for the columns.
    """

    count: int
    words: NDArray[np.uint64]

    @property
    def column_bits(self) -> int:
        """The grid has 2**column_bits columns: at most as many as rows, but two at least."""
        return max(1, (self.count.bit_length() - 1) // 2)

    @property
    def rows(self) -> int:
        """Rows of the grid."""
        return -(-self.count >> self.column_bits)

    def one(self, position: int) -> int:
        """The value at one position: the reference, in Python's integers."""
        bits, columns, rows = self.column_bits, 1 << self.column_bits, self.rows
        passes = self.words.tolist()
        while True:
            row, column = position >> bits, position & (columns - 1)
            for row_factor, row_offset, column_factor, column_offset in passes:
                draw = row * row_factor + row_offset & _WORD
                draw = (draw ^ draw >> 32) * _MIX & _WORD
                column = (column + (draw >> 64 - bits)) & (columns - 1)
                draw = column * column_factor + column_offset & _WORD
                draw = (draw ^ draw >> 32) * _MIX & _WORD
                row = (row + ((draw >> 32) * rows >> 32)) % rows
            position = row << bits | column
            if position < self.count:
                return position

    def at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The values at some positions, each in [0, count): an array of the same shape."""
        flat = positions.reshape(-1)
        if len(flat) <= _FEW:
            few = [self.one(position) for position in flat.tolist()]
            return np.array(few, dtype=np.int64).reshape(positions.shape)
        values = np.empty(len(flat), dtype=np.int64)
        for start in range(0, len(flat), BLOCK):
            values[start : start + BLOCK] = self._block(flat[start : start + BLOCK])
        return values.reshape(positions.shape)

    def _block(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        values = self._on_the_grid(positions.astype(np.uint64))

        # Cells of the grid beyond `count` are no samples: their values are moved on.
        outside = np.flatnonzero(values >= np.uint64(self.count))
        while len(outside):
            values[outside] = self._on_the_grid(values[outside])
            outside = outside[values[outside] >= np.uint64(self.count)]
        return values.view(np.int64)

    def _on_the_grid(self, cells: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """All passes over some cells of the grid, which may be overwritten."""
        bits, mask = np.uint64(self.column_bits), np.uint64((1 << self.column_bits) - 1)
        top, rows = np.uint64(64 - self.column_bits), np.uint64(self.rows)
        column = cells & mask
        row = np.right_shift(cells, bits, out=cells)
        draw, spare = np.empty_like(row), np.empty_like(row)
        for row_factor, row_offset, column_factor, column_offset in self.words:
            _mixed(row, row_factor, row_offset, out=draw, spare=spare)
            draw >>= top
            column += draw
            column &= mask

            # The upper 32 bits, scaled to 0..rows-1. Of the sum and the sum less `rows`, which
            # wraps round below 0, the smaller is the remainder.
            _mixed(column, column_factor, column_offset, out=draw, spare=spare)
            draw >>= _SHIFT32
            draw *= rows
            draw >>= _SHIFT32
            row += draw
            np.minimum(row, np.subtract(row, rows, out=spare), out=row)
        row <<= bits
        row |= column
        return row


def _mixed(
    numbers: NDArray[np.uint64],
    factor: np.uint64,
    offset: np.uint64,
    *,
    out: NDArray[np.uint64],
    spare: NDArray[np.uint64],
) -> None:
    """Write a keyed hash of each number to `out`; its upper 32 bits are good.

    Factor times number plus offset is already uniform for each pair of numbers (Dietzfelbinger
    1996); folding and a second product break up its arithmetic progressions.
    """
    np.multiply(numbers, factor, out=out)
    out += offset
    out ^= np.right_shift(out, _SHIFT32, out=spare)
    out *= _MIX_WORD


@lru_cache(maxsize=64)
def keyed_permutation(seed: int, epoch: int, part: int, count: int) -> KeyedPermutation:
    """The permutation of a part (a window of shards) of an epoch; raw words of Philox are its key.

    Args:
        seed: 0 to 2**63 - 1.
        epoch: from 0.
        part: from 0.
        count: samples of the part.
    """
    permutation = KeyedPermutation(count, np.empty((0, 4), dtype=np.uint64))
    passes = max(_LEAST_PASSES, -(-_DISTANCE_BITS // permutation.column_bits))
    words = shuffle_words(seed, PERMUTE_TAG, epoch, 4 * passes, part).reshape(passes, 4)
    words.flags.writeable = False
    return KeyedPermutation(count, words)
