"""Every configuration of the Gaussian blur."""

from __future__ import annotations

from benchmarks.aot.machine_code import AotCase
from fastmoco_kernels.blur.launch import BLOCK, WARPS
from fastmoco_kernels.blur.triton_kernels import box_pass_kernel


def aot_cases() -> list[AotCase]:
    """Both axes; there is one tile."""
    pointers = {"source_ptr": "*u8", "target_ptr": "*u8", "boxes_ptr": "*i32"}
    sizes = {"channels": "i32", "height": "i32", "width": "i32"}
    constants = {"ALONG_WIDTH": "constexpr", "BLOCK": "constexpr"}
    return [
        AotCase(
            name=f"gaussian_blur.box along_width={along_width}",
            kernel=box_pass_kernel,
            signature={**pointers, **sizes, **constants},
            constexprs={"ALONG_WIDTH": along_width, "BLOCK": BLOCK},
            num_warps=WARPS,
            num_stages=3,
            default_on=(80, 90, 100),
            aligned=("source_ptr", "target_ptr", "boxes_ptr"),
        )
        for along_width in (True, False)
    ]
