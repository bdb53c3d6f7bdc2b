"""Every configuration of the moving average."""

from __future__ import annotations

from benchmarks.aot.machine_code import AotCase
from fastmoco_kernels.ema.launch import ELEMENT, NUM_WARPS
from fastmoco_kernels.ema.triton_kernels import ema_kernel
from fastmoco_kernels.tables import CHUNK


def aot_cases() -> list[AotCase]:
    """Every configuration of the launch: one for each source type, with the momentum as a number
    and on the device.
    """
    return [
        AotCase(
            name=f"ema.ema_kernel {str(dtype).removeprefix('torch.')} sources, momentum {weight}",
            kernel=ema_kernel,
            signature={
                "pointers_ptr": "*i64",
                "sizes_ptr": "*i64",
                "chunk_rows_ptr": "*i32",
                "chunk_starts_ptr": "*i64",
                "rows": "i32",
                "weight": weight,
                "ON_DEVICE": "constexpr",
                "SOURCE": "constexpr",
                "CHUNK": "constexpr",
            },
            constexprs={"ON_DEVICE": weight != "fp32", "SOURCE": element, "CHUNK": CHUNK},
            num_warps=NUM_WARPS,
            num_stages=3,
            default_on=(80, 90, 100),
            aligned=("pointers_ptr", "sizes_ptr", "chunk_rows_ptr", "chunk_starts_ptr"),
        )
        for dtype, element in ELEMENT.items()
        for weight in ("fp32", "*fp32", "*fp64")
    ]
