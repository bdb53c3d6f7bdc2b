"""Attention for vision transformers, the backend chosen by device, dtype and shape.

The backend is chosen in `choice.py`, logged once with the reason, and can be named by the caller.
`sdpa` is torch's scaled_dot_product_attention. In bf16 on a CPU, torch's kernel trains slower than
the explicit softmax(q k^T) v (`benchmarks run attention` measures by how much), so `"auto"` takes
the explicit form there. For short sequences of many heads (ViT-S of MoCo v3: 197 tokens, 12 heads
of 32) `triton` keeps all of one head's keys on chip: an exact softmax without rescaling, 208
columns computed for 197 where a kernel with tiles of 128 computes 256, and a backward without
atomics that gives the same bits every time. It has not been measured on a GPU yet, and is taken
only by name.

Distributed: none.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastmoco_kernels.attention.choice import BACKENDS, announce, default_backend
from fastmoco_kernels.attention.external import attention_by_kernel, attention_by_xformers
from fastmoco_kernels.attention.reference import attention_explicit, attention_reference
from fastmoco_kernels.attention.short import short_attention
from fastmoco_kernels.backends import choose_backend


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto") -> Tensor:
    """Multi-head attention, `softmax(q k^T / sqrt(d)) v` (Vaswani et al. 2017, Eq. 1).

    Args:
        q: [B, A, L, d] floating point, any stride: A heads of dimension d, L queries.
        k: [B, A, M, d], same dtype and device: M keys. L may be smaller than M (queries of the
            class token alone).
        v: [B, A, M, d], same dtype and device.
        backend: `"auto"`, or one of `choice.BACKENDS` by name.

    Returns:
        [B, A, L, d] in the dtype of `q`, differentiable in all three inputs. Under autocast: in
        autocast's dtype, to which float32 and narrower inputs are cast first, as torch does for its
        own attention.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit together, an unknown backend, or
            one that does not run here; the message contains the reason and the cure.

    Numerics: no dropout, no mask. `triton` accumulates in float32 and rounds the weights to the
        inputs' dtype before they meet v, as flash attention does; reproducible bit by bit.
        `reference` computes in float32 or wider.
    Memory and cost: `cost.attention_flops` and `cost.attention_bytes`: 4 B A L M d FLOPs forward,
        10 backward. `explicit` keeps the [B, A, L, M] weights for the backward; `triton` 4 bytes a
        query.
    Distributed: none.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import attention
        >>> attention(*torch.ones(3, 2, 4, 5, 8)).shape
        torch.Size([2, 4, 5, 8])
    """
    _check(q, k, v)
    q, k, v = cast_by_autocast(q, k, v)
    name = choose_backend("attention", backend, default_backend(q.device, q.dtype), BACKENDS)
    if not torch.compiler.is_compiling():
        announce(q.device, q.dtype, q.shape[2], k.shape[2], q.shape[3], backend)
    if name == "sdpa":
        return scaled_dot_product_attention(q, k, v)
    if name == "explicit":
        return attention_explicit(q, k, v)
    if name == "triton":
        return short_attention(q, k, v)
    if name == "xformers":
        return attention_by_xformers(q, k, v)
    if name == "reference":
        with torch.autocast(q.device.type, enabled=False):
            return attention_reference(q, k, v)
    return attention_by_kernel(name, q, k, v)


def cast_by_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Inputs in autocast's dtype where autocast is on; float64 stays, as everywhere in torch."""
    kind = tensors[0].device.type
    if tensors[0].dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) for t in tensors)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse wrong arguments; every message contains both values."""
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} must be [B, "
            "A, L, d] and twice [B, A, M, d]"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(
            f"attention: q {tuple(q.shape)} and k {tuple(k.shape)} must have at least one row each"
        )
    if not (
        q.is_floating_point() and q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
    ):
        raise ValueError(
            f"attention: q is {q.dtype} on {q.device}, k {k.dtype} on {k.device}, "
            f"v {v.dtype} on {v.device}; "
            "they must agree, and be floating point"
        )
