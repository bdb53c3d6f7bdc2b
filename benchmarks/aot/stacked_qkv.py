"""Every configuration of the pass that stacks the gradients of q, k and v."""

from __future__ import annotations

from benchmarks.aot.column_sums import column_sum_case
from benchmarks.aot.machine_code import AotCase
from fastmoco_kernels.column_sums.launch import Tile
from fastmoco_kernels.stacked_qkv.launch import WARPS, columns, tiles
from fastmoco_kernels.stacked_qkv.triton_kernels import split_qkv_bwd_kernel

_SHAPES = ((384, 32), (384, 64), (768, 64), (1024, 64), (1280, 80))
_OTHERS = ((96, 3, "bf16"), (192, 64, "bf16"), (384, 32, "fp16"), (384, 32, "fp32"))


def aot_cases() -> list[AotCase]:
    """Every tile at the widths of vision transformers in bf16; defaults in other types, at others,
    without a bias.
    """
    cases: dict[str, AotCase] = {}
    usual = [(E, d, "bf16", tile, True) for E, d in _SHAPES for tile in tiles(E)]
    others = [(E, d, dtype, tiles(E)[0], True) for E, d, dtype in _OTHERS] + [
        (384, 32, "bf16", tiles(384)[0], False)
    ]
    for E, d, dtype, tile, bias in usual + others:
        case = _case(E, d, dtype, tile, bias=bias)
        cases.setdefault(
            case.name, case
        )  # tiles that differ in programs alone are one configuration
    for E, kind in ((384, "fp32"), (1280, "bf16")):
        case = column_sum_case("stacked_qkv", 3 * E, kind)
        cases[case.name] = case
    return list(cases.values())


def _case(E: int, d: int, dtype: str, tile: Tile, *, bias: bool) -> AotCase:
    constants = {"HAS_BIAS": bias, "E": E, "D": d, "COLS": columns(E), "ROWS": tile[0]}
    kinds = dict.fromkeys(("dq_ptr", "dk_ptr", "dv_ptr", "dqkv_ptr"), f"*{dtype}")
    kinds |= {"partial_ptr": "*fp32" if bias else f"*{dtype}"} | dict.fromkeys(
        constants, "constexpr"
    )
    names = split_qkv_bwd_kernel.arg_names
    strides = tuple(name for name in names if name.startswith("stride")) if d % 16 == 0 else ()
    return AotCase(
        name=f"stacked_qkv.bwd {dtype} E={E} d={d}{' bias' if bias else ''} rows {tile[0]}",
        kernel=split_qkv_bwd_kernel,
        signature={name: kinds.get(name, "i32") for name in names},
        constexprs=constants,
        num_warps=WARPS,
        num_stages=3,
        default_on=(80, 90, 100) if tile == tiles(E)[0] else (),
        aligned=(*(name for name in names if name.endswith("_ptr")), *strides),
        quick=dtype == "bf16" and E in (384, 768),
    )
