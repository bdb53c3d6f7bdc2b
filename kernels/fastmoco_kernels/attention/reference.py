"""Attention in plain torch: the reference, and the faster path for bf16 training on a CPU."""

from __future__ import annotations

from torch import Tensor

from fastmoco_kernels.backends import accumulation_dtype


def attention_explicit(q_BALd: Tensor, k_BAMd: Tensor, v_BAMd: Tensor) -> Tensor:
    """`softmax(q k^T / sqrt(d)) v` with the [B, A, L, M] weights in memory.

    Legend: A heads, L queries, M keys.
    """
    scores_BALM: Tensor = (q_BALd * q_BALd.shape[-1] ** -0.5) @ k_BAMd.transpose(-2, -1)
    weights_BALM = scores_BALM.softmax(dim=-1)
    return weights_BALM @ v_BAMd


def attention_reference(q_BALd: Tensor, k_BAMd: Tensor, v_BAMd: Tensor) -> Tensor:
    """The same in float32 or float64, rounded once at the end: the reference of every backend."""
    wide = accumulation_dtype(q_BALd)
    return attention_explicit(q_BALd.to(wide), k_BAMd.to(wide), v_BAMd.to(wide)).to(q_BALd.dtype)
