"""LARC as SwAV uses it: SGD whose rate is adapted to each tensor, biases and norms included."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmoco.optim.adamw import trainable_parameters
from fastmoco.optim.sgd import (
    loss_of,
    momentum_buffers,
    own_gradients,
    sgd_update_,
    with_gradients,
)
from fastmoco_kernels.eager_optimizer import EagerOptimizer
from fastmoco_kernels.tensors import local, sums_over_shards

FLOOR = 1e-8
"""Added to the denominator of the ratio."""


class LARC(EagerOptimizer):
    """Layer-wise adaptive rate control without clipping, then SGD with momentum.

    For every tensor whose norm and whose gradient's norm are not 0:
    `g <- (g + weight_decay * p) * trust_coefficient * |p| / (|g| + weight_decay * |p| + 1e-8)`,
    with the norm of the gradient before the decay is added. Any other gradient stays as it is,
    without decay. Then `buf <- momentum * buf + g`, which is `g` in the first step, and
    `p <- p - lr * buf`. Parameters without a gradient are left alone.

    On shards the norms are those of whole tensors: one all-reduce of 16 bytes a tensor and step.

    Args:
        params: parameters, named parameters or groups; plain tensors or DTensors.
        lr: learning rate.
        momentum: of the buffer, in [0, 1).
        weight_decay: of every tensor.
        trust_coefficient: norm of a gradient relative to that of its tensor.

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"LARC: momentum={momentum} is outside [0, 1)")
        if not weight_decay >= 0:
            raise ValueError(f"LARC: weight_decay={weight_decay} is below 0")
        if not trust_coefficient > 0:
            raise ValueError(f"LARC: trust_coefficient={trust_coefficient} is not above 0")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, found_inf: Tensor | None = None
    ) -> Any:
        """One step of every parameter that has a gradient.

        Args:
            closure: computes the loss again, with gradients, and returns it.
            found_inf: one float32 on the device; where it is not 0, parameters and buffers stay as
                they are, without asking the host.

        Returns:
            What `closure` returned, or None.
        """
        loss = loss_of(closure)
        parts = [(group, found) for group in self.param_groups for found in with_gradients(group)]
        if not parts:
            return loss

        # Squared norms of whole tensors: those of local parts, added over the shards.
        owned = [local([p.detach() for p in parameters]) for _, parameters in parts]
        gradients = [own_gradients(parameters) for _, parameters in parts]
        squares = [squares_of(own, grads) for own, grads in zip(owned, gradients, strict=True)]
        squares = sums_over_shards(squares, [p for _, parameters in parts for p in parameters])

        for (group, parameters), own, grads, rows in zip(
            parts, owned, gradients, squares, strict=True
        ):
            decay = group["weight_decay"]
            ratios = ratios_of(rows, decay, group["trust_coefficient"])
            sgd_update_(
                own,
                adapted(own, grads, ratios, decay),
                momentum_buffers(self, parameters, group["momentum"]),
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=0.0,
                found_inf=found_inf,
            )
        return loss


def build_larc(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    sgd_momentum: float = 0.9,
    trust_coefficient: float = 0.001,
) -> LARC:
    """LARC over all trainable parameters in one group.

    Args:
        named_parameters: as from `module.named_parameters()`; the group stores the names.
        lr: initial learning rate; the trainer sets it in every step.
        weight_decay: of every tensor, biases and norms included.
        sgd_momentum: of the buffer that accumulates the adapted gradients.
        trust_coefficient: norm of a gradient relative to that of its tensor.

    Raises:
        ValueError: if nothing is trainable.
    """
    return LARC(
        trainable_parameters(named_parameters),
        lr=lr,
        momentum=sgd_momentum,
        weight_decay=weight_decay,
        trust_coefficient=trust_coefficient,
    )


def squares_of(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """[T, 2] float64: `|p|^2` and `|g|^2` of T tensors, 0 for empty shards."""
    tensors = [t if t.numel() else t.new_zeros(1) for t in (*parameters, *gradients)]
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float64)
    return torch.stack(list(norms)).view(2, -1).T.square()


def ratios_of(squares: Tensor, weight_decay: float, trust_coefficient: float) -> Tensor:
    """[T] float64: the factor on `g + weight_decay * p`.

    It is 1 where the parameter is zero, and 0 where the gradient is: the gradient stays as it was.
    """
    param, grad = squares.sqrt().unbind(1)
    ratio = trust_coefficient * param / (grad + weight_decay * param + FLOOR)
    unadapted = (grad != 0).to(ratio.dtype)
    return torch.where((param > 0) & (grad > 0), ratio, unadapted)


def adapted(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    ratios: Tensor,
    weight_decay: float,
) -> list[Tensor]:
    """`(g + weight_decay * p) * ratio` of each tensor, in new memory of the parameters' layout."""
    decayed = torch._foreach_mul(list(parameters), weight_decay)
    torch._foreach_add_(decayed, list(gradients))
    torch._foreach_mul_(decayed, ratios.unbind())
    return list(decayed)


@torch.no_grad()
def larc_step_reference_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    buffers: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
) -> None:
    """The step as its equation is written, one whole tensor at a time: the reference of the tests.

    Buffers are zeros before the first step.
    """
    for param, grad, buffer in zip(parameters, gradients, buffers, strict=True):
        if grad is None:
            continue
        param_norm, grad_norm = param.norm(), grad.norm()
        if param_norm > 0 and grad_norm > 0:
            denominator = grad_norm + weight_decay * param_norm + FLOOR
            grad = (grad + weight_decay * param) * (trust_coefficient * param_norm / denominator)
        buffer.mul_(momentum).add_(grad)
        param.sub_(lr * buffer)
