"""The part of a step that stays the same from one to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastmoco_kernels._multi_tensor import local
from fastmoco_kernels.adamw_ema.checks import check_sweep
from fastmoco_kernels.adamw_ema.reference import adamw_ema_foreach_
from fastmoco_kernels.adamw_ema.run import run_sweep
from fastmoco_kernels.adamw_ema.sweep import Optional, Scalars, Sweep


class Plan:
    """The tensors of some parameters of one group, unwrapped, checked and sorted into launches.

    Args:
        params: parameters with a gradient, as the optimizer has them.
        states: their optimizer state.
        averages: moving average by parameter, or None to leave averages alone.
        param_copies: narrow copy by parameter.
        average_copies: narrow copy of the average by parameter.
        backend: a named one.

    Raises:
        ValueError: for tensors that do not fit together.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        averages: Mapping[Tensor, Tensor] | None,
        param_copies: Mapping[Tensor, Tensor],
        average_copies: Mapping[Tensor, Tensor],
        backend: str,
    ) -> None:
        self.backend, self.averaged = backend, averages is not None
        self._given = _given(params, states)
        for param in params:
            _same_placements(param, averages)
        self.sweep = Sweep(
            params=local(params),
            grads=local_grads(params),
            exp_avgs=local([own["exp_avg"] for own in states]),
            exp_avg_sqs=local([own["exp_avg_sq"] for own in states]),
            steps=[own["step"] for own in states],
            averages=_column(averages or {}, params),
            param_copies=_column(param_copies, params),
            average_copies=_column(average_copies if averages is not None else {}, params),
        )
        check_sweep(self.sweep)
        self._shards = _shards(params)
        self._layouts = _layouts(self.sweep.grads)
        if backend == "triton":
            from fastmoco_kernels.adamw_ema.launch import plan_launches

            self._launches, self._rest = plan_launches(self.sweep)
            for launch in self._launches:
                launch.sweep = replace(launch.sweep, grads=())
        self.sweep = replace(self.sweep, grads=())  # the next step has others; these must not live on beside them

    def matching_grads(
        self, params: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]], averaged: bool
    ) -> list[Tensor] | None:
        """The gradients of this step, or None if the plan was made for something else.

        Gradients may lie elsewhere than last time. Parameters, state, and types and layouts of gradients must be the same;
        a parameter that changes its type or layout changes its gradient's.
        """
        given = _given(params, states)
        if averaged != self.averaged or len(given) != len(self._given):
            return None
        if not all(now is then for now, then in zip(given, self._given, strict=True)):
            return None
        if _shards(params) != self._shards:
            return None
        grads = local_grads(params)
        return grads if _layouts(grads) == self._layouts else None

    def run(self, grads: Sequence[Tensor], scalars: Scalars) -> None:
        """Take one step with these gradients."""
        if self.backend == "triton":
            self._launch(grads, scalars)
        else:
            run_sweep(replace(self.sweep, grads=grads), scalars, self.backend)

    def _launch(self, grads: Sequence[Tensor], scalars: Scalars) -> None:
        from fastmoco_kernels.adamw_ema.launch import sweep_triton_

        if self._rest:
            adamw_ema_foreach_(replace(self.sweep, grads=grads).pick(self._rest), scalars)
        for launch in self._launches:
            sweep_triton_(launch, [grads[row] for row in launch.rows], scalars)


def local_grads(params: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the parameters that have one, shards unwrapped."""
    return local([param.grad for param in params if param.grad is not None])


def _given(params: Sequence[Tensor], states: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """What must stay the same object for a plan to hold."""
    return [*params, *(own[name] for own in states for name in ("step", "exp_avg", "exp_avg_sq"))]


def _shards(params: Sequence[Tensor]) -> list[int]:
    """Where the shards of DTensors lie. `to_local` of a parameter makes a new tensor: too slow for every step."""
    return [param._local_tensor.data_ptr() for param in params if hasattr(param, "_local_tensor")]


def _layouts(tensors: Sequence[Tensor]) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    return [(tensor.dtype, tensor.stride()) for tensor in tensors]


def _column(by_param: Mapping[Tensor, Tensor], params: Sequence[Tensor]) -> Optional:
    found = [by_param.get(param) for param in params]
    return [None if tensor is None else local([tensor])[0] for tensor in found]


def _same_placements(param: Tensor, averages: Mapping[Tensor, Tensor] | None) -> None:
    """Shards pair up only if parameter, gradient and average are spread alike."""
    expected: Any = getattr(param, "placements", None)
    for name, tensor in (("gradient", param.grad), ("average", (averages or {}).get(param))):
        found: Any = expected if tensor is None else getattr(tensor, "placements", None)
        if found != expected:
            raise ValueError(f"AdamWEMA: a parameter is placed as {expected} but its {name} as {found}")
