"""Every configuration of the color kernels."""

from __future__ import annotations

import torch

from benchmarks.aot.machine_code import AotCase
from fastmoco_kernels.view_color.launch import BLOCK, SUMS, WARPS
from fastmoco_kernels.view_color.triton_kernels import (
    finish_kernel,
    grey_sum_kernel,
    view_color_kernel,
)

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.uint8: "u8"}


def aot_cases() -> list[AotCase]:
    """There is one tile; the result has four types."""
    tables = {"rows_ptr": "*i32", "factors_ptr": "*fp32", "late_ptr": "*u8", "sums_ptr": "*i32"}
    colors = [f"{what}_{channel}" for what in ("scale", "shift") for channel in "rgb"]
    numbers = {**dict.fromkeys(colors, "fp32"), "threshold": "i32"}
    strides = {"stride_ob": "i32", "stride_oc": "i32", "stride_op": "i32"}

    def case(
        name: str, kernel: object, signature: dict[str, str], aligned: tuple[str, ...], **sums: int
    ) -> AotCase:
        constants = {"BLOCK": BLOCK, **sums}
        return AotCase(
            name=f"view_color.{name}",
            kernel=kernel,
            signature={**signature, **dict.fromkeys(constants, "constexpr")},
            constexprs=constants,
            num_warps=WARPS,
            num_stages=3,
            default_on=(80, 90, 100),
            aligned=aligned,
            quick=name.endswith(("sum", "u8")),
            fp_fusion=False,
        )

    cases = [
        case(
            "grey_sum",
            grey_sum_kernel,
            {"images_ptr": "*u8", **tables, "pixels": "i32"},
            ("images_ptr",),
        )
    ]
    for kind in _TYPES.values():
        out = {"out_ptr": f"*{kind}", **strides}
        main = {"images_ptr": "*u8", **tables, "planes_ptr": "*u8", **out}
        main |= {"pixels": "i32", "width": "i32", "blocks": "i32", **numbers}
        finish = {
            "planes_ptr": "*u8",
            "images_of_ptr": "*i32",
            "rows_ptr": "*i32",
            **out,
            "pixels": "i32",
            **numbers,
        }
        aligned = ("planes_ptr", "out_ptr")
        cases.append(
            case(f"colour {kind}", view_color_kernel, main, ("images_ptr", *aligned), SUMS=SUMS)
        )
        cases.append(case(f"finish {kind}", finish_kernel, finish, aligned))
    return cases
