"""Steps of apex's optimizers against float64, before and after their state was restored."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from benchmarks.contest import relative_error
from benchmarks.gpu.checks import Check, Place, Unavailable
from fastmoco.checkpoint import flatten_optimizer, restore_optimizer
from fastmoco.optim import build_apex
from fastmoco.optim.groups import ParameterGroup, set_learning_rates, split_groups

NUMBERS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.98), "eps": 1e-8}
SHAPES = [(1,), (1537,), (65, 1025), (384, 1536), *[(33, 7)] * 40]
"""Odd sizes, more elements than a block of apex has, more tensors than one launch."""
LIMIT = 2e-6
"""A few roundings in float32."""
Named = list[tuple[str, nn.Parameter]]


def apex_check(name: Literal["adamw", "lamb"]) -> Check:
    """One step of two groups, then two more with a new optimizer that took over the state."""

    def check(place: Place) -> dict[str, tuple[float, float]]:
        named = _parameters(place)
        exact = [(key, nn.Parameter(p.detach().double().cpu())) for key, p in named]
        truth = (torch.optim.AdamW if name == "adamw" else _Lamb)([p for _, p in exact], **NUMBERS)
        try:
            first, resumed = (build_apex(name, named, **NUMBERS) for _ in range(2))
        except ValueError as reason:
            raise Unavailable(str(reason).splitlines()[0]) from None
        for optimizer, own in ((truth, exact), (first, named), (resumed, named)):
            split_groups(optimizer, own, _group_of)

        errors = {}
        _train(truth, exact, place, range(1))
        _train(first, named, place, range(1))
        errors["one step"] = (_distance(named, exact), LIMIT)
        restore_optimizer(resumed, named, flatten_optimizer(first, named))
        _train(truth, exact, place, range(1, 3))
        _train(resumed, named, place, range(1, 3))
        errors["resumed"] = (_distance(named, exact), LIMIT)
        return errors

    return check


def _parameters(place: Place) -> Named:
    tensors = (place.random(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(SHAPES))
    return [(str(i), nn.Parameter(tensor)) for i, tensor in enumerate(tensors)]


def _group_of(name: str, parameter: nn.Parameter) -> ParameterGroup:
    """Vectors have no decay and half the learning rate."""
    plain = parameter.dim() < 2
    return ParameterGroup(lr_scale=0.5, weight_decay_scale=0.0) if plain else ParameterGroup()


def _train(optimizer: torch.optim.Optimizer, named: Named, place: Place, steps: range) -> None:
    set_learning_rates(optimizer.param_groups, NUMBERS["lr"], peak=NUMBERS["lr"])
    for step in steps:
        for i, (_, parameter) in enumerate(named, 1):
            grad = place.random(*parameter.shape, seed=1000 * i + step, dtype=torch.float32)
            parameter.grad = grad.to(parameter)
        optimizer.step()


def _distance(named: Named, exact: Named) -> float:
    return max(relative_error(p, truth) for (_, p), (_, truth) in zip(named, exact, strict=True))


class _Lamb(torch.optim.Optimizer):
    """The formula of apex: Adam's update and the decay, in a step as long as the trust ratio times
    itself; without a decay the ratio is 1.
    """

    def __init__(self, params: list[nn.Parameter], **numbers: Any) -> None:
        super().__init__(params, numbers)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            (beta1, beta2), decay = group["betas"], group["weight_decay"]
            for p in group["params"]:
                state = self.state[p]
                step = state["step"] = state.get("step", 0) + 1
                m = state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * p.grad
                v = state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * p.grad**2
                mean, square = m / (1 - beta1**step), v / (1 - beta2**step)
                update = mean / (square.sqrt() + group["eps"]) + decay * p
                ratio = p.norm() / update.norm() if decay else 1.0
                p -= group["lr"] * ratio * update
