"""LARS as a `torch.optim.Optimizer`, right on whole tensors and on FSDP2's shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmoco_kernels.eager_optimizer import EagerOptimizer
from fastmoco_kernels.lars.op import (
    BACKENDS,
    by_dimensions,
    check_numbers,
    check_tensors,
    lars_squares,
    lars_update_,
    resolve_backend,
)
from fastmoco_kernels.tensors import local, sums_over_shards


class _Part(NamedTuple):
    """Parameters of one group, device and dtype, with what the op takes of them: local memory."""

    group: dict[str, Any]
    parameters: list[Tensor]
    locals: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor]
    adapt: list[bool]
    backend: str


class LARS(EagerOptimizer):
    """Layer-wise adaptive rate scaling (You, Gitman, Ginsburg 2017), as MoCo v3 trains ResNets.

    The equation is documented at `lars_step_`. Parameters without a gradient are left alone.

    Args:
        params: parameters, named parameters or groups, of float32 or float64; plain tensors or
            DTensors. One trust ratio belongs to each whole tensor, whatever its sharding.
        lr: learning rate, a number or a 0-dimensional tensor; each group may have its own of all
            these.
        momentum: of the buffer, in [0, 1).
        weight_decay: added to the gradient of tensors that are adapted.
        trust_coefficient: length of a step relative to the tensor's, before `lr`.
        lr_in_buffer: whether the rate is a factor of what the buffer accumulates, as in SimCLR.
        adapt: whether tensors are decayed and scaled; None: those of two or more dimensions. A
            group may say True or False for all of its own.
        backend: `"auto"`, `"triton"` or `"foreach"`.

    Raises:
        ValueError: for numbers out of range, an unknown backend, and at a step for tensors that do
            not fit, as `lars_step_`.

    State: `momentum_buffer` of each parameter, as `torch.optim.SGD` calls it; a DTensor where the
        parameter is one.
    Numerics: as `lars_step_`; shards give the whole tensor's step to rounding. Bitwise reproducible
        on one layout.
    Memory and cost: one buffer a parameter; 28 bytes moved a float32 parameter and step.
    Distributed: one all-reduce of 16 bytes a tensor a step where parameters are sharded over one
        mesh dimension; one for each (mesh, sharded dimensions) among them beyond that. Replicated
        dimensions (HSDP) take no part. All ranks must step together, with gradients of the same
        parameters and the same `found_inf`.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import LARS
        >>> layer = torch.nn.Linear(3, 2)
        >>> optimizer = LARS(layer.parameters(), lr=0.1, weight_decay=1e-6)
        >>> layer(torch.ones(4, 3)).sum().backward(); optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[dict[str, Any]],
        *,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        lr_in_buffer: bool = False,
        adapt: bool | None = None,
        backend: str = "auto",
    ) -> None:
        check_numbers(lr, momentum, weight_decay, trust_coefficient)
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"LARS: backend={backend!r} is none of {('auto', *BACKENDS)}")
        self._backend = backend
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "lr_in_buffer": lr_in_buffer,
            "adapt": adapt,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state that may be from before groups had `lr_in_buffer` and `adapt`."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("lr_in_buffer", False)
            group.setdefault("adapt", None)

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, found_inf: Tensor | None = None
    ) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: computes the loss again, with gradients, and returns it.
            found_inf: one element; where it is not 0, parameters and buffers stay as they are,
                without asking the host.

        Returns:
            What `closure` returned, or None.

        Raises:
            ValueError: where a gradient and its parameter are sharded differently, or tensors do
                not fit.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts = [part for group in self.param_groups for part in self._parts(group, found_inf)]
        if not parts:
            return loss

        # Norms of whole tensors: local ones, added over the shards.
        squares = [
            lars_squares(
                part.locals,
                part.grads,
                part.group["weight_decay"],
                part.adapt,
                backend=part.backend,
            )
            for part in parts
        ]
        whole = sums_over_shards(
            squares, [parameter for part in parts for parameter in part.parameters]
        )

        for part, rows in zip(parts, whole, strict=True):
            lars_update_(
                part.locals,
                part.grads,
                part.buffers,
                rows,
                part.adapt,
                lr=part.group["lr"],
                momentum=part.group["momentum"],
                weight_decay=part.group["weight_decay"],
                trust_coefficient=part.group["trust_coefficient"],
                found_inf=found_inf,
                lr_in_buffer=part.group["lr_in_buffer"],
                backend=part.backend,
            )
        return loss

    def _parts(self, group: dict[str, Any], found_inf: Tensor | None) -> list[_Part]:
        """The group's parameters with gradients, by device and dtype; missing buffers are made."""
        check_numbers(
            group["lr"], group["momentum"], group["weight_decay"], group["trust_coefficient"]
        )

        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            _require_alike_sharding(parameter)
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            alike.setdefault((parameter.device, parameter.dtype), []).append(parameter)

        parts, adapt = [], group["adapt"]
        for parameters in alike.values():
            own = local([parameter.detach() for parameter in parameters])
            grads = local(
                [parameter.grad for parameter in parameters if parameter.grad is not None]
            )
            buffers = local([self.state[parameter]["momentum_buffer"] for parameter in parameters])
            check_tensors(own, grads, buffers, found_inf)
            parts.append(
                _Part(
                    group,
                    parameters,
                    own,
                    grads,
                    buffers,
                    by_dimensions(own) if adapt is None else [adapt] * len(own),
                    resolve_backend(self._backend, own, buffers),
                )
            )
        return parts


def _require_alike_sharding(parameter: Tensor) -> None:
    """A gradient must be sharded as its parameter is."""
    mine, grads = _placements(parameter), _placements(parameter.grad)
    if mine != grads:
        raise ValueError(
            f"LARS: a parameter of shape {tuple(parameter.shape)} has placements {mine}, "
            f"its gradient {grads}"
        )


def _placements(tensor: Tensor | None) -> tuple[Any, ...] | None:
    """A DTensor's placements; None for a plain tensor."""
    return getattr(tensor, "placements", None)
