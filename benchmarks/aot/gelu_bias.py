"""Every configuration of the gradient of GELU."""

from __future__ import annotations

from benchmarks.aot.column_sums import column_sum_case
from benchmarks.aot.machine_code import AotCase
from fastmoco_kernels.column_sums.launch import Tile
from fastmoco_kernels.gelu_bias.launch import WARPS, columns, tiles
from fastmoco_kernels.gelu_bias.triton_kernels import gelu_bwd_kernel

_WIDTHS = (1536, 3072, 4096, 5120)
_OTHERS = ((100, "bf16"), (768, "bf16"), (1536, "fp16"), (1536, "fp32"))


def aot_cases() -> list[AotCase]:
    """Every tile at the hidden widths of vision transformers in bf16; defaults in other types, at
    others, without a bias.
    """
    cases: dict[str, AotCase] = {}
    usual = [(F, "bf16", tile, True) for F in _WIDTHS for tile in tiles(F)]
    others = [(F, dtype, tiles(F)[0], True) for F, dtype in _OTHERS] + [
        (1536, "bf16", tiles(1536)[0], False)
    ]
    for F, dtype, tile, bias in usual + others:
        case = _case(F, dtype, tile, bias=bias)
        cases.setdefault(
            case.name, case
        )  # tiles that differ in programs alone are one configuration
    for F, kind in ((1536, "fp32"), (5120, "bf16")):
        case = column_sum_case("gelu_bias", F, kind)
        cases[case.name] = case
    return list(cases.values())


def _case(F: int, dtype: str, tile: Tile, *, bias: bool) -> AotCase:
    pointers = {"dy_ptr": f"*{dtype}", "h_ptr": f"*{dtype}", "dh_ptr": f"*{dtype}"}
    pointers["partial_ptr"] = "*fp32" if bias else f"*{dtype}"
    constants = {"HAS_BIAS": bias, "F": F, "COLS": columns(F), "ROWS": tile[0]}
    return AotCase(
        name=f"gelu_bias.bwd {dtype} F={F}{' bias' if bias else ''} rows {tile[0]}",
        kernel=gelu_bwd_kernel,
        signature=pointers | {"rows": "i32"} | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        num_warps=WARPS,
        num_stages=3,
        default_on=(80, 90, 100) if tile == tiles(F)[0] else (),
        aligned=tuple(pointers),
        quick=dtype == "bf16" and F in (1536, 3072),
    )
