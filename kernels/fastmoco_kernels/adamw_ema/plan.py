"""The part of a step that stays the same from one to the next."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from fastmoco_kernels._unchanged import Unchanged
from fastmoco_kernels.adamw_ema.dispatch import run_sweep
from fastmoco_kernels.adamw_ema.reference import adamw_ema_foreach_
from fastmoco_kernels.adamw_ema.sweep import Optional, Scalars, Sweep, check_sweep
from fastmoco_kernels.tensors import local

_STATE = operator.itemgetter("step", "exp_avg", "exp_avg_sq")


class Plan:
    """The tensors of some parameters of one group, unwrapped, checked and sorted into launches.

    Args:
        params: parameters with a gradient, as the optimizer has them.
        states: their optimizer state.
        averages: moving average by parameter, or None to leave the averages unchanged.
        backend: a named one.

    Raises:
        ValueError: for tensors that do not fit together.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        averages: Mapping[Tensor, Tensor] | None,
        backend: str,
    ) -> None:
        self.backend = backend
        self.averaged = averages is not None
        self._params = list(params)
        self._own = list(states)
        self._states = _state_tensors(states)

        # Shards in place of DTensors.
        for param in params:
            _same_placements(param, averages)
        self.sweep = Sweep(
            params=local(params),
            grads=local_grads(params),
            exp_avgs=local([own["exp_avg"] for own in states]),
            exp_avg_sqs=local([own["exp_avg_sq"] for own in states]),
            steps=[own["step"] for own in states],
            averages=_column(averages or {}, params),
        )
        check_sweep(self.sweep)

        # What must not change for the plan to hold: shards, and every tensor but the gradients.
        used = averages or {}
        owners = [*params, *self._states, *(used[param] for param in params if param in used)]
        self._shards = [
            (owner, owner._local_tensor) for owner in owners if hasattr(owner, "_local_tensor")
        ]
        columns = self.sweep.columns()
        fixed = [
            tensor for column in (columns[0], *columns[2:], self.sweep.steps) for tensor in column
        ]
        self._fixed = [tensor for tensor in fixed if tensor is not None]
        self._unchanged = Unchanged([*self._fixed, *self.sweep.grads])

        if backend == "triton":
            from fastmoco_kernels.adamw_ema.launch import plan_launches

            self._launches, self._rest = plan_launches(self.sweep)
            for launch in self._launches:
                launch.sweep = replace(launch.sweep, grads=())

        # The next step has other gradients; these must be freed.
        self.sweep = replace(self.sweep, grads=())

    def matching_grads(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], averaged: bool
    ) -> list[Tensor] | None:
        """The gradients of this step, shards unwrapped; None if the plan does not fit them.

        Parameters and state must be the same objects, and every tensor of the type, layout and
        device of that time, also where something changed it under the same object. Addresses may
        differ from the last time. The caller checks that the parameters still have the same state
        dictionaries.
        """
        if (
            averaged != self.averaged
            or len(params) != len(self._params)
            or not _same(params, self._params)
        ):
            return None
        if not _same(_state_tensors(self._own), self._states) or any(
            owner._local_tensor is not shard for owner, shard in self._shards
        ):
            return None
        mine = local(grads)
        return mine if self._unchanged.holds([*self._fixed, *mine]) else None

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
            # Rows ascend, so equal lengths mean all of them.
            own = grads if len(launch.rows) == len(grads) else [grads[row] for row in launch.rows]
            sweep_triton_(launch, own, scalars)


def local_grads(params: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the parameters that have one, shards unwrapped."""
    return local([param.grad for param in params if param.grad is not None])


def _state_tensors(states: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """What must stay the same object for a plan to hold, three tensors a parameter."""
    return list(itertools.chain.from_iterable(map(_STATE, states)))


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether two lists of one length hold the same objects."""
    return all(map(operator.is_, some, others))


def _column(by_param: Mapping[Tensor, Tensor], params: Sequence[Tensor]) -> Optional:
    found = [by_param.get(param) for param in params]
    return [None if tensor is None else local([tensor])[0] for tensor in found]


def _same_placements(param: Tensor, averages: Mapping[Tensor, Tensor] | None) -> None:
    """Shards pair up only if parameter, gradient and average have equal placements."""
    expected: Any = getattr(param, "placements", None)
    for name, tensor in (("gradient", param.grad), ("average", (averages or {}).get(param))):
        found: Any = expected if tensor is None else getattr(tensor, "placements", None)
        if found != expected:
            raise ValueError(
                f"AdamWEMA: a parameter is placed as {expected} but its {name} as {found}"
            )
