"""Tiles of the streaming kernel, and the defaults where nothing is measured.

A tile is (rows that stay, rows that stream past, warps, stages of the pipeline). Every one is
compiled ahead of time for sm_80, sm_90a and sm_100a (the small ones for sm_80), and the defaults
spill no register there, under the oldest and the newest supported Triton, which allocate registers
differently: `python -m benchmarks.compiled --op info_nce`.

Legend: D padded projection dimension.
"""

from __future__ import annotations

from typing import NamedTuple

from fastmoco_kernels.info_nce.cost import padded

FAMILIES = (0, 80, 90, 100)
"""Kinds of GPU: little shared memory; compute capability 8.0, 9.0, 10.0 and newer."""


class Tile(NamedTuple):
    """One configuration of the streaming kernel."""

    block_x: int
    block_y: int
    warps: int
    stages: int


def candidates(capability: int, D: int, precision: str) -> tuple[Tile, ...]:
    """Tiles that one kind of GPU may try, its default first.

    Args:
        capability: one of `FAMILIES`, as by `family`.
        D: padded dimension, a power of two up to 512.
        precision: what the tensor cores multiply.
    """
    return _TILES[_operand(precision)][D if D >= 256 else 128][capability]


def family(capability: tuple[int, int]) -> int:
    """The table's entry for a GPU. Chips with 100 KiB of shared memory take the small tiles."""
    if capability in ((8, 6), (8, 9)) or capability >= (12, 0):
        return 0
    return min(capability[0], 10) * 10


def key_splits(rows: int, columns: int, directions: int, tile: Tile, processors: int) -> int:
    """Parts of the streamed rows: the fewest that leave less than a tenth of the GPU idle.

    A pure function of sizes and GPU, because the parts decide the order of a sum. Each part holds
    two tiles or more, and there are at most 32: every part costs a write and a read of the sums.
    """
    blocks = directions * -(-padded(rows) // tile.block_x)
    tiles = -(-columns // tile.block_y)
    best, best_use = 1, 0.0
    for parts in range(1, max(1, min(32, tiles // 2)) + 1):
        per_part = -(-tiles // parts)
        real = -(-tiles // per_part)
        waves = -(-blocks * real // processors)
        use = blocks * tiles / (waves * processors * per_part)
        if use > best_use + 1e-9:
            best, best_use = real, use
        if best_use >= 0.9:
            break
    return best


def _operand(precision: str) -> str:
    return {"bf16": "half", "fp16": "half"}.get(precision, precision)


_TILES: dict[str, dict[int, dict[int, tuple[Tile, ...]]]] = {
    "half": {
        128: {
            0: (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
            80: (Tile(128, 64, 8, 3), Tile(128, 32, 8, 3), Tile(64, 64, 4, 3)),
            90: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
            100: (Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
        },
        256: {
            0: (Tile(64, 32, 4, 2),),
            80: (Tile(64, 64, 8, 3), Tile(128, 32, 8, 2), Tile(128, 64, 8, 2)),
            90: (Tile(128, 64, 8, 3), Tile(128, 128, 8, 2), Tile(128, 64, 8, 2)),
            100: (Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 32, 8, 3)),
        },
        512: {
            0: (Tile(32, 32, 8, 2),),
            80: (Tile(64, 32, 8, 3), Tile(32, 32, 8, 3)),
            90: (Tile(64, 32, 8, 3), Tile(64, 64, 8, 2)),
            100: (Tile(64, 32, 8, 3), Tile(64, 32, 8, 2)),
        },
    },
    "tf32": {
        128: {
            0: (Tile(64, 32, 4, 2),),
            80: (Tile(64, 32, 4, 2), Tile(128, 32, 8, 2)),
            90: (Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)),
            100: (Tile(128, 32, 8, 2), Tile(64, 32, 4, 2)),
        },
        256: {
            0: (Tile(32, 32, 4, 1),),
            80: (Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
            90: (Tile(128, 32, 8, 2), Tile(64, 16, 8, 2)),
            100: (Tile(64, 32, 8, 2), Tile(128, 32, 8, 2)),
        },
        512: {
            0: (Tile(16, 16, 4, 1),),
            80: (Tile(32, 16, 8, 2),),
            90: (Tile(32, 32, 8, 2),),
            100: (Tile(32, 32, 8, 2),),
        },
    },
    "fp32": {
        128: {family: (Tile(32, 32, 8, 2),) for family in FAMILIES},
        256: {family: (Tile(32, 32, 8, 1),) for family in FAMILIES},
        512: {family: (Tile(16, 16, 4, 1),) for family in FAMILIES},
    },
}
