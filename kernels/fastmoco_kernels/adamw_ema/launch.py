"""The two launches of a sweep, and which parameters can share one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmoco_kernels.adamw_ema.sweep import Scalars, Sweep
from fastmoco_kernels.adamw_ema.triton_kernels import (
    adamw_ema_prepare_kernel,
    adamw_ema_sweep_kernel,
)
from fastmoco_kernels.backends import device_guard
from fastmoco_kernels.tables import PointerTable, pointer_table
from fastmoco_kernels.tensors import same_layout

CHUNK, NUM_WARPS = 1024, 4
"""8 elements a thread and array: about 80 registers, so an SM runs six programs with 20 KiB in
flight each.
"""
ROWS, ROW_WARPS = 128, 4

GRADS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_SHARED = 8


@dataclass
class Launch:
    """Parameters of one launch: their indexes in the whole sweep, tensors, and the gradients' type.

    The first run makes `table`, the addresses, and `visible`, the tensors that autograd may have
    saved.
    """

    rows: list[int]
    sweep: Sweep
    grad: torch.dtype
    table: PointerTable | None = None
    visible: list[Tensor] = field(default_factory=list)


def plan_launches(sweep: Sweep) -> tuple[list[Launch], list[int]]:
    """Sort parameters into launches, by the type of the gradient.

    Returns:
        The launches, one in all but odd cases, and the parameters that the kernels do not take:
        state that is not float32, or tensors of one parameter whose memory layouts differ.
    """
    launches: dict[torch.dtype, list[int]] = {}
    rest = []
    for row, tensors in enumerate(zip(*sweep.columns(), strict=True)):
        param, grad, exp_avg, exp_avg_sq, average = tensors
        wide = [t for t in (param, exp_avg, exp_avg_sq, average, sweep.steps[row]) if t is not None]
        fits = (
            all(t.dtype == torch.float32 for t in wide)
            and grad is not None
            and grad.dtype in GRADS
            and same_layout(*tensors)
        )
        if fits and grad is not None:
            launches.setdefault(grad.dtype, []).append(row)
        else:
            rest.append(row)
    return [Launch(rows, sweep.pick(rows), grad) for grad, rows in launches.items()], rest


def sweep_triton_(launch: Launch, grads: Sequence[Tensor], scalars: Scalars) -> None:
    """Run one launch of a plan.

    Args:
        launch: from `plan_launches`.
        grads: gradients of its parameters, of the type and layouts that were planned for.
        scalars: see `Scalars`.
    """
    sweep = launch.sweep
    with device_guard(sweep.params[0]):
        columns = sweep.columns()
        columns[1] = grads
        if launch.table is None:
            launch.table = pointer_table("adamw_ema_step_", columns, [sweep.steps], chunk=CHUNK)
            launch.visible = [
                tensor for tensor in (*sweep.params, *sweep.averages) if tensor is not None
            ]
        else:
            launch.table.refresh(columns, [sweep.steps])
        table = launch.table

        # Scalars of the whole sweep, then two numbers a tensor; the first launch fills them.
        scratch = torch.empty(_SHARED + 2 * table.rows, dtype=torch.float32, device=table.device)
        per_row = scratch[_SHARED:]
        numbers, on_device = _numbers(scalars, scratch)
        adamw_ema_prepare_kernel[(triton.cdiv(table.rows, ROWS),)](
            table.pointers,
            scratch,
            per_row,
            table.rows,
            *numbers,
            scratch if scalars.found_inf is None else scalars.found_inf,
            scratch if scalars.grad_scale is None else scalars.grad_scale,
            ON_DEVICE=on_device,
            HAS_FOUND_INF=scalars.found_inf is not None,
            HAS_GRAD_SCALE=scalars.grad_scale is not None,
            ROWS=ROWS,
            num_warps=ROW_WARPS,
        )

        # The sweep itself; with empty tensors alone there is nothing to launch.
        if table.chunks:
            adamw_ema_sweep_kernel[(table.chunks,)](
                table.pointers,
                table.sizes,
                table.chunk_rows,
                table.chunk_starts,
                scratch,
                per_row,
                table.rows,
                GRAD=GRADS[launch.grad],
                CHUNK=table.chunk,
                num_warps=NUM_WARPS,
            )

    torch.autograd.graph.increment_version(launch.visible)


def _numbers(scalars: Scalars, unused: Tensor) -> tuple[list[float | Tensor], bool]:
    """Arguments `lr` to `scalars_ptr` of the first kernel; whether they are read on the device.

    With any tensor among them all six go to the device, each by a small copy or fill that a CUDA
    graph records.
    """
    given = scalars.numbers()
    if any(isinstance(x, Tensor) for x in given):
        packed = torch.empty(len(given), dtype=torch.float64, device=unused.device)
        for slot, x in zip(packed, given, strict=True):
            slot.copy_(x.reshape(())) if isinstance(x, Tensor) else slot.fill_(x)
        return [*([0.0] * len(given)), packed], True
    lr, weight_decay, beta1, beta2, eps, ema_momentum = (float(x) for x in given)
    return [lr, weight_decay, 1 - beta1, 1 - beta2, eps, 1 - ema_momentum, unused], False
