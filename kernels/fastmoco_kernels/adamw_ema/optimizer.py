"""`adamw_ema_step_` as an optimizer whose state is interchangeable with torch.optim.AdamW's.

Shards are unwrapped, tensors checked and sorted into launches once, in a plan. A plan holds while
the same parameters and state have the same types and layouts, gradients too; addresses may change
from step to step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from fastmoco_kernels.adamw_ema.dispatch import chosen_backend
from fastmoco_kernels.adamw_ema.plan import Plan
from fastmoco_kernels.adamw_ema.sweep import Number, Scalars, check_scalars
from fastmoco_kernels.eager_optimizer import EagerOptimizer
from fastmoco_kernels.tensors import local

_FIXED = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": True,
    "decoupled_weight_decay": True,
}
"""Options under which torch.optim.AdamW reads our state: like its fused form we keep `step` on the
device.
"""


class AdamWEMA(EagerOptimizer):
    """AdamW that moves the momentum encoder in the same sweep.

    Args:
        params: as any torch optimizer takes them, with or without names and groups; float32 or
            float64; DTensors (FSDP2) are updated shard by shard.
        lr: learning rate of groups without one. Like the other numbers of a group it may be a
            tensor of one element on the parameters' device, which a CUDA graph then follows.
        betas: of groups without them, as the next two.
        eps: added to the root of the squared gradient.
        weight_decay: decoupled, per unit of learning rate.
        averages: moving average by parameter, float32 or float64, of its shape (and placement, for
            DTensors); a parameter without one is updated alone. The caller owns and saves them.
        backend: see `adamw_ema_step_`.

    Raises:
        ValueError: for numbers out of range, unknown parameters in a mapping, or tensors that do
            not fit.

    State: `step`, `exp_avg`, `exp_avg_sq` by parameter, in the format of torch.optim.AdamW; its
        state loads here and ours there. Averages are not part of it.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import AdamWEMA
        >>> weight, average = torch.nn.Parameter(torch.ones(2)), torch.ones(2)
        >>> optimizer = AdamWEMA([weight], lr=0.5, weight_decay=0.0, averages={weight: average})
        >>> weight.sum().backward(); optimizer.step(ema_momentum=0.5)
        >>> weight.detach(), average
        (tensor([0.5000, 0.5000]), tensor([0.7500, 0.7500]))
    """

    _step_supports_amp_scaling = (
        True  # torch.amp.GradScaler then leaves grad_scale and found_inf on the optimizer
    )

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: Number = 1e-8,
        weight_decay: Number = 1e-2,
        averages: Mapping[Tensor, Tensor] | None = None,
        backend: str = "auto",
    ) -> None:
        self.backend = backend
        self._plans: dict[int, Plan] = {}
        self._seen: tuple[list[Tensor], list[object]] = ([], [])
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **_FIXED}
        )
        known = {id(p) for group in self.param_groups for p in group["params"]}
        self.averages = _known(averages, known, "averages")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, as in every torch optimizer.

        Raises:
            ValueError: for numbers out of range.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"][:1]:  # a group may be empty
            check_scalars(_scalars(group, 1.0), param.device)
        self._plans.clear()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the state of torch's optimizers, the backend and the averages."""
        return {**super().__getstate__(), "backend": self.backend, "averages": self.averages}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After loading: reset options that only torch.optim.AdamW has and move step counters.

        Raises:
            ValueError: for a state with options that this optimizer does not have.
        """
        super().__setstate__(state)
        self._plans = {}
        self._seen = ([], [])
        for group in self.param_groups:
            for name in ("amsgrad", "maximize"):
                if group.get(name):
                    raise ValueError(
                        f"AdamWEMA: the state has {name}=True; here it is always False"
                    )
            group.update(_FIXED)
            for param in group["params"]:
                own = self.state.get(param)
                if own:
                    own["step"] = torch.as_tensor(
                        own["step"], dtype=torch.float32, device=param.device
                    )

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        ema_momentum: Number | None = None,
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
    ) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss again, with gradients, and returns it.
            ema_momentum: share that the averages keep, in [0, 1]; None leaves the averages
                unchanged.
            found_inf: one element on the device; not 0: nothing changes.
            grad_scale: one element on the device; gradients are divided by it.

        Returns:
            What `closure` returned, or None.

        Raises:
            ValueError: for tensors or numbers that do not fit together.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None) if found_inf is None else found_inf
        grad_scale = getattr(self, "grad_scale", None) if grad_scale is None else grad_scale
        if not self._state_is_seen():
            self._plans.clear()
        for index, group in enumerate(self.param_groups):
            params, grads = (
                group["params"],
                [grad for p in group["params"] if (grad := p.grad) is not None],
            )
            if len(grads) < len(params):
                params = [p for p in params if p.grad is not None]
            if params:
                scalars = _scalars(
                    group, 1.0 if ema_momentum is None else ema_momentum, found_inf, grad_scale
                )
                check_scalars(scalars, params[0].device)
                self._step_group(index, params, grads, ema_momentum is not None, scalars)
        if not self._state_is_seen():
            self._seen = (list(self.state), list(self.state.values()))
        return loss

    def _state_is_seen(self) -> bool:
        """Whether every parameter still has its state dictionary of the last step.

        Looking them up by parameter would take ten times as long.
        """
        parameters, states = self._seen
        return (
            len(parameters) == len(self.state)
            and all(map(operator.is_, self.state, parameters))
            and all(map(operator.is_, self.state.values(), states))
        )

    def _step_group(
        self,
        index: int,
        params: list[Tensor],
        grads: list[Tensor],
        averaged: bool,
        scalars: Scalars,
    ) -> None:
        """Run the group's plan; make a new one where it does not hold."""
        plan = self._plans.get(index)
        mine = None if plan is None else plan.matching_grads(params, grads, averaged)
        if plan is None or mine is None:
            for param in params:
                if not self.state[param]:
                    self.state[param]["step"] = torch.zeros(
                        (), dtype=torch.float32, device=param.device
                    )
                    self.state[param]["exp_avg"] = torch.zeros_like(
                        param, memory_format=torch.preserve_format
                    )
                    self.state[param]["exp_avg_sq"] = torch.zeros_like(
                        param, memory_format=torch.preserve_format
                    )
            states = [self.state[param] for param in params]
            backend = chosen_backend(self.backend, params[0].device)
            averages = self.averages if averaged else None
            plan = Plan(params, states, averages, backend)
            self._plans[index], mine = plan, local(grads)
        plan.run(mine, scalars)


def _scalars(
    group: Mapping[str, Any],
    ema_momentum: Number,
    found_inf: Tensor | None = None,
    grad_scale: Tensor | None = None,
) -> Scalars:
    """The numbers of a group and of a step."""
    lr, weight_decay, eps = group["lr"], group["weight_decay"], group["eps"]
    beta1, beta2 = group["betas"]
    return Scalars(lr, weight_decay, beta1, beta2, eps, ema_momentum, found_inf, grad_scale)


def _known(
    given: Mapping[Tensor, Tensor] | None, known: set[int], name: str
) -> dict[Tensor, Tensor]:
    """A checked copy of the mapping: keys are parameters, values have their shapes."""
    for i, (param, tensor) in enumerate((given or {}).items()):
        if id(param) not in known:
            raise ValueError(
                f"AdamWEMA: key {i} of {name}, {tuple(param.shape)}, "
                f"is none of the {len(known)} parameters"
            )
        if tensor.shape != param.shape:
            raise ValueError(
                f"AdamWEMA: {name} has {tuple(tensor.shape)} for a parameter of "
                f"{tuple(param.shape)}"
            )
    return dict(given or {})
