"""Residual add and the layer norm after it in one pass, written in the next product's dtype.

In a pre-norm block under autocast torch adds the branch (16 bits) to the stream (float32),
normalises the sum in float32 and casts the result, because the linear layer that follows computes
in 16 bits: three passes forward and five backward, 24 and 44 bytes an element. One pass each way
moves 12 and 16.

Kept for the backward: the sum, which the residual stream keeps anyway, and two float32 a row. One
kernel adds the gradients of the stream and of the normalised rows and writes the sum in both types.
Sums over rows (of weight and bias) are kept by program and added in a fixed order.

A graph compiler fuses the plain form itself, so under torch.compile `"auto"` means the plain form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco_kernels._bias_gradient import check_bias
from fastmoco_kernels.backends import KERNEL_DTYPES, choose_backend, triton_is_default
from fastmoco_kernels.residual_norm.operator import residual_norm_triton
from fastmoco_kernels.residual_norm.reference import residual_norm_reference

BACKENDS = ("triton", "reference")
WIDEST = 4096
"""Longest row that the kernels hold in registers."""


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype | None = None,
    *,
    branch_bias: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and layer-normalise the sum, written in `out_dtype`.

    `x_new = x + branch`; `y = (x_new - mean) / sqrt(variance + eps) * weight + bias` (Ba, Kiros,
    Hinton 2016, Eq. 4; biased variance)

    Args:
        x: [..., E] floating point, any stride (a copy unless contiguous): the residual stream.
        branch: [..., E], x's shape and device, any floating dtype; or None: the plain layer norm of
            x.
        weight: [E], may be narrower than x.
        bias: [E], weight's dtype.
        eps: added to the variance.
        out_dtype: of y. Default: autocast's dtype where autocast is enabled for x's device (the
            dtype of the linear layer that reads y), else that of x_new. float64 stays float64, as
            autocast leaves it.
        branch_bias: [E] floating point, the parameter of the linear layer whose result is the
            branch, bias included: `F.linear(h, W, bias.detach())`. The forward does not read it.
            Its gradient is the sum over rows of the branch's, as rounded to the branch's dtype: in
            float32 by triton, with torch's bits by reference.
        backend: `"auto"` (triton on CUDA where it can; reference elsewhere, for float64, for rows
            above 4096, and under torch.compile, which fuses it), `"triton"` or `"reference"`.

    Returns:
        `(x_new, y)`, both [..., E] and differentiable in x, branch, weight, bias and branch_bias.
        x_new has the dtype of `x + branch`; without a branch it is `x` itself.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together, or a backend that does
            not run here.

    Numerics: x_new is rounded to its dtype first, and statistics are taken of that, in float32
        (float64 of float64); y is rounded once. `reference` gives the bits of `x + branch`,
        `torch.nn.functional.layer_norm` and `.to` one after the other, in value and gradient.
        Autocast casts no argument. triton gives the same bits every time on one GPU and one tile.
    Memory and cost: `cost.residual_norm_bytes`, `cost.residual_norm_backward_bytes`: 12 and 16
        bytes an element for a float32 stream and a 16-bit branch, where torch's operations move 24
        and 44 (`cost.eager_bytes`). triton keeps x_new, weight and 8 bytes a row for the backward.
        Empty inputs are allowed: empty results, gradients 0.
    Distributed: none.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import residual_norm
        >>> x, branch, norm = torch.zeros(2, 4), torch.eye(4)[:2], torch.nn.LayerNorm(4)
        >>> x_new, y = residual_norm(x, branch, norm.weight, norm.bias, 1e-6, torch.bfloat16)
        >>> y.dtype, x_new.dtype
        (torch.bfloat16, torch.float32)
    """
    _check(x, branch, weight, bias, out_dtype)
    _check_branch_bias(branch, branch_bias)
    stream = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    out = _default_dtype(stream, x.device) if out_dtype is None else out_dtype
    fault = _triton_fault(x, branch, weight, branch_bias, out)
    # In this order: a graph compiler cannot trace `triton_is_default`.
    fused = (
        not fault
        and not torch.compiler.is_compiling()
        and backend == "auto"
        and triton_is_default(x.device)
    )
    name = choose_backend("residual_norm", backend, "triton" if fused else "reference", BACKENDS)
    if name == "reference":
        return residual_norm_reference(x, branch, weight, bias, eps, out, branch_bias)
    if fault:
        raise ValueError(f"residual_norm: backend='triton': {fault}; backend='auto' takes any")
    return residual_norm_triton(x, branch, weight, bias, eps, out, branch_bias)


def _default_dtype(stream: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to which autocast casts the stream in a linear layer."""
    if stream == torch.float64 or not torch.is_autocast_enabled(device.type):
        return stream
    return torch.get_autocast_dtype(device.type)


def _triton_fault(
    x: Tensor, branch: Tensor | None, weight: Tensor, branch_bias: Tensor | None, out: torch.dtype
) -> str:
    """Why the kernels do not take a call; empty where they do."""
    dtypes = (
        x.dtype,
        weight.dtype,
        out,
        *(t.dtype for t in (branch, branch_bias) if t is not None),
    )
    odd = [dtype for dtype in dtypes if dtype not in KERNEL_DTYPES]
    if odd:
        return f"{odd[0]} is none of {', '.join(map(str, KERNEL_DTYPES))}"
    return (
        f"rows of {x.shape[-1]}, where at most {WIDEST} fit on chip" if x.shape[-1] > WIDEST else ""
    )


def _check(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, out_dtype: torch.dtype | None
) -> None:
    """Refuse wrong arguments; every message contains both values."""
    if (
        x.dim() == 0
        or weight.shape != x.shape[-1:]
        or bias.shape != weight.shape
        or x.shape[-1] == 0
    ):
        raise ValueError(
            f"residual_norm: x {tuple(x.shape)} must be [..., E] with E at least 1, "
            f"and weight {tuple(weight.shape)} and bias {tuple(bias.shape)} [E]"
        )
    if branch is not None and branch.shape != x.shape:
        raise ValueError(
            f"residual_norm: x is {tuple(x.shape)} but branch is {tuple(branch.shape)}; "
            "they must agree"
        )

    if weight.dtype != bias.dtype:
        raise ValueError(
            f"residual_norm: weight is {weight.dtype} but bias is {bias.dtype}; they must agree"
        )
    for name, t in (("branch", branch), ("weight", weight), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(
                f"residual_norm: x is on {x.device} but {name} is on {t.device}; they must agree"
            )
    if not all(t.is_floating_point() for t in (x, weight, *(() if branch is None else (branch,)))):
        raise ValueError(
            f"residual_norm: x is {x.dtype}, branch {None if branch is None else branch.dtype}, "
            f"weight {weight.dtype}; "
            "all must be floating point"
        )
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ValueError(
            f"residual_norm: out_dtype={out_dtype} must be floating point, as x is: {x.dtype}"
        )


def _check_branch_bias(branch: Tensor | None, branch_bias: Tensor | None) -> None:
    if branch is not None:
        check_bias("residual_norm", "branch", branch, branch_bias)
    elif branch_bias is not None:
        raise ValueError(
            f"residual_norm: branch is None but branch_bias is {tuple(branch_bias.shape)}; "
            "pass neither or both"
        )
