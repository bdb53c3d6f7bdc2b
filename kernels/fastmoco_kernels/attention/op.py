"""The one place that decides who computes attention.

``sdpa`` is torch's scaled_dot_product_attention (flash, cuDNN or memory-efficient on CUDA). ``explicit`` writes
softmax(q k^T) v out. In bf16 on a CPU torch's kernel trains three to nine times slower than the explicit form, so
``"auto"`` takes the explicit form there, and ``sdpa`` everywhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastmoco_kernels._runtime import choose_backend
from fastmoco_kernels.attention.reference import attention_reference


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto") -> Tensor:
    """Multi-head scaled dot-product attention, ``softmax(q k^T / sqrt(d)) v`` (Vaswani et al. 2017, Eq. 1).

    Args:
        q: [B, A, L, d] floating point, any stride: A heads of dimension d, L queries.
        k: [B, A, M, d], same dtype and device: M keys. L may be smaller than M (a class token alone asks).
        v: [B, A, M, d], same dtype and device.
        backend: ``"auto"``, ``"sdpa"`` or ``"explicit"``.

    Returns:
        [B, A, L, d] in the dtype of ``q``, differentiable in all three inputs.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together, or an unknown backend.

    Numerics: no dropout, no mask; the backends agree to a few units in the last place.
    Memory and cost: 4 B A L M d FLOPs forward; ``explicit`` keeps the [B, A, L, M] weights for the backward.
    Distributed: none.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import attention
        >>> attention(*torch.ones(3, 2, 4, 5, 8)).shape
        torch.Size([2, 4, 5, 8])
    """
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be [B, A, L, d] and twice [B, A, M, d]"
        )
    if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
        raise ValueError(
            f"attention: q is {q.dtype} on {q.device}, k {k.dtype} on {k.device}, v {v.dtype} on {v.device}; they must agree"
        )
    if choose_backend("attention", backend, _default(q), ("sdpa", "explicit")) == "explicit":
        return attention_reference(q, k, v)
    return scaled_dot_product_attention(q, k, v)


def _default(q: Tensor) -> str:
    """What ``"auto"`` means for these inputs."""
    return "explicit" if q.device.type == "cpu" and q.dtype == torch.bfloat16 else "sdpa"
