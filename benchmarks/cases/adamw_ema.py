"""AdamW and momentum update: one pass against separate passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.ema import chosen_device, flat, random_tensors, sizes, vit_shapes, with_rate
from benchmarks.contest import Contender, contest, relative_error
from fastmoco_kernels.adamw_ema.op import bytes_moved
from fastmoco_kernels.adamw_ema.optimizer import AdamWEMA

NAME = "adamw_ema"
DEFAULTS = {"device": "auto", "width": 0, "depth": 12, "hidden": 0, "momentum": 0.99, "rounds": 9}
QUICK = {"width": 64, "depth": 4, "hidden": 256, "rounds": 5}

LR, WEIGHT_DECAY, BETAS, EPS = 1e-3, 0.1, (0.9, 0.999), 1e-8
LIMITS = {"param": 1e-6, "average": 1e-6}
"""float32 rounds to 6e-8; the bias correction of the first step adds a few units."""


@dataclass
class Tensors:
    """Parameters with gradients, and their averages."""

    params: list[torch.nn.Parameter]
    averages: list[Tensor]


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Measure.

    Args:
        options: `device`; `width`, `depth` and `hidden` as in the case `ema`;
            `momentum` of the average; `rounds`.

    Returns:
        The result of `contest`, the numbers of tensors and parameters, and on CUDA our GB/s.
    """
    device, momentum = chosen_device(options["device"]), options["momentum"]
    shapes = vit_shapes(*sizes(options, device))
    start = [random_tensors(shapes, seed, device) for seed in (1, 2, 3)]
    makers: dict[str, Callable[[Tensors], Callable[[], None]]] = {
        "fastmoco": lambda tensors: _ours(tensors, momentum),
        "fused_then_lerp": lambda tensors: _passes(tensors, momentum, fused=True),
        "foreach_then_lerp": lambda tensors: _passes(tensors, momentum, foreach=True),
        "tensor_by_tensor": lambda tensors: _passes(tensors, momentum, fused=False, foreach=False),
    }
    truth = _truth(start, momentum)
    contenders = [_contender(name, maker, start, truth) for name, maker in makers.items()]
    result = contest(contenders, subject="fastmoco", device=device, rounds=options["rounds"])
    elements = sum(p.numel() for p in start[0])
    moved = bytes_moved(elements, averaged=elements)
    return {"tensors": len(shapes), "parameters": elements, **with_rate(result, moved)}


def _tensors(start: Sequence[Sequence[Tensor]]) -> Tensors:
    """New tensors: parameters, averages and gradients from the three lists."""
    params = [torch.nn.Parameter(p.clone()) for p in start[0]]
    for param, grad in zip(params, start[2], strict=True):
        param.grad = grad
    return Tensors(params, [a.clone() for a in start[1]])


def _ours(tensors: Tensors, momentum: float) -> Callable[[], None]:
    """The step of `AdamWEMA`."""
    optimizer = AdamWEMA(
        tensors.params,
        lr=LR,
        betas=BETAS,
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        averages=dict(zip(tensors.params, tensors.averages, strict=True)),
    )
    return lambda: optimizer.step(ema_momentum=momentum)


def _passes(tensors: Tensors, momentum: float, **implementation: bool) -> Callable[[], None]:
    """torch.optim.AdamW, then the momentum update; one tensor after the other
    if nothing is fused.
    """
    optimizer = torch.optim.AdamW(
        tensors.params, lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, **implementation
    )
    many = any(implementation.values())
    params: list[Tensor] = [*tensors.params]

    @torch.no_grad()
    def step() -> None:
        optimizer.step()
        if many:
            torch._foreach_lerp_(tensors.averages, params, 1 - momentum)
            return
        for param, average in zip(tensors.params, tensors.averages, strict=True):
            average.copy_(average * momentum + param * (1 - momentum))

    return step


def _truth(start: Sequence[Sequence[Tensor]], momentum: float) -> dict[str, Tensor]:
    """The first step in float64: with no history m / (1 - beta1) is the
    gradient, v / (1 - beta2) its square.
    """
    params, averages, grads = (flat(tensors) for tensors in start)
    params = params * (1 - LR * WEIGHT_DECAY) - LR * grads / (grads.abs() + EPS)
    averages = momentum * averages + (1 - momentum) * params
    return {"param": params, "average": averages}


def _contender(
    name: str,
    maker: Callable[[Tensors], Callable[[], None]],
    start: Sequence[Sequence[Tensor]],
    truth: Mapping[str, Tensor],
) -> Contender:
    """A contender with its own tensors."""
    tensors = _tensors(start)

    def errors() -> Mapping[str, float]:
        fresh = _tensors(start)
        maker(fresh)()
        found: dict[str, Sequence[Tensor]] = {"param": fresh.params, "average": fresh.averages}
        return {key: relative_error(flat(values), truth[key]) for key, values in found.items()}

    return Contender(name=name, call=maker(tensors), errors=errors, limits=LIMITS)
