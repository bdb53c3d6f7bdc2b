"""GELU whose backward also computes the gradient of the previous linear layer's bias.

A linear layer adds its bias in the product's epilogue at no cost, but the bias gradient costs a
pass: the sum over rows of a tensor that GELU's backward has just written. Here that kernel sums
what it writes. The layer must then detach its bias, `F.linear(x, W, bias.detach())`, and `bias` is
passed to `gelu`.

The forward is torch's own. The backward reads dy and h and writes dh: 6 bytes an element of 16
bits, where torch's two operations move 8. Partial sums are kept by program and added in a fixed
order.
"""

from __future__ import annotations

from torch import Tensor

from fastmoco_kernels._bias_gradient import check_bias, kernels_are_default
from fastmoco_kernels.backends import KERNEL_DTYPES, choose_backend
from fastmoco_kernels.gelu_bias.operator import gelu_triton
from fastmoco_kernels.gelu_bias.reference import gelu_reference

BACKENDS = ("triton", "reference")


def gelu(h: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """The exact GELU of a linear layer's output; its backward also gives the layer's bias gradient.

    `y = h * Phi(h)` with the normal distribution's Phi, by erf (Hendrycks and Gimpel 2016);
    `dh = dy * (Phi(h) + h * phi(h))`; `dbias = sum over rows of dh`

    Args:
        h: [..., F] floating point, any stride (a copy in the backward unless contiguous): the
            result of `F.linear(x, W, bias.detach())`. Without detach the bias would get its
            gradient twice.
        bias: [F] floating point, the parameter, on h's device. The forward does not read it. None:
            a plain GELU.
        backend: `"auto"` (triton on CUDA, under torch.compile too; reference elsewhere and for
            float64), `"triton"` or `"reference"`.

    Returns:
        [..., F] in h's dtype, differentiable in h and bias (by triton once).

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together, or a backend that does
            not run here.

    Numerics: computed in float32 (float64 of float64) and rounded once, both ways. dbias sums dh as
        it was rounded to h's dtype, as torch's linear layer does: `triton` in float32, then rounded
        to the bias's dtype, the same bits every time on one GPU and one tile; `reference` gives
        torch's bits (of 16-bit rows its sum is rounded to 16 bits).
    Memory and cost: h is kept. `cost.gelu_bytes`, `cost.gelu_backward_bytes`: 4 and 6 bytes an
        element of 16 bits, where torch's backward and sum move 8 (`cost.eager_backward_bytes`).
        Empty inputs are allowed.
    Distributed: none.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import gelu
        >>> layer = torch.nn.Linear(4, 8)
        >>> h = torch.nn.functional.linear(torch.ones(2, 4), layer.weight, layer.bias.detach())
        >>> gelu(h, layer.bias).sum().backward()
        >>> layer.bias.grad.shape
        torch.Size([8])
    """
    if h.dim() == 0 or h.shape[-1] == 0 or not h.is_floating_point():
        raise ValueError(
            f"gelu: h is {h.dtype} {tuple(h.shape)}; it must be floating point, [..., "
            "F] with F at least 1"
        )
    check_bias("gelu", "h", h, bias)
    fits = h.dtype in KERNEL_DTYPES and (bias is None or bias.dtype in KERNEL_DTYPES)
    fused = backend == "auto" and fits and kernels_are_default(h.device)
    name = choose_backend("gelu", backend, "triton" if fused else "reference", BACKENDS)
    if name == "reference":
        return gelu_reference(h, bias)
    if not fits:
        raise ValueError(
            f"gelu: backend='triton': h is {h.dtype}, bias "
            f"{None if bias is None else bias.dtype}; each must be one of "
            f"{', '.join(map(str, KERNEL_DTYPES))}; backend='auto' takes any"
        )
    return gelu_triton(h, bias)
