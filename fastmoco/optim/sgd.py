"""SGD with momentum as torch has it, skipped on the device and right on shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastmoco.optim.adamw import trainable_parameters
from fastmoco_kernels.eager_optimizer import EagerOptimizer
from fastmoco_kernels.tensors import local, same_layout


class SGD(EagerOptimizer, torch.optim.SGD):
    """torch's SGD with momentum, on whole tensors and on FSDP2's shards.

    `g <- g + weight_decay * p`, then `buf <- momentum * buf + g`, which is `g` in the first step,
    and `p <- p - lr * buf`, or with Nesterov's momentum `p <- p - lr * (g + momentum * buf)`.
    Parameters without a gradient are left alone: no decay, no momentum.
    """

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
        for group in self.param_groups:
            for parameters in with_gradients(group):
                sgd_update_(
                    local([parameter.detach() for parameter in parameters]),
                    own_gradients(parameters),
                    momentum_buffers(self, parameters, group["momentum"]),
                    lr=group["lr"],
                    momentum=group["momentum"],
                    weight_decay=group["weight_decay"],
                    found_inf=found_inf,
                    nesterov=group["nesterov"],
                )
        return loss


def build_sgd(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    sgd_momentum: float = 0.9,
    nesterov: bool = False,
) -> SGD:
    """SGD over all trainable parameters in one group; the decay applies to every tensor.

    Args:
        named_parameters: as from `module.named_parameters()`; the group stores the names.
        lr: initial learning rate; the trainer sets it in every step.
        weight_decay: added to the gradient.
        sgd_momentum: of the buffer that accumulates gradients.
        nesterov: whether a step also has the gradient itself (Nesterov's momentum).

    Raises:
        ValueError: if nothing is trainable.
    """
    trainable = trainable_parameters(named_parameters)
    return SGD(
        trainable, lr=lr, momentum=sgd_momentum, weight_decay=weight_decay, nesterov=nesterov
    )


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What a closure returns, computed with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def with_gradients(group: dict[str, Any]) -> Iterator[list[Tensor]]:
    """The parameters of a group that have gradients, by device and dtype.

    Raises:
        ValueError: where a gradient and its parameter are sharded differently.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in group["params"]:
        if parameter.grad is None:
            continue
        mine, other = (getattr(t, "placements", None) for t in (parameter, parameter.grad))
        if mine != other:
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} has placements {mine}, its "
                f"gradient {other}; both must be sharded alike"
            )
        alike.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    yield from alike.values()


def own_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of this rank's parts, in dtype and memory layout of their parameters.

    Raises:
        ValueError: for a parameter whose memory has gaps.
    """
    owned = local([parameter.detach() for parameter in parameters])
    found = local([parameter.grad for parameter in parameters if parameter.grad is not None])
    gradients = []
    for parameter, gradient in zip(owned, found, strict=True):
        if not same_layout(parameter):
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} has strides {parameter.stride()}, "
                "with gaps; make it contiguous before the optimizer is built"
            )
        if gradient.dtype != parameter.dtype or not same_layout(parameter, gradient):
            gradient = torch.empty_like(parameter).copy_(gradient)
        gradients.append(gradient)
    return gradients


def momentum_buffers(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], momentum: float
) -> list[Tensor]:
    """This rank's parts of the buffers, zeros where there has been no step; none without momentum.

    Zeros, and not a copy of the first gradient: the first step may be one that the device skips.
    """
    if not momentum:
        return []
    for parameter in parameters:
        state = optimizer.state[parameter]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(parameter)
    return local([optimizer.state[parameter]["momentum_buffer"] for parameter in parameters])


def sgd_update_(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    buffers: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    found_inf: Tensor | None,
    nesterov: bool = False,
) -> None:
    """The update of tensors of one device, dtype and memory layout, in one sweep of torch's."""
    kept = [i for i, parameter in enumerate(parameters) if parameter.numel()]
    if kept:
        torch._fused_sgd_(
            [parameters[i] for i in kept],
            [gradients[i] for i in kept],
            [buffers[i] for i in kept] if buffers else [],
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            dampening=0.0,
            nesterov=nesterov,
            maximize=False,
            is_first_step=False,
            grad_scale=None,
            found_inf=found_inf,
        )
