"""What one sweep works on: the tensors by parameter, and the numbers that apply to all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

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
    """The numbers of a sweep; each is a Python number or a tensor of one element on the parameters' device.

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
    def of(cls, numbers: Sequence[Number], found_inf: Tensor | None, grad_scale: Tensor | None) -> Scalars:
        """From the six in the order of `numbers`."""
        lr, weight_decay, beta1, beta2, eps, ema_momentum = numbers
        return cls(lr, weight_decay, beta1, beta2, eps, ema_momentum, found_inf, grad_scale)

    def numbers(self) -> list[Number]:
        """The six that are no flags, in the kernels' order."""
        return [self.lr, self.weight_decay, self.beta1, self.beta2, self.eps, self.ema_momentum]

    def on_host(self) -> Scalars | None:
        """The same as Python numbers, the scale folded in as a number, or None if `found_inf` says to skip.

        Reads tensors, and so waits for their device.
        """
        if self.found_inf is not None and self.found_inf.item() != 0:
            return None
        return Scalars.of([float(x) for x in self.numbers()], None, self.grad_scale)
