"""The sweep as an op of torch.library."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco_kernels.adamw_ema.run import run_sweep
from fastmoco_kernels.adamw_ema.sweep import Number, Scalars, Sweep


@torch.library.custom_op(
    "fastmoco::adamw_ema_step_",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "steps", "averages", "param_copies", "average_copies"),
)
def _adamw_ema_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    averages: list[Tensor],
    param_copies: list[Tensor],
    average_copies: list[Tensor],
    rows: list[int],
    numbers: list[float],
    tensors: list[Tensor],
    slots: list[int],
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    backend: str,
) -> None:
    """The registered form. Lists with gaps come without them: `rows` holds, for averages, param_copies and average_copies
    in turn, the place of each parameter's tensor or -1. `tensors` stand in `numbers` at `slots`.
    """
    count = len(params)
    values: list[Number] = list(numbers)
    for slot, tensor in zip(slots, tensors, strict=True):
        values[slot] = tensor
    sparse = [
        [None if place < 0 else given[place] for place in rows[i * count : (i + 1) * count]]
        for i, given in enumerate((averages, param_copies, average_copies))
    ]
    sweep = Sweep(
        params=params,
        grads=grads,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        steps=steps,
        averages=sparse[0],
        param_copies=sparse[1],
        average_copies=sparse[2],
    )
    run_sweep(sweep, Scalars.of(values, found_inf, grad_scale), backend)


@_adamw_ema_step.register_fake
def _(*arguments: object) -> None:
    return None


def dispatch_sweep(sweep: Sweep, scalars: Scalars, backend: str) -> None:
    """One step through the registered op: for torch.compile, fake tensors and whatever else watches torch calls."""
    rows: list[int] = []
    given: list[list[Tensor]] = []
    for column in (sweep.averages, sweep.param_copies, sweep.average_copies):
        present = [tensor for tensor in column if tensor is not None]
        places = iter(range(len(present)))
        rows += [-1 if tensor is None else next(places) for tensor in column]
        given.append(present)
    numbers = scalars.numbers()
    slots = [i for i, x in enumerate(numbers) if isinstance(x, Tensor)]
    torch.ops.fastmoco.adamw_ema_step_(
        sweep.params,
        sweep.grads,
        sweep.exp_avgs,
        sweep.exp_avg_sqs,
        sweep.steps,
        *given,
        rows,
        [0.0 if isinstance(x, Tensor) else float(x) for x in numbers],
        [x for x in numbers if isinstance(x, Tensor)],
        slots,
        scalars.found_inf,
        scalars.grad_scale,
        backend,
    )
