"""AdamW and the moving average in plain torch: the reference, and torch's fused op for CPUs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmoco_kernels.adamw_ema.sweep import Scalars, Sweep
from fastmoco_kernels.ema.reference import ema_update_foreach_
from fastmoco_kernels.tensors import same_layout

_FUSED_DEVICES = ("cpu", "cuda")


def adamw_ema_reference_(sweep: Sweep, scalars: Scalars) -> None:
    """Loshchilov and Hutter 2019, algorithm 2, as `torch.optim.AdamW` orders it; then the average.

    Everything in the parameter's own dtype, the gradient cast to it.
    """
    host = scalars.on_host()
    if host is None:
        return
    lr, weight_decay, beta1, beta2, eps, ema_momentum = (float(x) for x in host.numbers())
    for row, (param, exp_avg, exp_avg_sq) in enumerate(
        zip(sweep.params, sweep.exp_avgs, sweep.exp_avg_sqs, strict=True)
    ):
        grad = _unscaled(sweep.grads[row].to(param.dtype), host.grad_scale)
        sweep.steps[row].add_(1)
        step = float(sweep.steps[row])
        param.mul_(1 - lr * weight_decay)
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step))
        param.addcdiv_(exp_avg, root.add_(eps), value=-lr / (1 - beta1**step))
        average = sweep.averages[row]
        if average is not None:
            average.lerp_(param.to(average.dtype), 1 - ema_momentum)


def adamw_ema_foreach_(sweep: Sweep, scalars: Scalars) -> None:
    """The same in two passes: torch's fused AdamW and its multi-tensor lerp.

    Parameters that the fused op cannot take (gaps in memory, strides that differ from the moments',
    another device) go through the plain path.
    """
    host = scalars.on_host()
    if host is None:
        return
    fused: dict[torch.dtype, list[int]] = {}
    plain: list[int] = []
    for row, param in enumerate(sweep.params):
        moments = sweep.exp_avgs[row], sweep.exp_avg_sqs[row]
        fits = (
            param.device.type in _FUSED_DEVICES
            and same_layout(param, sweep.grads[row], *moments)
            and all(moment.dtype == param.dtype for moment in moments)
        )
        (fused.setdefault(param.dtype, []) if fits else plain).append(row)
    if plain:
        adamw_ema_reference_(sweep.pick(plain), host)
    for rows in fused.values():
        _fused_adamw_(sweep.pick(rows), host)


def _fused_adamw_(sweep: Sweep, host: Scalars) -> None:
    """torch's fused op on parameters of one dtype, then their averages."""
    lr, weight_decay, beta1, beta2, eps, ema_momentum = (float(x) for x in host.numbers())
    torch._foreach_add_(list(sweep.steps), 1)
    torch._fused_adamw_(
        list(sweep.params),
        [
            _unscaled(g.to(p.dtype), host.grad_scale)
            for p, g in zip(sweep.params, sweep.grads, strict=True)
        ],
        list(sweep.exp_avgs),
        list(sweep.exp_avg_sqs),
        [],
        list(sweep.steps),
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=None,
        found_inf=None,
    )
    averaged = [(a, p) for a, p in zip(sweep.averages, sweep.params, strict=True) if a is not None]
    ema_update_foreach_([a for a, _ in averaged], [p for _, p in averaged], ema_momentum)


def _unscaled(grad: Tensor, grad_scale: Tensor | None) -> Tensor:
    """The gradient over the loss scale; the gradient itself is never changed."""
    return grad if grad_scale is None else grad / grad_scale.reshape(()).to(grad.dtype)
