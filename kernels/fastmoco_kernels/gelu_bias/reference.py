"""GELU in plain torch, with the bias gradient as torch's linear layer sums it: the reference."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastmoco_kernels._bias_gradient import pass_bias_gradient


def gelu_reference(h: Tensor, bias: Tensor | None) -> Tensor:
    """`h * Phi(h)` with the normal distribution's Phi (Hendrycks and Gimpel 2016), exact.

    Args:
        h: [..., F].
        bias: [F], or None.
    """
    return F.gelu(pass_bias_gradient(h, bias))
