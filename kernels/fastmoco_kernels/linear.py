"""A linear layer by oneDNN on a CPU: in bf16, and in float32 on AMD's CPUs.

torch multiplies float32 matrices on x86 with MKL, which is slower on AMD than oneDNN, the library
that torch uses for 16 bits. Measured on one thread of an EPYC with AVX-512, 25,216 rows, widths 192
to 768: forward 84 to 92 GFLOP/s by MKL and 97 to 106 by oneDNN, gradient of the input 86 to 92 and
104 to 108. The gradient of the weight, a sum over many rows, stays with MKL (89 to 95 against 71 to
81).

In bf16 torch's own layer first writes the bias into every row of the result, then adds the product
to it. Here oneDNN adds the bias to the product, without that pass over memory: 183 to 195 GFLOP/s
against 198 to 207.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastmoco_kernels.tensors import runs_directly

LEAST_PRODUCTS = 2**23
"""Multiplications from which the faster product is more than the longer way to it: 0.2 ms."""


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`x weight^T + bias`, as `torch.nn.functional.linear`, up to rounding.

    Args:
        x: [..., K] floating point.
        weight: [N, K].
        bias: [N].

    Returns:
        [..., N], differentiable in all three; by oneDNN once. Under autocast: in its dtype.

    Numerics: another library adds the products in another order: the same bits every time on one
        machine. Other dtypes and devices, graph compilers and small products: torch's own.
    Distributed: none.

    Example:
        >>> import torch
        >>> from fastmoco_kernels.linear import linear
        >>> linear(torch.ones(2, 4), torch.ones(3, 4), torch.zeros(3)).shape
        torch.Size([2, 3])
    """
    given = (x, weight, bias)
    dtype = _dtype_of_product(given)
    # Tracers come first: a comparison of sizes would bind the graph to them.
    if (
        dtype is None
        or not runs_directly(given)
        or not torch.backends.mkldnn.enabled
        or not (
            (dtype == torch.float32 and onednn_is_faster())
            or (dtype == torch.bfloat16 and onednn_has_bf16())
        )
        or x.numel() * weight.shape[0] < LEAST_PRODUCTS
    ):
        return F.linear(x, weight, bias)
    x, weight, bias = (tensor.to(dtype) for tensor in given)
    if not torch.is_grad_enabled():
        return _product(x, weight, bias)
    out: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def _dtype_of_product(given: tuple[Tensor, ...]) -> torch.dtype | None:
    """The dtype in which torch multiplies; None: not on a CPU, or of mixed dtypes."""
    if any(tensor.device.type != "cpu" for tensor in given):
        return None
    dtypes = {tensor.dtype for tensor in given}
    if torch.is_autocast_enabled("cpu"):
        fits = dtypes <= {torch.float32, torch.bfloat16}
        return torch.get_autocast_dtype("cpu") if fits else None
    return dtypes.pop() if len(dtypes) == 1 else None


@functools.cache
def onednn_is_faster(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether torch has both libraries, and the CPU is one of AMD's.

    Args:
        cpuinfo: the kernel's description of the CPU; another file in tests.
    """
    if not (getattr(torch._C, "has_mkl", False) and has_product()) or not cpuinfo.exists():
        return False
    with cpuinfo.open() as lines:
        vendor = next((line for line in lines if line.startswith("vendor_id")), "")
    return "AuthenticAMD" in vendor


@functools.cache
def onednn_has_bf16() -> bool:
    """Whether torch multiplies bf16 by oneDNN on this CPU."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return has_product() and supported is not None and bool(supported())


def has_product() -> bool:
    """Whether this torch has oneDNN and its linear layer, whose name is private."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """By oneDNN. Its result for more than two dimensions would be a view, which FSDP2 warns of."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    whole: Tensor = torch.ops.aten._unsafe_view(out, [*x.shape[:-1], weight.shape[0]])
    return whole


class _Linear(torch.autograd.Function):
    """Forward and the gradient of the input by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = _product(dy, weight.t(), None)
        rows = dy.reshape(-1, weight.shape[0])
        if ctx.needs_input_grad[1]:
            dweight = _gradient_of_weight(rows, x.reshape(-1, weight.shape[1]))
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        return dx, dweight, dbias


def _gradient_of_weight(dy: Tensor, x: Tensor) -> Tensor:
    """[R, N] and [R, K] -> [N, K]. In bf16 oneDNN first copies the operand that is transposed, so
    that is the narrower one."""
    if dy.dtype == torch.bfloat16 and dy.shape[1] > x.shape[1]:
        return (x.t() @ dy).t().contiguous()
    return dy.t() @ x
