"""Decoders: that of MAE (He et al. 2022), from the tokens that the encoder saw to a prediction for
every patch; and a linear one for encoders that have all tokens.

Legend: B images, L patches, K of them seen, T = K and the class token, E width of the encoder, D of
the decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmoco.config.model import Positions
from fastmoco.models.blocks import Block, LayerNorm, Linear, Recompute, sum_of, xavier_
from fastmoco.models.encoder import Parts
from fastmoco.models.positions import FIXED_POSITIONS


class LinearDecoder(nn.Module):
    """A layer norm and a linear layer on each token, for encoders that see mask tokens or context
    themselves. The linear layer starts normal with deviation 0.02, its bias at 0.

    Args:
        in_dim: E.
        out_dim: numbers that are predicted for a token.
    """

    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(in_dim, eps=1e-6)
        self.pred = Linear(in_dim, out_dim)
        nn.init.normal_(self.pred.weight, std=0.02)
        nn.init.zeros_(self.pred.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[..., E] -> [..., out_dim]."""
        predicted: Tensor = self.pred(self.norm(tokens))
        return predicted


class TokenDecoder(nn.Module):
    """Transformer blocks over all patches, with one trained token in place of each that is masked.

    A linear layer maps the encoder's tokens to width D, mask tokens fill the rest, fixed positions
    are added, then come blocks, a layer norm and a linear layer; the class token's row is left out.
    Starts as MAE: every linear layer Xavier-uniform as one matrix (`xavier_`), mask token normal
    with deviation 0.02.

    Args:
        in_dim: E.
        grid: patches per side.
        width: D, divisible by `num_heads` and by 4.
        depth: number of blocks.
        num_heads: attention heads.
        out_dim: numbers that are predicted for a patch.
        class_tokens: tokens of the encoder in front of those of patches, 0 or 1.
        positions: the fixed table, "sincos_columns" of MAE or "sincos" of MoCo v3.
        attention: backend of `fastmoco_kernels.attention`.

    Raises:
        ValueError: naming the number that does not fit.
    """

    def __init__(
        self,
        *,
        in_dim: int,
        grid: int,
        width: int,
        depth: int,
        num_heads: int,
        out_dim: int,
        class_tokens: int = 1,
        positions: Positions = "sincos_columns",
        attention: str = "auto",
    ) -> None:
        super().__init__()
        if depth < 1 or num_heads < 1:
            raise ValueError(f"depth={depth}, num_heads={num_heads}: a decoder needs at least 1")
        if width < 4 or width % num_heads or width % 4:
            raise ValueError(
                f"width={width}: must be a multiple of num_heads={num_heads}, and of 4"
            )
        self.class_tokens = class_tokens
        self.embed = Linear(in_dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
        table = FIXED_POSITIONS[positions](grid, width)[1 - class_tokens :]
        self.pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.blocks = nn.ModuleList(
            Block(width, num_heads, 4 * width, attention) for _ in range(depth)
        )
        self.norm = LayerNorm(width, eps=1e-6)
        self.pred = Linear(width, out_dim)
        self.apply(xavier_)

    def forward(self, latents: Tensor, kept: Tensor) -> Tensor:
        """Predictions of all patches, row by row.

        Args:
            latents: [B, T, E], class token first.
            kept: [B, K] numbers of the patches of the other rows.

        Returns:
            [B, L, out_dim].
        """
        first = self.class_tokens
        rows = self.embed(latents)
        everywhere = self.mask_token.to(rows.dtype).expand(
            len(rows), self.pos_embed.shape[1] - first, -1
        )
        places = kept[:, :, None].expand(-1, -1, rows.shape[2])
        patches = everywhere.scatter(1, places, rows[:, first:])
        tokens = torch.cat([rows[:, :first], patches], dim=1) + self.pos_embed
        branch = None
        for block in self.blocks:
            tokens, branch = block(tokens, branch)
        return self._predicted(sum_of(tokens, branch))

    def plain(self, latents: Tensor, kept: Tensor) -> Tensor:
        """Reference of `forward`: mask tokens are appended, then all are put in their places."""
        first, count = self.class_tokens, self.pos_embed.shape[1] - self.class_tokens
        rows = self.embed(latents)
        masked = [[i for i in range(count) if i not in ids] for ids in map(set, kept.tolist())]
        order = torch.cat([kept, torch.tensor(masked, dtype=torch.int64).to(kept.device)], dim=1)
        filled = torch.cat([rows[:, first:], self.mask_token.expand(len(rows), count, -1)], dim=1)
        restored = [own[:count][ids] for own, ids in zip(filled, order.argsort(dim=1), strict=True)]
        tokens = torch.cat([rows[:, :first], torch.stack(restored)], dim=1) + self.pos_embed
        for block in self.blocks:
            tokens = sum_of(*block(tokens))
        return self._predicted(tokens)

    def _predicted(self, tokens: Tensor) -> Tensor:
        predicted: Tensor = self.pred(self.norm(tokens))[:, self.class_tokens :]
        return predicted

    def recompute(self, what: Recompute) -> None:
        """Choose which activations the backward computes again; see `blocks`."""
        for block in self.blocks:
            assert isinstance(block, Block)  # noqa: S101 - a type: all blocks are of this class
            block.recompute = what

    def forward_flops(self) -> float:
        """FLOPs of the products in one forward of one image."""
        tokens, width = self.pos_embed.shape[1:]
        layers = (self.embed, self.blocks, self.pred)
        weights = sum(p.numel() for layer in layers for p in layer.parameters())
        return float(2 * weights * tokens + 4 * tokens**2 * width * len(self.blocks))

    def parts(self) -> Parts:
        """Modules by role; it has no heads that could be apart from its blocks."""
        return Parts(blocks=self.blocks)
