"""Global response normalization (Woo et al. 2023, ConvNeXt V2, section 3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

EPS = 1e-6
Scope = Literal["image", "batch"]
"""Positions over which a norm is taken: those of one image, or of all images of the call."""


class GRN(nn.Module):
    """`gamma (x N) + beta + x` with `N = G / (mean over channels of G + 1e-6)`, where `G` is the
    2-norm of a channel over the positions of an image.

    `gamma` and `beta` start at zero, so the layer starts as the identity.

    Args:
        width: channels C.

    Attributes:
        gamma: [1, 1, 1, C], as in published files.
        beta: likewise.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, width))

    def forward(self, x: Tensor, scope: Scope = "image") -> Tensor:
        """[B, H, W, C] -> [B, H, W, C], norms in at least float32.

        Computed as `x (1 + gamma N) + beta`, in one pass over `x` after the norm.

        Args:
            x: a position that counts in no norm must be zero.
            scope: "batch" takes one norm over the positions of all images, as the sparse layer of
                the official PyTorch release does; it couples the images.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        axes = (1, 2) if scope == "image" else (0, 1, 2)
        response = torch.linalg.vector_norm(x, dim=axes, keepdim=True, dtype=wide)
        relative = response / (response.mean(-1, keepdim=True) + EPS)
        scale = 1 + self.gamma.to(wide) * relative
        return torch.addcmul(self.beta.to(x.dtype), x, scale.to(x.dtype))

    def plain(self, x: Tensor) -> Tensor:
        """Reference of `forward` for one image each, as the paper writes it."""
        response = x.square().sum((1, 2), keepdim=True).sqrt()
        relative = response / (response.mean(-1, keepdim=True) + EPS)
        return self.gamma * (x * relative) + self.beta + x
