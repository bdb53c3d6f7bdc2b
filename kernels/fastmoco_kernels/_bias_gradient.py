"""The gradient of a linear layer's bias, computed by the operation that reads the layer's output.

That gradient is the sum over rows of the gradient to the output. In torch it is a pass of its own
over a tensor that a kernel has just written. `F.linear(x, W, bias.detach())` leaves it out, and the
next operation is passed `bias` and sums the rows while it writes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmoco_kernels.backends import triton_is_default


class _PassBiasGradient(torch.autograd.Function):
    """x itself; its gradient, and the sum over rows of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.bias_dtype = bias.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None]:
        (dx,) = gradients
        if not ctx.needs_input_grad[1]:
            return dx, None
        return dx, dx.reshape(-1, dx.shape[-1]).sum(0).to(ctx.bias_dtype)


def pass_bias_gradient(x: Tensor, bias: Tensor | None) -> Tensor:
    """`x`; in the backward `bias` gets the sum over rows of the gradient of x, as in nn.Linear.

    Args:
        x: [..., E], the linear layer's output, bias added.
        bias: [E], or None: then nothing happens.
    """
    if bias is None or not bias.requires_grad:
        return x
    passed: Tensor = _PassBiasGradient.apply(x, bias)  # type: ignore[no-untyped-call]
    return passed


def check_bias(op: str, name: str, x: Tensor, bias: Tensor | None) -> None:
    """A bias must be one number for each column of `x` (`name` in the error text).

    Raises:
        ValueError: naming both sides.
    """
    if bias is None:
        return
    if bias.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: {name} is {tuple(x.shape)} but its bias is {tuple(bias.shape)}; "
            f"it must be [{x.shape[-1]}]"
        )
    if bias.device != x.device:
        raise ValueError(
            f"{op}: {name} is on {x.device} but its bias is on {bias.device}; they must agree"
        )
    if not bias.is_floating_point():
        raise ValueError(
            f"{op}: {name} is {x.dtype} but its bias is {bias.dtype}; it must be floating point"
        )


def kernels_are_default(device: torch.device) -> bool:
    """`triton_is_default` as a constant for a graph compiler, which cannot trace that decision."""
    return triton_is_default(device)


# What torch.compiler.assume_constant_result sets. Calling that would import the compiler along with
# the ops.
kernels_are_default._dynamo_marked_constant = True  # type: ignore[attr-defined]
