"""Every configuration of short attention that its launcher may pick."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch

from benchmarks.aot.machine_code import AotCase
from fastmoco_kernels.attention.choice import TRITON_DTYPES, TRITON_HEAD_DIMS
from fastmoco_kernels.attention.launch import (
    CHIPS,
    KEY_ROWS,
    QUERY_ROWS,
    VIT_ROWS,
    Rows,
    Tile,
    backward_constants,
    backward_tiles,
    forward_constants,
    forward_tiles,
    in_halves,
)
from fastmoco_kernels.attention.triton_kernels import (
    short_attention_bwd_kernel,
    short_attention_fwd_kernel,
)

_ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def aot_cases() -> list[AotCase]:
    """Every configuration that `forward` and `backward` may pick, in the types that
    `choice.TRITON_DTYPES` lets in.

    Tiles of 16 query rows are narrower than Hopper's and Blackwell's own matrix instructions: they
    run on the older ones there, so no instruction is required of them.
    """
    cases = []
    for dtype, head_dim in product((_ELEMENTS[dtype] for dtype in TRITON_DTYPES), TRITON_HEAD_DIMS):
        for keys in KEY_ROWS:
            # 1: the class token alone; 64 and 80: without and with a smaller last tile.
            lists = [
                (chip, forward_tiles(chip, head_dim, queries, keys))
                for chip in CHIPS
                for queries in (1, 64, 80)
            ]
            for tile in dict.fromkeys(tile for _, tiles in lists for tile in tiles):
                what = f"keys {_sum(keys)} queries {tile[0]}{f'..{tile[1]}' if tile[1] else ''}"
                constants = forward_constants(head_dim, keys, tile)
                cases.append(
                    _case(
                        "fwd", what, dtype, constants, tile, lists, tile[0] > 16, keys == VIT_ROWS
                    )
                )
        for rows in QUERY_ROWS:
            chips = [chip for chip in CHIPS if not in_halves(chip, head_dim, sum(rows))]
            lists = [(chip, backward_tiles(chip, head_dim, rows)) for chip in chips]
            for tile in dict.fromkeys(tile for _, tiles in lists for tile in tiles):
                what = f"queries {_sum(rows)} keys {tile[0]}"
                constants = backward_constants(head_dim, rows, tile)
                cases.append(
                    _case(
                        "bwd", what, dtype, constants, tile, lists, rows[0] > 16, rows == VIT_ROWS
                    )
                )
    return cases


def _sum(rows: Rows) -> str:
    return "+".join(str(n) for n in rows if n)


def _case(
    way: str,
    what: str,
    dtype: str,
    constants: dict[str, Any],
    tile: Tile,
    lists: list[tuple[int, list[Tile]]],
    matrix: bool,
    quick: bool,
) -> AotCase:
    """One configuration, on the chips whose `lists` contain its tile; a
    default where it is first.
    """
    kernel = short_attention_fwd_kernel if way == "fwd" else short_attention_bwd_kernel
    kinds = {
        "lse_ptr": "*fp32",
        "A": "i32",
        "L": "i32",
        "M": "i32",
        "scale": "fp32",
        "scale_log2": "fp32",
    }
    signature = {}
    for name in kernel.arg_names:
        other = (
            f"*{dtype}"
            if name.endswith("_ptr")
            else "i32"
            if name.startswith("stride")
            else "constexpr"
        )
        signature[name] = kinds.get(name, other)
    return AotCase(
        name=f"attention.{way} {dtype} d={constants['D']} {what} w{tile[-2]} s{tile[-1]}",
        kernel=kernel,
        signature=signature,
        constexprs=constants,
        num_warps=tile[-2],
        num_stages=tile[-1],
        targets=tuple(dict.fromkeys(chip for chip, tiles in lists if tile in tiles)),
        default_on=tuple(dict.fromkeys(chip for chip, tiles in lists if tile == tiles[0])),
        aligned=tuple(
            name for name in signature if name.endswith("_ptr") or name.startswith("stride")
        ),
        matrix=matrix,
        quick=quick and dtype == "bf16",
    )
