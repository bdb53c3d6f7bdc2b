"""AdamW and momentum update: one pass against separate passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.ema import SHAPES, random_tensors, vit_shapes
from benchmarks.contest import Contender, Results, Task, Work, flat
from fastmoco.optim.apex import build_apex, require_apex
from fastmoco_kernels.adamw_ema.op import bytes_moved
from fastmoco_kernels.adamw_ema.optimizer import AdamWEMA

__all__ = ["DEFAULTS", "NAME", "QUICK", "SHAPES", "tasks"]

NAME = "adamw_ema"
DEFAULTS = {"width": 0, "depth": 12, "hidden": 0, "momentum": 0.99, "rounds": 9}
"""`width`, `depth` and `hidden` as in the case `ema`; `momentum` of the average."""
QUICK = {"width": 64, "depth": 4, "hidden": 256, "rounds": 5}
LR, WEIGHT_DECAY, BETAS, EPS = 1e-3, 0.1, (0.9, 0.999), 1e-8
LIMITS = {"param": 1e-6, "average": 1e-6}
"""float32 rounds to 6e-8; the bias correction of the first step adds a few units."""
Start = Sequence[Sequence[Tensor]]
"""Parameters, averages and gradients."""
Step = Callable[[list[torch.nn.Parameter], list[Tensor], float], Callable[[], object]]
"""Makes a step of some parameters, which have gradients, and of their averages."""


def tasks(options: dict[str, Any], device: torch.device) -> Task:
    """One step of all parameters, and of their averages."""
    shapes, momentum = vit_shapes(options), options["momentum"]
    steps: dict[str, Step] = {
        "fastmoco": _ours,
        "fused_then_lerp": partial(_passes, fused=True),
        "foreach_then_lerp": partial(_passes, foreach=True),
        "tensor_by_tensor": partial(_passes, fused=False, foreach=False),
    }
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    return Task(
        inputs=lambda seed: tuple(random_tensors(shapes, 3 * seed + i, device) for i in (1, 2, 3)),
        truth=partial(_truth, momentum=momentum),
        contenders=[
            Contender(name=name, open=partial(_open, step, momentum=momentum))
            for name, step in steps.items()
        ]
        + [
            Contender(
                name="apex_then_lerp",
                open=partial(_open, _apex, momentum=momentum),
                skipped=_no_apex(device),
            )
        ],
        subject="fastmoco",
        limits=LIMITS,
        work=Work(bytes=bytes_moved(elements, averaged=elements)),
        about={"tensors": len(shapes), "parameters": elements},
    )


def _open(step: Step, start: Start, *, momentum: float) -> Callable[[], Results]:
    """A call on copies of the parameters and averages."""
    params, averages = [torch.nn.Parameter(p.clone()) for p in start[0]], [*map(_clone, start[1])]
    for param, grad in zip(params, start[2], strict=True):
        param.grad = grad
    taken = step(params, averages, momentum)

    def call() -> Results:
        taken()
        return {"param": params, "average": averages}

    return call


def _clone(tensor: Tensor) -> Tensor:
    return tensor.clone()


def _ours(
    params: list[torch.nn.Parameter], averages: list[Tensor], momentum: float
) -> Callable[[], object]:
    """The step of `AdamWEMA`."""
    optimizer = AdamWEMA(
        params,
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        averages=dict(zip(params, averages, strict=True)),
    )
    return lambda: optimizer.step(ema_momentum=momentum)


def _passes(
    params: list[torch.nn.Parameter],
    averages: list[Tensor],
    momentum: float,
    **implementation: bool,
) -> Callable[[], object]:
    """torch.optim.AdamW, then the momentum update; one tensor after the other
    if nothing is fused.
    """
    optimizer = torch.optim.AdamW(
        params, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, **implementation
    )
    many = any(implementation.values())
    sources: list[Tensor] = [*params]

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        if many:
            torch._foreach_lerp_(averages, sources, 1 - momentum)
            return
        for param, average in zip(params, averages, strict=True):
            average.copy_(average * momentum + param * (1 - momentum))

    return step


def _apex(
    params: list[torch.nn.Parameter], averages: list[Tensor], momentum: float
) -> Callable[[], object]:
    """apex's FusedAdam, then the momentum update."""
    named = [(str(i), param) for i, param in enumerate(params)]
    optimizer = build_apex("adamw", named, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    sources: list[Tensor] = [*params]

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        torch._foreach_lerp_(averages, sources, 1 - momentum)

    return step


def _no_apex(device: torch.device) -> str:
    """Why apex does not run on a device; "" if it does."""
    if device.type != "cuda":
        return "needs a CUDA device"
    try:
        require_apex()
    except ValueError as reason:
        return str(reason).splitlines()[0]
    return ""


def _truth(start: Start, *, momentum: float) -> Results:
    """The first step in float64: with no history m / (1 - beta1) is the
    gradient, v / (1 - beta2) its square.
    """
    params, averages, grads = (flat(tensors) for tensors in start)
    params = params * (1 - LR * WEIGHT_DECAY) - LR * grads / (grads.abs() + EPS)
    return {"param": params, "average": momentum * averages + (1 - momentum) * params}
