"""Which backend a sweep runs on, and the sweep as an op of torch.library."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco_kernels.adamw_ema.reference import adamw_ema_foreach_, adamw_ema_reference_
from fastmoco_kernels.adamw_ema.sweep import OP, Number, Scalars, Sweep
from fastmoco_kernels.backends import choose_backend, require_triton, triton_is_default

BACKENDS = ("triton", "foreach", "reference")


def chosen_backend(requested: str, device: torch.device) -> str:
    """The backend for parameters on a device.

    Raises:
        ValueError: for an unknown name, or triton where it cannot run.
    """
    default = "triton" if triton_is_default(device) else "foreach"
    chosen = choose_backend(OP, requested, default, BACKENDS)
    if chosen == "triton":
        require_triton(OP, device)
    return chosen


def run_sweep(sweep: Sweep, scalars: Scalars, backend: str) -> None:
    """One step by a named backend, its arguments checked."""
    if backend == "reference":
        adamw_ema_reference_(sweep, scalars)
    elif backend == "foreach":
        adamw_ema_foreach_(sweep, scalars)
    else:
        from fastmoco_kernels.adamw_ema.launch import plan_launches, sweep_triton_

        launches, rest = plan_launches(sweep)
        if rest:
            adamw_ema_foreach_(sweep.pick(rest), scalars)
        for launch in launches:
            sweep_triton_(launch, launch.sweep.grads, scalars)


@torch.library.custom_op(
    "fastmoco::adamw_ema_step_",
    mutates_args=("params", "exp_avgs", "exp_avg_sqs", "steps", "averages"),
)
def _adamw_ema_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    averages: list[Tensor],
    rows: list[int],
    numbers: list[float],
    tensors: list[Tensor],
    slots: list[int],
    found_inf: Tensor | None,
    grad_scale: Tensor | None,
    backend: str,
) -> None:
    """The registered form.

    Lists have no None: `averages` holds those that exist, `rows` the index of each parameter's
    average or -1. `tensors` replace the entries `slots` of `numbers`.
    """
    values: list[Number] = list(numbers)
    for slot, tensor in zip(slots, tensors, strict=True):
        values[slot] = tensor
    sweep = Sweep(
        params=params,
        grads=grads,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        steps=steps,
        averages=[None if place < 0 else averages[place] for place in rows],
    )
    run_sweep(sweep, Scalars.of(values, found_inf, grad_scale), backend)


@_adamw_ema_step.register_fake
def _(*arguments: object) -> None:
    return None


def dispatch_sweep(sweep: Sweep, scalars: Scalars, backend: str) -> None:
    """One step through the registered op, for torch.compile, fake tensors and other modes."""
    averages = [tensor for tensor in sweep.averages if tensor is not None]
    places = iter(range(len(averages)))
    rows = [-1 if tensor is None else next(places) for tensor in sweep.averages]
    numbers = scalars.numbers()
    slots = [i for i, x in enumerate(numbers) if isinstance(x, Tensor)]
    torch.ops.fastmoco.adamw_ema_step_(
        sweep.params,
        sweep.grads,
        sweep.exp_avgs,
        sweep.exp_avg_sqs,
        sweep.steps,
        averages,
        rows,
        [0.0 if isinstance(x, Tensor) else float(x) for x in numbers],
        [x for x in numbers if isinstance(x, Tensor)],
        slots,
        scalars.found_inf,
        scalars.grad_scale,
        backend,
    )
