"""The configuration of the sum over rows, for each op that takes it."""

from __future__ import annotations

from typing import Any

from benchmarks.aot.machine_code import AotCase
from fastmoco_kernels.column_sums.launch import COLS, ROWS, WARPS
from fastmoco_kernels.column_sums.triton_kernels import column_sum_kernel


def column_sum_case(op: str, E: int, bias: str) -> AotCase:
    """One configuration to compile ahead."""
    constants: dict[str, Any] = {"E": E, "COLS": COLS, "ROWS": ROWS}
    return AotCase(
        name=f"{op}.sum {bias} E={E}",
        kernel=column_sum_kernel,
        signature={"partial_ptr": "*fp32", "sum_ptr": f"*{bias}", "programs": "i32"}
        | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        num_warps=WARPS,
        num_stages=3,
        default_on=(80, 90, 100),
        aligned=("partial_ptr", "sum_ptr"),
        quick=bias == "fp32",
    )
