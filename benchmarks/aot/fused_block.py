"""Every configuration of a fused block's backward passes."""

from __future__ import annotations

from itertools import product
from typing import Any

from benchmarks.aot.column_sums import column_sum_case
from benchmarks.aot.machine_code import AotCase
from fastmoco_kernels.fused_block.launch import Tile
from fastmoco_kernels.fused_block.triton_kernels import block_gelu_bwd_kernel, block_norm_bwd_kernel
from fastmoco_kernels.gelu_bias.launch import WARPS as GELU_WARPS
from fastmoco_kernels.gelu_bias.launch import columns as gelu_columns
from fastmoco_kernels.gelu_bias.launch import tiles as gelu_tiles
from fastmoco_kernels.residual_norm.launch import backward_tiles as norm_tiles
from fastmoco_kernels.residual_norm.launch import columns as norm_columns


def aot_cases() -> list[AotCase]:
    """Every tile at the widths of vision transformers and at odd ones, in the types of autocast;
    other types at 384 alone.
    """
    cases: dict[str, AotCase] = {}
    types = [(E, "bf16", "fp32") for E in (100, 192, 384, 768, 1024, 1280)]
    types += [
        (384, "fp16", "fp32"),
        (384, "fp32", "fp32"),
        (384, "bf16", "bf16"),
        (4096, "bf16", "fp32"),
    ]
    for E, half, weight in types:
        # The second norm of a block, the first, and the first of the first block.
        forms = ((True, True, True), (True, False, True), (True, False, False), (False, True, True))
        default = norm_tiles(E)[0]
        for tile, (dsum, branch, dbranch) in [
            *product([default], forms),
            *product(norm_tiles(E)[1:], forms[:1]),
        ]:
            flags = {
                "HAS_DSUM": dsum,
                "HAS_BRANCH": branch,
                "HAS_DBRANCH": dbranch and half != "fp32",
            }
            case = _norm_case(E, half, weight, tile, flags)
            cases.setdefault(
                case.name, case
            )  # tiles that differ in programs alone are one configuration
    for F, dtype in [
        *((4 * E, half) for E, half, weight in types if weight == "fp32" and E < 4096),
        (100, "bf16"),
    ]:
        for tile in gelu_tiles(F):
            case = _gelu_case(F, dtype, tile)
            cases.setdefault(case.name, case)
    for sums in (2 * 384, 3 * 384, 3 * 1280, 4 * 1280):
        case = column_sum_case("fused_block", sums, "fp32")
        cases.setdefault(case.name, case)
    return list(cases.values())


def _norm_case(E: int, half: str, weight: str, tile: Tile, flags: dict[str, bool]) -> AotCase:
    kinds = dict.fromkeys(
        ("x_ptr", "dx_ptr", "dsum_ptr", "mean_ptr", "rstd_ptr", "partial_ptr"), "*fp32"
    )
    kinds |= dict.fromkeys(("dy_ptr", "y_ptr", "branch_ptr", "dbranch_ptr"), f"*{half}")
    kinds |= {"weight_ptr": f"*{weight}", "bias_ptr": f"*{weight}", "rows": "i32"}
    named = " ".join(name for name, there in flags.items() if there)
    return _case(
        f"fused_block.norm_bwd {half}/{weight} E={E} {named} rows {tile[0]} w{tile[1]}",
        block_norm_bwd_kernel,
        kinds,
        {**flags, "E": E, "COLS": norm_columns(E), "ROWS": tile[0]},
        warps=tile[1],
        default=tile == norm_tiles(E)[0],
        quick=(half, weight) == ("bf16", "fp32") and E in (384, 768),
    )


def _gelu_case(F: int, dtype: str, tile: Tile) -> AotCase:
    kinds = dict.fromkeys(("dg_ptr", "h_ptr", "g_ptr", "dh_ptr"), f"*{dtype}") | {
        "partial_ptr": "*fp32",
        "rows": "i32",
    }
    return _case(
        f"fused_block.gelu_bwd {dtype} F={F} rows {tile[0]}",
        block_gelu_bwd_kernel,
        kinds,
        {"F": F, "COLS": gelu_columns(F), "ROWS": tile[0]},
        warps=GELU_WARPS,
        default=tile == gelu_tiles(F)[0],
        quick=dtype == "bf16" and F in (1536, 3072),
    )


def _case(
    name: str,
    kernel: Any,
    kinds: dict[str, str],
    constants: dict[str, Any],
    *,
    warps: int,
    default: bool,
    quick: bool,
) -> AotCase:
    names = kernel.arg_names
    return AotCase(
        name=name,
        kernel=kernel,
        signature={name: kinds.get(name, "constexpr") for name in names},
        constexprs=constants,
        num_warps=warps,
        num_stages=3,
        default_on=(80, 90, 100) if default else (),
        aligned=tuple(name for name in names if name.endswith("_ptr")),
        quick=quick,
    )
