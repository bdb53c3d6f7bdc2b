"""Attention by other libraries: each of torch's kernels, flash-attention 4, and xformers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

_KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "fa4": SDPBackend.FLASH_ATTENTION,
}


def attention_by_kernel(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One kernel of torch's scaled_dot_product_attention; torch raises if it refuses the call.

    From its first use on, flash-attention 4 replaces torch's flash kernel in the whole process:
    torch's switch is global, so `"flash"` and `"sdpa"` then run it too.

    Args:
        name: `"flash"`, `"cudnn"`, `"efficient"` or `"fa4"`.
        q: [B, A, L, d] on CUDA.
        k: [B, A, M, d].
        v: [B, A, M, d].
    """
    if name == "fa4" and not torch.compiler.is_compiling():
        _activate_fa4()
    with sdpa_kernel(_KERNELS[name]):
        return scaled_dot_product_attention(q, k, v)


def _activate_fa4() -> None:
    from torch.nn import attention

    if attention.current_flash_attention_impl() != "FA4":
        attention.activate_flash_attention_impl("FA4")


def attention_by_xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """xformers' memory_efficient_attention, whose layout is rows before heads; views, no copies."""
    from xformers.ops import memory_efficient_attention

    out: Tensor = memory_efficient_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    )
    return out.transpose(1, 2)
