"""One optimizer step: forward, backward, clipping and update, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastmoco.config import Config, Resolved
from fastmoco.objectives.interface import Objective, Output, Progress
from fastmoco.optim.averaged import AveragedOptimizer
from fastmoco.optim.clipping import clip_each_, clip_together_
from fastmoco.optim.groups import set_learning_rates, set_weight_decays
from fastmoco.optim.schedule import run_learning_rate, run_weight_decay
from fastmoco.telemetry.stability import gradient_norms
from fastmoco.telemetry.stability_weights import UpdateRatios, batch_norm_drift, ema_distance
from fastmoco.training.step_guard import StepGuard
from fastmoco_kernels.tensors import sent
from fastmoco_pipelines import Batch
from fastmoco_pipelines.loading.step_parts import OPTIMIZER, TRANSFER, part


class StepResult(NamedTuple):
    """The results of a step. All tensors are on the device."""

    output: Output
    """The output of this rank's forward."""
    norms: Mapping[str, Tensor]
    """Gradient norms by place in the network, and their "total", before clipping."""
    at: Progress
    """The step."""
    lr: float
    """Its learning rate, as the schedule has it; groups of parameters may scale it."""

    figures: Mapping[str, Tensor] = {}
    """Scalars about the weights by metric name, the same on all ranks, where they were asked for."""

    @property
    def loss(self) -> Tensor:
        """The loss of this rank."""
        return self.output.loss


class TrainStep:
    """Runs one optimizer step without waiting for the device.

    Args:
        config: of the run.
        resolved: values derived from the config.
        objective: what is trained, after sharding.
        forward_backward: returns the output of a batch, and adds the gradients to `grad` of every
            trainable parameter.
        optimizer: of the objective's parameters and their averages.
        guard: decides which steps are skipped.

    Attributes:
        forward_backward: as given.
    """

    def __init__(
        self,
        config: Config,
        resolved: Resolved,
        *,
        objective: Objective,
        forward_backward: Callable[..., Output],
        optimizer: AveragedOptimizer,
        guard: StepGuard,
    ) -> None:
        self.forward_backward = forward_backward
        self._config = config
        self._resolved = resolved
        self._objective = objective
        self._optimizer = optimizer
        self._guard = guard
        self._trainable = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        self._device = next(iter(self._trainable.values())).device
        self._places = objective.places()
        self._ratios = UpdateRatios(self._trainable, self._places)
        self._norm_pairs = objective.averaged_norms()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """The gradients of the last step by name, clipped, as the optimizer got them."""
        for name, parameter in self._trainable.items():
            if parameter.grad is not None:
                yield name, parameter.grad

    def learning_rate(self, at: Progress) -> float:
        """The learning rate of a step, a pure function of its progress."""
        return run_learning_rate(at.step, self._config, self._resolved)

    def weight_decay(self, at: Progress) -> float | None:
        """The weight decay of a step; None where it is constant, as the optimizer was built."""
        return run_weight_decay(at.step, self._config, self._resolved)

    def __call__(
        self, batch: Batch, at: Progress, *, accuracy: bool = False, figures: bool = False
    ) -> StepResult:
        """One optimizer step.

        Args:
            batch: this rank's part of the global batch.
            at: the step.
            accuracy: as for `Objective.compare`.
            figures: whether the result gets figures about the weights, which read all of them.
        """
        lr = self.learning_rate(at)
        set_learning_rates(self._optimizer.param_groups, lr, peak=self._resolved.peak_lr)
        decay = self.weight_decay(at)
        if decay is not None:
            set_weight_decays(self._optimizer.param_groups, decay)
        with part(TRANSFER):
            views = [view.to(self._device, non_blocking=True) for view in batch.views]
            labels = {}
            if batch.labels is not None:
                labels["labels"] = sent(torch.from_numpy(batch.labels), self._device)

        # The forward writes buffers. The guard copies them, and restores them after a bad step.
        with part(OPTIMIZER):
            self._objective.zero_grad(set_to_none=True)
            self._guard.begin()
        output = self.forward_backward(*views, **labels, at=at, accuracy=accuracy)

        # An optimizer leaves parameters without a gradient as they are: no decay, no momentum.
        for name in self._objective.frozen(at) & self._trainable.keys():
            self._trainable[name].grad = None

        with part(OPTIMIZER):
            # One pass computes the norms of gradients for guard, clipping, telemetry and rollback.
            norms = gradient_norms(self._trainable.items(), self._places)
            skip = self._guard.judge(output.loss, norms["total"])
            self._clip(norms["total"])

            # Update weights and averages, then queues and centres. A skipped step changes none.
            if figures:
                self._ratios.begin()
            self._optimizer.step(ema_momentum=self._objective.ema_momentum(at), skip=skip)
            self._objective.after_step(skip, at)
            found = self._figures() if figures else {}
        return StepResult(output, norms, at, lr, found)

    def _figures(self) -> dict[str, Tensor]:
        """What the weights show after the update, by metric name. No host sync."""
        trained = [pair for pair in self._objective.averages().items() if pair[0].requires_grad]
        others = {
            "ema_distance": ema_distance(trained),
            "batch_norm_drift": batch_norm_drift(self._norm_pairs),
        }
        return self._ratios.finish() | {k: v for k, v in others.items() if v is not None}

    @torch.no_grad()
    def _clip(self, total: Tensor) -> None:
        """Clip the norm of all gradients together to `optim.clip_norm`, or that of each tensor to
        `optim.clip_tensor_norm`; 0: no clipping."""
        optim = self._config.optim
        gradients = [p.grad for p in self._trainable.values() if p.grad is not None]
        if optim.clip_tensor_norm > 0:
            clip_each_(gradients, optim.clip_tensor_norm)
        if optim.clip_norm > 0:
            clip_together_(gradients, total, optim.clip_norm)
