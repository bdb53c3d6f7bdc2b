"""Stochastic depth (Huang et al. 2016), per image and residual branch, as timm and DeiT use it.

A draw is an input of the trunk, not a state of it: the factors of a step are a function of seed,
step and the image's row in the global batch. A second pass of a chunk, a recomputed block, a
resumed run and another number of ranks therefore use the same draws.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fastmoco.distributed.mesh import group_rank, group_size
from fastmoco_kernels.tensors import sent


class PathDraws:
    """Factors of the residual branches of a step: 0 where a branch is left out, otherwise
    1 / (1 - rate of the block), so that the mean over draws is the branch.

    The rate rises linearly from 0 in the first block to `rate` in the last one.

    Args:
        rate: of the last block, in (0, 1).
        depth: number of blocks.
        seed: of the run.
    """

    def __init__(self, rate: float, depth: int, seed: int) -> None:
        if not 0 < rate < 1:
            raise ValueError(f"drop_path={rate}: must be in (0, 1)")
        self.rates = torch.linspace(0, rate, depth, dtype=torch.float64, device="cpu")
        self.seed = seed

    def __call__(self, images: int, views: int, step: int, device: torch.device) -> Tensor:
        """The factors of this rank's images.

        Args:
            images: of this rank; every rank has equally many.
            views: of an image.
            step: optimizer steps done before this one.
            device: of the result.

        Returns:
            [images, views, depth, 2] float32; the last dimension is attention and MLP. Blocks with
            one branch take the first.
        """
        # Ranks draw for the whole batch and take their rows: 400,000 numbers for ViT-B at 4096.
        name = hashlib.sha256(f"drop_path {self.seed} {step}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(name[:8], "little") >> 1)
        shape = (images * group_size(), views, len(self.rates), 2)
        draws = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32)
        own = draws[group_rank() * images :][:images].double()

        rates = self.rates[:, None]
        return sent(((own >= rates) / (1 - rates)).float(), device)


def scaled(branch: Tensor, factors: Tensor | None) -> Tensor:
    """A residual branch [B, ..., E] times the factors of its images [B], in its own dtype."""
    if factors is None:
        return branch
    return (branch * factors.view(-1, *[1] * (branch.ndim - 1))).to(branch.dtype)
