"""Schedules of MoCo v3, and LARS as its ResNets use it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def learning_rate(epoch: float, *, peak: float, epochs: float, warmup: float) -> float:
    """Linear warm-up from 0, then half a cosine to 0; `epoch` is fractional."""
    if epoch < warmup:
        return peak * epoch / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def ema_momentum(epoch: float, *, start: float, epochs: float, cosine: bool) -> float:
    """From `start` to 1 along half a cosine, or constant."""
    if not cosine:
        return start
    return 1 - 0.5 * (1 + math.cos(math.pi * epoch / epochs)) * (1 - start)


class LARS(torch.optim.Optimizer):
    """Layer-wise rates: the gradient of a matrix is scaled to a share of the weights' norm.

    Biases and norms, which have one dimension, get neither decay nor scaling.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float,
        trust_coefficient: float,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                grad = p.grad
                if p.ndim > 1:
                    grad = grad.add(p, alpha=group["weight_decay"])
                    weights, update = p.norm(), grad.norm()
                    trusted = group["trust_coefficient"] * weights / update
                    grad = grad * torch.where((weights > 0) & (update > 0), trusted, 1.0)
                state = self.state[p]
                if "mu" not in state:
                    state["mu"] = torch.zeros_like(p)
                state["mu"].mul_(group["momentum"]).add_(grad)
                p.add_(state["mu"], alpha=-group["lr"])
