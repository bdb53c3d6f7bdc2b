"""Which backend a sweep runs on."""

from __future__ import annotations

import torch

from fastmoco_kernels.adamw_ema.checks import OP
from fastmoco_kernels.adamw_ema.reference import adamw_ema_foreach_, adamw_ema_reference_
from fastmoco_kernels.adamw_ema.sweep import Scalars, Sweep
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
