"""Every configuration of the residual layer norm."""

from __future__ import annotations

from typing import Any

from benchmarks.aot.machine_code import AotCase
from fastmoco_kernels.residual_norm.launch import (
    SUM_COLS,
    SUM_ROWS,
    SUM_WARPS,
    Tile,
    backward_tiles,
    columns,
    forward_tiles,
)
from fastmoco_kernels.residual_norm.triton_kernels import (
    residual_norm_bwd_kernel,
    residual_norm_fwd_kernel,
    residual_norm_sum_kernel,
)

_Types = tuple[str, str, str, str]
_USUAL: _Types = ("fp32", "bf16", "bf16", "fp32")
_OTHERS: tuple[_Types, ...] = (
    ("fp32", "fp16", "fp16", "fp32"),
    ("fp32", "bf16", "bf16", "bf16"),
    ("fp32", "fp32", "fp32", "fp32"),
    ("bf16", "bf16", "bf16", "bf16"),
)
_WIDTHS = (384, 768, 1024, 1280)
_RARE_WIDTHS = (64, 100, 192, 4096)


def aot_cases() -> list[AotCase]:
    """Every tile at the widths of vision transformers in autocast's types, defaults at narrow, odd
    and the widest rows.

    Types are those of x, branch, y and weight; other ones, and calls without a branch or without a
    gradient to x_new or to the branch, are compiled at a width of 384.
    """
    cases = []

    def add(way: str, E: int, types: _Types, tile: Tile, **flags: bool) -> None:
        tiles = forward_tiles(E) if way == "fwd" else backward_tiles(E)
        constants = flags | {"E": E, "COLS": columns(E), "ROWS": tile[0]}
        cases.append(_case(way, types, constants, tile, tiles[0]))

    usual = [
        (E, types, 1)
        for E, types in [(E, _USUAL) for E in _RARE_WIDTHS] + [(384, types) for types in _OTHERS]
    ]
    for E, types, tiles in [(E, _USUAL, None) for E in _WIDTHS] + usual:
        for tile in forward_tiles(E)[:tiles]:
            add("fwd", E, types, tile, HAS_BRANCH=True)
        for tile in backward_tiles(E)[:tiles]:
            for summed in (False, True):
                add(
                    "bwd",
                    E,
                    types,
                    tile,
                    HAS_DX_NEW=True,
                    HAS_DBRANCH=types[1] != types[0],
                    HAS_BRANCH_BIAS=summed,
                )
    add("fwd", 384, _USUAL, forward_tiles(384)[0], HAS_BRANCH=False)
    for new, branch in ((True, False), (False, True), (False, False)):
        add(
            "bwd",
            384,
            _USUAL,
            backward_tiles(384)[0],
            HAS_DX_NEW=new,
            HAS_DBRANCH=branch,
            HAS_BRANCH_BIAS=False,
        )
    for types in (_USUAL, _OTHERS[1]):
        tile = (SUM_ROWS, SUM_WARPS)
        cases.append(
            _case("sum", types, {"E": 384, "COLS": SUM_COLS, "ROWS": SUM_ROWS}, tile, tile)
        )
    unique: dict[str, AotCase] = {}
    # tiles that differ in programs alone are one configuration, and the first may be the default
    for case in cases:
        unique.setdefault(case.name, case)
    return list(unique.values())


def _case(way: str, types: _Types, constants: dict[str, Any], tile: Tile, default: Tile) -> AotCase:
    """One configuration; types by the names of the arguments."""
    kernels = {
        "fwd": residual_norm_fwd_kernel,
        "bwd": residual_norm_bwd_kernel,
        "sum": residual_norm_sum_kernel,
    }
    kernel = kernels[way]
    x, branch, y, weight = types
    stream = (
        "fp32" if x == "fp32" or (branch == "fp32" and constants.get("HAS_BRANCH", True)) else x
    )
    kinds = {
        "x_ptr": x,
        "dx_ptr": x,
        "branch_ptr": branch,
        "dbranch_ptr": branch,
        "y_ptr": y,
        "dy_ptr": y,
    }
    kinds |= {
        "x_new_ptr": stream,
        "dx_new_ptr": stream,
        "mean_ptr": "fp32",
        "rstd_ptr": "fp32",
        "partial_ptr": "fp32",
    }
    kinds |= dict.fromkeys(
        ("weight_ptr", "bias_ptr", "dweight_ptr", "dbias_ptr", "dbranch_bias_ptr"), weight
    )
    scalars = {"rows": "i32", "programs": "i32", "eps": "fp32"}
    signature = {
        name: f"*{kinds[name]}" if name in kinds else scalars.get(name, "constexpr")
        for name in kernel.arg_names
    }
    flags = " ".join(
        name
        for name in ("HAS_BRANCH", "HAS_DX_NEW", "HAS_DBRANCH", "HAS_BRANCH_BIAS")
        if constants.get(name)
    )
    shape = (f"rows {tile[0]}", f"w{tile[1]}")
    return AotCase(
        name=" ".join(
            filter(
                None,
                (f"residual_norm.{way}", "/".join(types), f"E={constants['E']}", flags, *shape),
            )
        ),
        kernel=kernel,
        signature=signature,
        constexprs=constants,
        num_warps=tile[1],
        num_stages=3,
        default_on=(80, 90, 100) if tile == default else (),
        aligned=tuple(name for name in signature if name.endswith("_ptr")),
        quick=types == _USUAL and constants["E"] in (384, 768),
    )
