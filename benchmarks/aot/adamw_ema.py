"""Every configuration of the two kernels of AdamW with the moving average."""

from __future__ import annotations

import itertools

from benchmarks.aot.machine_code import AotCase
from fastmoco_kernels.adamw_ema.launch import CHUNK, GRADS, NUM_WARPS, ROW_WARPS, ROWS
from fastmoco_kernels.adamw_ema.triton_kernels import (
    adamw_ema_prepare_kernel,
    adamw_ema_sweep_kernel,
)


def aot_cases() -> list[AotCase]:
    """Every configuration of both launches."""
    table = {
        "pointers_ptr": "*i64",
        "sizes_ptr": "*i64",
        "chunk_rows_ptr": "*i32",
        "chunk_starts_ptr": "*i64",
    }
    numbers = (
        "lr",
        "weight_decay",
        "one_minus_beta1",
        "one_minus_beta2",
        "eps",
        "one_minus_momentum",
    )
    flags = ("ON_DEVICE", "HAS_FOUND_INF", "HAS_GRAD_SCALE")
    scratch = {"shared_ptr": "*fp32", "per_row_ptr": "*fp32", "rows": "i32"}
    cases = [
        AotCase(
            name=f"adamw_ema.adamw_ema_sweep_kernel {grad} gradients",
            kernel=adamw_ema_sweep_kernel,
            signature={**table, **scratch, **dict.fromkeys(("GRAD", "CHUNK"), "constexpr")},
            constexprs={"GRAD": grad, "CHUNK": CHUNK},
            num_warps=NUM_WARPS,
            num_stages=3,
            default_on=(80, 90, 100),
            aligned=(*table, "shared_ptr", "per_row_ptr"),
        )
        for grad in GRADS.values()
    ]
    for chosen in itertools.product((False, True), repeat=len(flags)):
        pointers = {
            "scalars_ptr": "*fp64" if chosen[0] else "*fp32",
            "found_inf_ptr": "*fp32",
            "grad_scale_ptr": "*fp32",
        }
        cases.append(
            AotCase(
                name="adamw_ema.adamw_ema_prepare_kernel "
                + " ".join(f"{f}={int(c)}" for f, c in zip(flags, chosen, strict=True)),
                kernel=adamw_ema_prepare_kernel,
                signature={
                    "pointers_ptr": "*i64",
                    **scratch,
                    **dict.fromkeys(numbers, "fp32"),
                    **pointers,
                    **dict.fromkeys((*flags, "ROWS"), "constexpr"),
                },
                constexprs={**dict(zip(flags, chosen, strict=True)), "ROWS": ROWS},
                num_warps=ROW_WARPS,
                num_stages=3,
                default_on=(80, 90, 100),
                aligned=("pointers_ptr", "shared_ptr", "per_row_ptr", *pointers),
            )
        )
    return cases
