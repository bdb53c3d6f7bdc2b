"""AdamW and the momentum encoder's moving average in one sweep over memory.

After a backward pass, two things read and write every parameter: AdamW (28 bytes: reads p, g, m, v;
writes p, m, v) and the moving average (12: reads p and a; writes a). One sweep holds p in registers
between them: 20 bytes read, 16 written, 36 instead of 40, and two launches instead of hundreds.

The first launch is tiny. It reads `found_inf`, counts each parameter's step on the device, and
works out the bias corrections in float64; so the step can be captured in a CUDA graph and nothing
is ever read back. The second walks a table of addresses (`tables.py`). The moving average takes
the *updated* parameter, in the lerp form of `ema_update_`: what equals its average stays equal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoco_kernels.adamw_ema.dispatch import chosen_backend, dispatch_sweep, run_sweep
from fastmoco_kernels.adamw_ema.sweep import OP, Number, Scalars, Sweep, check_scalars, check_sweep
from fastmoco_kernels.tensors import local, traced


@torch.no_grad()
def adamw_ema_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: Number,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 1e-2,
    averages: Sequence[Tensor | None] | None = None,
    ema_momentum: Number | None = None,
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019, algorithm 2) and of the averages, in place.

    ::

        t += 1;  p *= 1 - lr * weight_decay
        m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g * g
        p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
        a += (1 - ema_momentum) * (p - a)

    Args:
        params: float32 or float64, any shape, one device; changed. Of a DTensor, in any list, the
            local shard is used.
        grads: any floating-point dtype, of their parameters' shapes; read only.
        exp_avgs: m, float32 or float64; changed.
        exp_avg_sqs: v, float32 or float64; changed.
        steps: t, one float32 element for each parameter, on its device, no two sharing memory;
            changed.
        lr: learning rate, as all numbers here a Python number or a tensor of one element on the
            device, whose value is neither read back nor checked. A CUDA graph keeps numbers and
            follows tensors.
        betas: beta1 and beta2, in [0, 1).
        eps: 0 or more.
        weight_decay: decoupled, per unit of learning rate.
        averages: a, float32 or float64; None for a parameter without one (a predictor); changed.
        ema_momentum: in [0, 1]; needed with `averages`.
        found_inf: one element; not 0, or NaN: nothing changes, the steps neither.
        grad_scale: one element; gradients are divided by it as they are read, and are not changed.
        backend: `"auto"` (triton on CUDA, foreach elsewhere), `"triton"`, `"foreach"` or
            `"reference"`.

    Raises:
        ValueError: for counts, shapes, devices, dtypes or numbers that do not fit, naming both.

    Numerics: float32 parameters in float32, bias corrections in float64; equal to
        `torch.optim.AdamW` to a few units in the last place; bitwise reproducible. Autocast changes
        nothing.
    Memory and cost: `bytes_moved`, 36 a parameter with an average; `flops`; 8 bytes of scratch a
        tensor. Under triton, parameters with gaps in memory, with strides unlike their gradient's,
        or in float64 take the foreach path. That path and the reference read `found_inf` and tensor
        numbers on the host, which waits for the device.
    Distributed: none; every shard is updated on its rank.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import adamw_ema_step_
        >>> p, g, m, v, t, a = (torch.full((1,), x) for x in (1.0, 1.0, 0.0, 0.0, 0.0, 1.0))
        >>> adamw_ema_step_(
        ...     [p], [g], [m], [v], [t], lr=0.5, weight_decay=0.0, averages=[a], ema_momentum=0.5
        ... )
        >>> p, a
        (tensor([0.5000]), tensor([0.7500]))
    """
    if averages is not None and ema_momentum is None:
        raise ValueError(f"{OP}: {len(averages)} averages but ema_momentum=None")
    kept = 1.0 if ema_momentum is None else ema_momentum
    sweep = _local_sweep(params, grads, exp_avgs, exp_avg_sqs, steps, averages)
    scalars = Scalars(lr, weight_decay, *betas, eps, kept, found_inf, grad_scale)
    check_sweep(sweep)
    if sweep.params:
        check_scalars(scalars, sweep.params[0].device)
        chosen = chosen_backend(backend, sweep.params[0].device)
        (dispatch_sweep if traced() else run_sweep)(sweep, scalars, chosen)


def bytes_moved(params: int, *, grad_bytes: int = 4, averaged: int = 0) -> int:
    """Bytes that one sweep reads and writes.

    Args:
        params: elements of all parameters.
        grad_bytes: of one gradient element.
        averaged: elements that have a moving average.
    """
    return params * (24 + grad_bytes) + averaged * 8


def flops(params: int, *, averaged: int = 0) -> int:
    """Arithmetic of one sweep, a square root and a division counted as one each."""
    return 15 * params + 3 * averaged


def _local_sweep(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    averages: Sequence[Tensor | None] | None,
) -> Sweep:
    """Local shards of everything; a list of None where no averages were given."""
    given = [None] * len(params) if averages is None else averages
    return Sweep(
        params=local(params),
        grads=local(grads),
        exp_avgs=local(exp_avgs),
        exp_avg_sqs=local(exp_avg_sqs),
        steps=local(steps),
        averages=[None if tensor is None else local([tensor])[0] for tensor in given],
    )
