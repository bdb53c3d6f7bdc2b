"""Tensors and numbers of one sweep, and the checks of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmoco_kernels.tensors import check_lists

OP = "adamw_ema_step_"
WIDE = (torch.float32, torch.float64)

Number = float | Tensor
Optional = Sequence[Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Tensors of P parameters: six lists of P, each parameter's own tensors of its shape.

    Attributes:
        params: updated.
        grads: read.
        exp_avgs: running mean of the gradient, updated.
        exp_avg_sqs: running mean of the squared gradient, updated.
        steps: one float32 element each, counted up by 1.
        averages: moving averages of the parameters, updated; None for a parameter without one.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    steps: Sequence[Tensor]
    averages: Optional

    def columns(self) -> list[Optional]:
        """The five lists of tensors of a parameter's size, in the kernels' order."""
        return [self.params, self.grads, self.exp_avgs, self.exp_avg_sqs, self.averages]

    def pick(self, rows: Sequence[int]) -> Sweep:
        """The sweep over some of the parameters."""
        return Sweep(
            params=[self.params[r] for r in rows],
            grads=[self.grads[r] for r in rows],
            exp_avgs=[self.exp_avgs[r] for r in rows],
            exp_avg_sqs=[self.exp_avg_sqs[r] for r in rows],
            steps=[self.steps[r] for r in rows],
            averages=[self.averages[r] for r in rows],
        )


@dataclass(frozen=True)
class Scalars:
    """The numbers of a sweep: Python numbers, or tensors of one element on the parameters' device.

    Attributes:
        lr: learning rate.
        weight_decay: decoupled decay per unit of learning rate.
        beta1: share that `exp_avgs` keep.
        beta2: share that `exp_avg_sqs` keep.
        eps: added to the root of the squared gradient.
        ema_momentum: share that `averages` keep.
        found_inf: not 0, or NaN: nothing changes.
        grad_scale: the gradients are divided by it.
    """

    lr: Number
    weight_decay: Number
    beta1: Number
    beta2: Number
    eps: Number
    ema_momentum: Number
    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    @classmethod
    def of(
        cls, numbers: Sequence[Number], found_inf: Tensor | None, grad_scale: Tensor | None
    ) -> Scalars:
        """From the six in the order of `numbers`."""
        lr, weight_decay, beta1, beta2, eps, ema_momentum = numbers
        return cls(lr, weight_decay, beta1, beta2, eps, ema_momentum, found_inf, grad_scale)

    def numbers(self) -> list[Number]:
        """The six that are no flags, in the kernels' order."""
        return [self.lr, self.weight_decay, self.beta1, self.beta2, self.eps, self.ema_momentum]

    def on_host(self) -> Scalars | None:
        """The same as Python numbers, except for `grad_scale`; None where `found_inf` is set.

        Reads tensors, and so waits for their device.
        """
        if self.found_inf is not None and self.found_inf.item() != 0:
            return None
        return Scalars.of([float(x) for x in self.numbers()], None, self.grad_scale)


def check_sweep(sweep: Sweep) -> None:
    """Counts, shapes, devices and dtypes.

    Raises:
        ValueError: naming the list, the parameter and both values.
    """
    lists: dict[str, Optional] = {
        "grads": sweep.grads,
        "exp_avgs": sweep.exp_avgs,
        "exp_avg_sqs": sweep.exp_avg_sqs,
        "averages": sweep.averages,
    }
    if len(sweep.steps) != len(sweep.params):
        raise ValueError(f"{OP}: {len(sweep.params)} params but {len(sweep.steps)} steps")
    check_lists(OP, "params", sweep.params, lists)

    # Types: every tensor dense and floating point, what accumulates small increments float32 or
    # wider.
    for i, param in enumerate(sweep.params):
        for name, tensors in {"params": sweep.params, **lists}.items():
            tensor = tensors[i]
            if tensor is None:
                continue
            if (
                tensor.is_complex()
                or not tensor.is_floating_point()
                or tensor.layout != torch.strided
            ):
                raise ValueError(
                    f"{OP}: {name}[{i}] is {tensor.dtype}, {tensor.layout}; "
                    "it must be dense floating point"
                )
            if name != "grads" and tensor.dtype not in WIDE:
                raise ValueError(
                    f"{OP}: {name}[{i}] is {tensor.dtype}; updates below its half ulp vanish: "
                    f"needs one of {WIDE}"
                )
        step = sweep.steps[i]
        if step.numel() != 1 or step.device != param.device or not step.is_floating_point():
            raise ValueError(
                f"{OP}: steps[{i}] has {step.numel()} elements of {step.dtype} on {step.device}; "
                f"it must be 1 of floating point on {param.device}"
            )


def check_scalars(scalars: Scalars, device: torch.device) -> None:
    """Ranges of numbers; device and size of tensors, whose values are not read.

    Raises:
        ValueError: naming the value and its rule.
    """
    for name in ("lr", "weight_decay", "eps"):
        value: Number = getattr(scalars, name)
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{OP}: {name}={value} must be 0 or more")
    for name in ("beta1", "beta2"):
        value = getattr(scalars, name)
        if not isinstance(value, Tensor) and not 0 <= value < 1:
            raise ValueError(f"{OP}: {name}={value} is outside [0, 1)")
    if not isinstance(scalars.ema_momentum, Tensor) and not 0 <= scalars.ema_momentum <= 1:
        raise ValueError(f"{OP}: ema_momentum={scalars.ema_momentum} is outside [0, 1]")

    # Tensors: one element, on the parameters' device.
    for name in (
        "lr",
        "weight_decay",
        "beta1",
        "beta2",
        "eps",
        "ema_momentum",
        "found_inf",
        "grad_scale",
    ):
        tensor = getattr(scalars, name)
        if isinstance(tensor, Tensor) and (tensor.numel() != 1 or tensor.device != device):
            raise ValueError(
                f"{OP}: {name} has {tensor.numel()} elements on {tensor.device}; "
                f"it must be 1 on {device}"
            )
