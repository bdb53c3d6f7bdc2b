"""Class attention (Touvron et al. 2021, CaiT): blocks in which a class token reads the patch tokens,
which do not change.

Legend: B images, L patch tokens, E width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastmoco.models.blocks import Block, sum_of


class ClassBlock(Block):
    """One such block: `z += g1 * attention(norm1(z), norm1([z; X]))`, `z += g2 * mlp(norm2(z))`.

    z is the class token, X the patch tokens. Only z asks, and all tokens are keys and values; g1
    and g2 scale channels. Weights are those of a block, q, k and v in one matrix, each of which
    starts Xavier-uniform by itself. No branch is ever left out: it has no stochastic depth.

    Args:
        width: E.
        num_heads: attention heads.
        mlp_hidden: hidden width of the MLP.
        scale: start value of g1 and g2.
    """

    def __init__(self, width: int, num_heads: int, mlp_hidden: int, *, scale: float = 0.1) -> None:
        super().__init__(width, num_heads, mlp_hidden)
        self.gamma_1 = nn.Parameter(torch.full((width,), scale))
        self.gamma_2 = nn.Parameter(torch.full((width,), scale))

    def read(self, token_BE: Tensor, patches_BLE: Tensor) -> Tensor:
        """The class token [B, E] after the block; keys and values of patch tokens are not computed
        (`Attention.class_row`)."""
        return self.class_row(torch.cat([token_BE[:, None], patches_BLE], dim=1))

    def plain(self, token_BE: Tensor, patches_BLE: Tensor) -> Tensor:
        """Reference of `read`: attention of every token, of which the first row is taken."""
        every = torch.cat([token_BE[:, None], patches_BLE], dim=1)
        token = token_BE + self.gamma_1 * self.attn(self.norm1(every))[:, 0]
        out: Tensor = token + self.gamma_2 * self.mlp(self.norm2(token))
        return out

    def _class_row(
        self, x_BLE: Tensor, branch_BLE: Tensor | None = None, paths_B2: Tensor | None = None
    ) -> Tensor:
        x_BLE, normed = self.norm1.add(x_BLE, branch_BLE)
        attended = self._scaled(self.gamma_1, self.attn.class_row(normed))
        x_BE, normed_BE = self.norm2.add(x_BLE[:, 0], attended)
        return sum_of(x_BE, self._scaled(self.gamma_2, self.mlp(normed_BE)))

    @staticmethod
    def _scaled(gamma: Tensor, branch: Tensor) -> Tensor:
        """A branch times its factors, in its own dtype."""
        return (gamma * branch).to(branch.dtype)
