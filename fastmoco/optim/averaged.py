"""Optimizers with one signature: `step(ema_momentum, skip)` updates weights and averages."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmoco.optim.larc import LARC
from fastmoco.optim.sgd import SGD
from fastmoco_kernels import LARS, AdamWEMA, ema_update_
from fastmoco_kernels.tensors import local
from fastmoco_pipelines.loading.step_parts import EMA, part

Pair = tuple[Tensor, Tensor]
"""An average and its weight."""


class AveragedOptimizer(ABC):
    """An optimizer of weights and of their exponential moving averages.

    The average of a frozen parameter is updated only if it differs from the parameter, as after
    loading other weights. If they are equal it is neither read nor written.

    Args:
        inner: a torch optimizer over the trainable parameters; checkpoints contain its state.
        averages: the average of each parameter that has one, frozen parameters included.
    """

    def __init__(
        self, inner: torch.optim.Optimizer, averages: Mapping[nn.Parameter, Tensor]
    ) -> None:
        self.inner = inner
        pairs: list[Pair] = [(average, weight) for weight, average in averages.items()]
        self._trainable = [pair for pair in pairs if pair[1].requires_grad]
        self._frozen = [pair for pair in pairs if not pair[1].requires_grad]
        self._compared: tuple[tuple[int, int], ...] = ()
        self._differing: list[Pair] = []

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of the inner optimizer; their values may be set before a step."""
        return self.inner.param_groups

    def step(self, *, ema_momentum: float | None = None, skip: Tensor | None = None) -> None:
        """Update every weight that has a gradient, then the averages.

        Args:
            ema_momentum: weight of the old average, in [0, 1]; None does not update averages.
            skip: one float32 on the device, 0 or 1; if it is 1, weights, averages and the state of
                the optimizer do not change, including its step counters.
        """
        self._update_weights(ema_momentum, skip)
        if ema_momentum is not None:
            self._move([*self._not_swept(), *self._differing_frozen()], ema_momentum, skip)

    def move_averages(self, ema_momentum: float) -> None:
        """Update only the averages."""
        self._move([*self._trainable, *self._differing_frozen()], ema_momentum, None)

    @abstractmethod
    def _update_weights(self, ema_momentum: float | None, skip: Tensor | None) -> None:
        """Run the step of the inner optimizer."""

    def _not_swept(self) -> list[Pair]:
        """Trainable pairs whose average `_update_weights` does not update."""
        return self._trainable

    @torch.no_grad()
    def _differing_frozen(self) -> list[Pair]:
        """Frozen pairs whose two tensors differ.

        The comparison waits for the device. It runs only after a tensor was replaced or written.
        """
        tensors = local([tensor for pair in self._frozen for tensor in pair])
        now = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
        if now != self._compared:
            self._differing = [pair for pair in self._frozen if not torch.equal(*local(pair))]
            self._compared = now
        return self._differing

    def _move(self, pairs: list[Pair], ema_momentum: float, skip: Tensor | None) -> None:
        """Update averages; a skipped step does not change them."""
        if not pairs:
            return
        momentum: float | Tensor = ema_momentum
        if skip is not None:
            # With momentum 1 an average does not change. float64, as the schedule.
            given = torch.full_like(skip, ema_momentum, dtype=torch.float64)
            momentum = given.masked_fill_(skip > 0, 1.0)
        with part(EMA):
            ema_update_(
                [average for average, _ in pairs], [weight for _, weight in pairs], momentum
            )


class SweptAdamW(AveragedOptimizer):
    """`AdamWEMA`: weights and averages in one pass over memory; steps are skipped on the device."""

    inner: AdamWEMA

    def _update_weights(self, ema_momentum: float | None, skip: Tensor | None) -> None:
        self.inner.step(ema_momentum=ema_momentum, found_inf=skip)

    def _not_swept(self) -> list[Pair]:
        return [(average, weight) for average, weight in self._trainable if weight.grad is None]


class FusedAdamW(AveragedOptimizer):
    """torch's fused AdamW; steps are skipped on the device."""

    inner: torch.optim.AdamW

    def _update_weights(self, ema_momentum: float | None, skip: Tensor | None) -> None:
        # torch.amp.GradScaler passes the flag in the same way.
        self.inner.found_inf = skip  # type: ignore[attr-defined]
        self.inner.step()


class AveragedLARS(AveragedOptimizer):
    """`LARS`; steps are skipped on the device."""

    inner: LARS

    def _update_weights(self, ema_momentum: float | None, skip: Tensor | None) -> None:
        self.inner.step(found_inf=skip)


class AveragedSGD(AveragedOptimizer):
    """`SGD` or `LARC`; steps are skipped on the device."""

    inner: SGD | LARC

    def _update_weights(self, ema_momentum: float | None, skip: Tensor | None) -> None:
        self.inner.step(found_inf=skip)


class HostSkipped(AveragedOptimizer):
    """Any other optimizer, such as those of apex. The host reads the flag from the device."""

    def _update_weights(self, ema_momentum: float | None, skip: Tensor | None) -> None:
        if skip is None or not bool(skip):
            self.inner.step()
