"""The decoder of FCMAE (Woo et al. 2023, section 2): from a map whose hidden positions are zero to a
prediction for every position.

Legend: B images, E channels of the encoder, D of the decoder, h and w positions, L = h w.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmoco.models.blocks import Recompute
from fastmoco.models.convnextv2 import ConvNeXtV2Block, start_
from fastmoco.models.encoder import Parts


class MapDecoder(nn.Module):
    """ConvNeXt V2 blocks over all positions, with one trained token in place of each hidden one.

    A 1x1 convolution maps the encoder's channels to width D, the mask token fills hidden positions,
    then come blocks, whose norms are of one image, and a 1x1 convolution. Parameters have the names
    of the official code: `proj`, `mask_token`, `decoder.0.dwconv`, `pred`. Weights start as those of
    the encoder, the mask token normal with deviation 0.02.

    Args:
        in_dim: E.
        width: D.
        depth: number of blocks.
        out_dim: numbers that are predicted for a position.

    Raises:
        ValueError: naming the number that does not fit.
    """

    def __init__(self, *, in_dim: int, width: int, depth: int, out_dim: int) -> None:
        super().__init__()
        if width < 1 or depth < 1:
            raise ValueError(f"width={width}, depth={depth}: a decoder needs at least 1")
        self.proj = nn.Conv2d(in_dim, width, kernel_size=1)
        self.mask_token = nn.Parameter(torch.empty(1, width, 1, 1).normal_(std=0.02))
        self.decoder = nn.Sequential(*(ConvNeXtV2Block(width) for _ in range(depth)))
        self.pred = nn.Conv2d(width, out_dim, kernel_size=1)
        self.apply(start_)

    def forward(self, latents: Tensor, mask: Tensor) -> Tensor:
        """Predictions of all positions, row by row.

        Args:
            latents: [B, E, h, w].
            mask: [B, L] bool, True where hidden.

        Returns:
            [B, L, out_dim].
        """
        x: Tensor = self.proj(latents)
        hidden = mask.view(len(x), 1, *x.shape[2:])
        x = torch.where(hidden, self.mask_token.to(x.dtype), x)
        predicted: Tensor = self.pred(self.decoder(x))
        return predicted.flatten(2).transpose(1, 2)

    def plain(self, latents: Tensor, mask: Tensor) -> Tensor:
        """Reference of `forward`, as the official code fills the map."""
        x: Tensor = self.proj(latents)
        hidden = mask.to(x.dtype).view(len(x), 1, *x.shape[2:])
        x = x * (1 - hidden) + self.mask_token * hidden
        for block in self._blocks():
            x = block.plain(x)
        predicted: Tensor = self.pred(x)
        return predicted.flatten(2).transpose(1, 2)

    def recompute(self, what: Recompute) -> None:
        """Choose which activations the backward computes again, "none" or "full"."""
        for block in self._blocks():
            block.recompute = what

    def parts(self) -> Parts:
        """Modules by role; it has no heads that could be apart from its blocks."""
        return Parts(blocks=nn.ModuleList(self._blocks()), alike=False)

    def _blocks(self) -> list[ConvNeXtV2Block]:
        return [block for block in self.decoder if isinstance(block, ConvNeXtV2Block)]
