"""q, k, v of a stacked projection; the backward stacks their gradients and sums rows in one pass.

The three are views of the projection's output, so their gradients must be stacked into one tensor
before the projection's own backward, and the gradient of its bias is the sum over rows of that: two
passes in torch, 9 reads or writes of B L E numbers. One kernel reads the three gradients with any
strides, writes the stack, and sums what it writes: 6. The layer must detach its bias,
`F.linear(x, W, bias.detach())`, and `bias` is passed to `split_qkv`.

Legend: B images, L tokens, E width, A heads, d = E / A.
"""

from __future__ import annotations

from torch import Tensor

from fastmoco_kernels._bias_gradient import check_bias, kernels_are_default
from fastmoco_kernels.backends import KERNEL_DTYPES, choose_backend
from fastmoco_kernels.stacked_qkv.operator import split_qkv_triton
from fastmoco_kernels.stacked_qkv.reference import split_qkv_reference

BACKENDS = ("triton", "reference")


def split_qkv(
    qkv: Tensor, num_heads: int, bias: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k, v of a stacked projection; its backward also gives the layer's bias gradient.

    `q, k, v = qkv.view(B, L, 3, A, d).unbind(2)`, tokens and heads turned;
    `dbias = sum over rows of dqkv`

    Args:
        qkv: [B, L, 3 E] floating point: the result of `F.linear(x, W, bias.detach())`, columns
            grouped q, k, v, then by head. Without detach the bias would get its gradient twice.
        num_heads: A, a divisor of E.
        bias: [3 E] floating point, the parameter, on qkv's device. The forward does not read it.
            None: views alone.
        backend: `"auto"` (triton on CUDA, under torch.compile too; reference elsewhere and for
            float64), `"triton"` or `"reference"`.

    Returns:
        q, k, v: [B, A, L, d] each, views of qkv's memory, not to be written to; differentiable in
        qkv and bias (by triton once). Their gradients may have any strides.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together, or a backend that does
            not run here.

    Numerics: the stack is copied bit by bit. dbias sums it as it is stored, as torch's linear layer
        does: `triton` in float32, then rounded to the bias's dtype, the same bits every time on one
        GPU and one tile; `reference` gives torch's bits (of 16-bit rows its sum is rounded to 16
        bits).
    Memory and cost: nothing is kept. `cost.split_qkv_backward_bytes`: 12 B L E bytes of 16-bit
        numbers, where torch's stack and sum move 18 (`cost.eager_backward_bytes`). Empty inputs are
        allowed.
    Distributed: none.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import split_qkv
        >>> q, k, v = split_qkv(torch.arange(24.0).view(1, 2, 12), num_heads=2)
        >>> q.shape, k[0, 0, 0].tolist()
        (torch.Size([1, 2, 2, 2]), [4.0, 5.0])
    """
    _check(qkv, num_heads, bias)
    fits = qkv.dtype in KERNEL_DTYPES and (bias is None or bias.dtype in KERNEL_DTYPES)
    fused = backend == "auto" and fits and kernels_are_default(qkv.device)
    name = choose_backend("split_qkv", backend, "triton" if fused else "reference", BACKENDS)
    if name == "reference":
        return split_qkv_reference(qkv, num_heads, bias)
    if not fits:
        raise ValueError(
            f"split_qkv: backend='triton': qkv is {qkv.dtype}, bias "
            f"{None if bias is None else bias.dtype}; each must be "
            f"one of {', '.join(map(str, KERNEL_DTYPES))}; backend='auto' takes any"
        )
    return split_qkv_triton(qkv, num_heads, bias)


def _check(qkv: Tensor, num_heads: int, bias: Tensor | None) -> None:
    """Refuse wrong arguments; every message contains both values."""
    if qkv.dim() != 3 or not qkv.is_floating_point():
        raise ValueError(
            f"split_qkv: qkv is {qkv.dtype} {tuple(qkv.shape)}; it must be floating point, [B, "
            "L, 3 E]"
        )
    if num_heads < 1 or qkv.shape[2] == 0 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"split_qkv: qkv has {qkv.shape[2]} columns and num_heads={num_heads}; "
            "three times the heads must divide them"
        )
    check_bias("split_qkv", "qkv", qkv, bias)
