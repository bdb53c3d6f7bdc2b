"""The parts of a vision transformer: attention, MLP, block, and the two stems,
initialised as in MoCo v3.

Only the class token of the last block is read, so `Block.class_row` computes nothing else. It
multiplies the query with the key projection before the product with the tokens, and applies the
value projection to one weighted mean for each head instead of every token. That costs 2 A E
multiplications per token; a full block costs 12 E^2 and more.

`Block.recompute` selects the activations that are kept for the backward. "selective" keeps the
results of the matrix products and of attention, and computes layer norms and GELU again; torch
stops a recomputation at the last tensor that is needed, so no product runs twice. "full" keeps the
input of the block and computes everything again. All give the same bits.

Legend: B images, L tokens, E width, A heads, d = E / A.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastmoco.distributed.sync_batch_norm import BatchNorm, repeated_pass
from fastmoco.models.drop_path import scaled
from fastmoco.models.fused_block import Form, Weights, fused_block
from fastmoco.models.token_drop import taken
from fastmoco_kernels import attention, residual_norm
from fastmoco_kernels.attention.stacked import stacked_attention
from fastmoco_kernels.linear import linear

CONV_STEM_STRIDE = 16
"""Pixels per token of the convolutional stem, in each direction."""
Recompute = Literal["none", "selective", "full"]
"""Activations that the backward computes again instead of keeping them."""


def checkpointed(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    again: Callable[[], AbstractContextManager[None]] = nullcontext,
    *,
    draws: bool = True,
) -> Tensor:
    """`function(x)`, keeping only `x` for the backward, which calls it once more inside `again`.

    `draws`: whether the function may draw random numbers, which are then repeated.
    """
    out: Tensor = checkpoint(
        function,
        x,
        use_reentrant=False,
        preserve_rng_state=draws,
        context_fn=lambda: (nullcontext(), again()),
    )
    return out


class Linear(nn.Linear):
    """torch's linear layer, with the faster products on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., N]."""
        return linear(x, self.weight, self.bias)


def _linear(fan_in: int, fan_out: int, *, matrices: int = 1) -> nn.Linear:
    """A linear layer, Xavier-uniform for each of the `matrices` stacked by rows, bias 0."""
    layer = Linear(fan_in, fan_out)
    bound = math.sqrt(6 / (fan_in + fan_out // matrices))
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.zeros_(layer.bias)
    return layer


def xavier_(module: nn.Module) -> None:
    """Start a linear layer Xavier-uniform as one matrix, also where it stacks several, and its bias
    at 0; leave any other module as it is."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class LayerNorm(nn.LayerNorm):
    """torch's layer norm, with weights that may be narrower than the input.

    Sharded training gathers weights in bf16, and torch on a CPU needs one dtype for both. `add` is
    the norm inside a block, fused with the residual addition before it; `forward` is the norm after
    the last block.
    """

    def add(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`x + branch` and its norm, both [..., E]. The norm has the dtype of
        the product that reads it.
        """
        return residual_norm(x, branch, self.weight, self.bias, self.eps)

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        weight: Tensor = self.weight
        bias: Tensor = self.bias
        if weight.dtype.itemsize < x.dtype.itemsize:
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


class TokenBatchNorm(BatchNorm):
    """Batch norm over all tokens of the global batch, in place of the layer norm before an MLP
    ("ViT-BN" of the paper)."""

    def add(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """`x + branch` and its norm, both [..., E]."""
        x = sum_of(x, branch)
        normed: Tensor = self(x.reshape(-1, x.shape[-1]))
        return x, normed.view_as(x)


class Attention(nn.Module):
    """Multi-head self-attention; rows of `qkv` are grouped q, k, v, then by
    head. `backend`: see `attention`.
    """

    def __init__(self, width: int, num_heads: int, backend: str = "auto") -> None:
        super().__init__()
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = _linear(width, 3 * width, matrices=3)
        self.proj = _linear(width, width)

    def forward(self, x_BLE: Tensor, context_BK: Tensor | None = None) -> Tensor:
        """Every token attends to every token, or to those of the context alone: [B, L, E] ->
        [B, L, E].

        `context_BK`: numbers of the tokens that have keys and values; None: all.
        """
        if context_BK is None:
            return self.attend(self.qkv(x_BLE))
        return self.attend_to(self.queries(x_BLE), self.keys_values(taken(x_BLE, context_BK)))

    def queries(self, x_BLE: Tensor) -> Tensor:
        """The first third of `qkv` alone: [B, L, E] -> [B, L, E]."""
        E = x_BLE.shape[-1]
        return linear(x_BLE, self.qkv.weight[:E], self.qkv.bias[:E])

    def keys_values(self, x_BKE: Tensor) -> Tensor:
        """The other two thirds: [B, K, E] -> [B, K, 2 E]."""
        E = x_BKE.shape[-1]
        return linear(x_BKE, self.qkv.weight[E:], self.qkv.bias[E:])

    def attend_to(self, q_BLE: Tensor, kv_BKF: Tensor) -> Tensor:
        """Attention of queries to other tokens, and the output projection: [B, L, E]."""
        B, L, E = q_BLE.shape
        A = self.num_heads
        q = q_BLE.view(B, L, A, E // A).transpose(1, 2)
        k, v = kv_BKF.view(B, -1, 2, A, E // A).permute(2, 0, 3, 1, 4).unbind()
        attended = attention(q, k, v, backend=self.backend)
        out: Tensor = self.proj(attended.transpose(1, 2).reshape(B, L, E))
        return out

    def attend(self, qkv_BLF: Tensor) -> Tensor:
        """Attention of the stacked projections, and the output projection: [B,
        L, 3 E] -> [B, L, E].
        """
        attended = stacked_attention(qkv_BLF, self.num_heads, backend=self.backend)
        out: Tensor = self.proj(attended)
        return out

    def class_row(self, x_BLE: Tensor) -> Tensor:
        """Row 0 of `forward`, [B, E], without keys or values of the tokens.

        Per head, q . (W_k x_j + b_k) = (W_k^T q) . x_j + a constant that the softmax drops, and
        sum_j p_j (W_v x_j + b_v) = W_v (sum_j p_j x_j) + b_v because the p_j sum to 1.
        """
        B, _, E = x_BLE.shape
        A = self.num_heads
        d = E // A
        W_q, W_k, W_v = self.qkv.weight.view(3, E, E).unbind()
        b_q, _, b_v = self.qkv.bias.view(3, E).unbind()
        # Scores: the query is multiplied with the key projection before it meets the tokens.
        q_ABd = F.linear(x_BLE[:, 0], W_q, b_q).view(B, A, d).transpose(0, 1) * d**-0.5
        queries_BAE = torch.bmm(q_ABd, W_k.view(A, d, E)).transpose(0, 1)
        scores_BAL = torch.bmm(queries_BAE, x_BLE.transpose(1, 2))
        weights_BAL = scores_BAL.softmax(dim=-1)

        # Values: one weighted mean of the tokens for each head, then the value projection.
        means_ABE = torch.bmm(weights_BAL, x_BLE).transpose(0, 1)
        values_BE = (
            torch.bmm(means_ABE, W_v.view(A, d, E).transpose(1, 2)).transpose(0, 1).reshape(B, E)
        )
        out: Tensor = self.proj(values_BE + b_v)
        return out

    def class_weights(self, x_BLE: Tensor) -> Tensor:
        """The attention of row 0 to every token, [B, A, L]: rows of a softmax, in float32."""
        B, L, E = x_BLE.shape
        A = self.num_heads
        q_BA1d = self.queries(x_BLE[:, :1]).view(B, 1, A, E // A).transpose(1, 2)
        k_BALd = self.keys_values(x_BLE)[..., :E].view(B, L, A, E // A).transpose(1, 2)
        scores_BA1L = q_BA1d.float() @ k_BALd.float().transpose(2, 3) * (E // A) ** -0.5
        weights_BAL: Tensor = scores_BA1L.softmax(dim=-1)[:, :, 0]
        return weights_BAL


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = _linear(width, hidden)
        self.fc2 = _linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        return self.contract(self.fc1(x))

    def contract(self, hidden: Tensor) -> Tensor:
        """GELU and the second layer: [..., hidden] -> [..., E]."""
        out: Tensor = self.fc2(F.gelu(hidden))
        return out


class Block(nn.Module):
    """A pre-norm transformer block.

    Args:
        width: channels E.
        num_heads: attention heads A.
        mlp_hidden: hidden width of the MLP.
        attention_backend: see `Attention`.
        mlp_norm: norm before the MLP: "layer", or "batch" over all tokens of the global batch.

    Attributes:
        recompute: the activations that the backward computes again.
        hands_on_parts: whether the block returns the residual stream as two tensors, stream and
            branch, whose sum the next norm computes in its own pass over memory.
        fused: whether `forward` is a single autograd node (`fused_block`), which supports
            recomputing none and full.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_hidden: int,
        attention_backend: str = "auto",
        mlp_norm: Literal["layer", "batch"] = "layer",
    ) -> None:
        super().__init__()
        self.recompute: Recompute = "none"
        self.hands_on_parts = True
        self.fused = False
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, num_heads, attention_backend)
        self.norm2: LayerNorm | TokenBatchNorm = (
            LayerNorm(width, eps=1e-6) if mlp_norm == "layer" else TokenBatchNorm(width)
        )
        self.mlp = Mlp(width, mlp_hidden)

    def forward(
        self,
        x_BLE: Tensor,
        branch_BLE: Tensor | None = None,
        paths_B2: Tensor | None = None,
        context_BK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Stream and branch, [B, L, E] each, to stream and branch.

        `paths_B2`: factors of the branches of attention and MLP (`drop_path`); None: 1.
        `context_BK`: numbers of the tokens that are attended to, in their state before this block;
        None: all.
        """
        if self.fused:
            extra = paths_B2 is not None or context_BK is not None
            if extra or isinstance(self.norm2, BatchNorm):
                raise ValueError(
                    "blocks=fused: has neither drop_path nor mlp_norm=batch nor a context; use "
                    "blocks=modules"
                )
            return self._fused(x_BLE, branch_BLE)
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._whole(x_BLE, branch_BLE, paths_B2, context_BK)
        # Only the input of the block is kept: one tensor, the sum.
        x_BLE = sum_of(x_BLE, branch_BLE)
        if self.recompute == "full":
            whole = partial(self._whole, branch_BLE=None, paths_B2=paths_B2, context_BK=context_BK)
            return self._again(lambda x: sum_of(*whole(x)), x_BLE), None
        of_attention, of_mlp = _by_branch(paths_B2)
        attended = self._attended_again(x_BLE, context_BK)
        x_BLE = x_BLE + scaled(attended, of_attention)
        hidden = self._again(lambda x: self.mlp.fc1(self.norm2.add(x)[1]), x_BLE)
        return x_BLE + scaled(checkpointed(self.mlp.contract, hidden), of_mlp), None

    def _attended_again(self, x_BLE: Tensor, context_BK: Tensor | None) -> Tensor:
        """The branch of attention, whose norm the backward computes again."""

        def projected(by: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            return checkpointed(lambda rows: by(self.norm1.add(rows)[1]), x)

        if context_BK is None:
            return self.attn.attend(projected(self.attn.qkv, x_BLE))
        queries = projected(self.attn.queries, x_BLE)
        others = projected(self.attn.keys_values, taken(x_BLE, context_BK))
        return self.attn.attend_to(queries, others)

    def class_row(
        self, x_BLE: Tensor, branch_BLE: Tensor | None = None, paths_B2: Tensor | None = None
    ) -> Tensor:
        """Row 0 of the sum that `forward` returns: [B, E]. Cheap, so both ways of recomputing
        compute all of it again. For layer norms only: a batch norm needs every token.
        """
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._class_row(x_BLE, branch_BLE, paths_B2)
        return checkpointed(lambda x: self._class_row(x, None, paths_B2), sum_of(x_BLE, branch_BLE))

    def _again(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`checkpointed` for a function of the second norm. A batch norm has counted the batch in
        its running averages in the first pass."""
        again = repeated_pass if isinstance(self.norm2, BatchNorm) else nullcontext
        return checkpointed(function, x, again)

    def _whole(
        self,
        x_BLE: Tensor,
        branch_BLE: Tensor | None = None,
        paths_B2: Tensor | None = None,
        context_BK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        of_attention, of_mlp = _by_branch(paths_B2)
        x_BLE, normed = self.norm1.add(x_BLE, branch_BLE)
        x_BLE, normed = self.norm2.add(x_BLE, scaled(self.attn(normed, context_BK), of_attention))
        branch_BLE = scaled(self.mlp(normed), of_mlp)
        return (x_BLE, branch_BLE) if self.hands_on_parts else (x_BLE + branch_BLE, None)

    def _fused(self, x_BLE: Tensor, branch_BLE: Tensor | None) -> tuple[Tensor, Tensor]:
        norm1, norm2, attn, mlp = self.norm1, self.norm2, self.attn, self.mlp
        used: tuple[Any, ...] = (norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2)
        weights = Weights(*(tensor for module in used for tensor in (module.weight, module.bias)))
        form = Form(
            self.attn.num_heads,
            (self.norm1.eps, self.norm2.eps),
            self.attn.backend,
            remakes=self.recompute != "none",
        )
        return fused_block(x_BLE, branch_BLE, weights, form)

    def _class_row(
        self, x_BLE: Tensor, branch_BLE: Tensor | None = None, paths_B2: Tensor | None = None
    ) -> Tensor:
        of_attention, of_mlp = _by_branch(paths_B2)
        x_BLE, normed = self.norm1.add(x_BLE, branch_BLE)
        attended = scaled(self.attn.class_row(normed), of_attention)
        x_BE, normed_BE = self.norm2.add(x_BLE[:, 0], attended)
        return sum_of(x_BE, scaled(self.mlp(normed_BE), of_mlp))


def _by_branch(paths_B2: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The factors of attention and of the MLP."""
    return (None, None) if paths_B2 is None else (paths_B2[:, 0], paths_B2[:, 1])


def sum_of(x: Tensor, branch: Tensor | None) -> Tensor:
    """The residual stream as one tensor."""
    return x if branch is None else x + branch


class PatchStem(nn.Module):
    """One linear projection of non-overlapping patches, as a convolution."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        bound = math.sqrt(6 / (3 * patch_size**2 + width))
        nn.init.uniform_(self.proj.weight, -bound, bound)
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, E, H / p, W / p]."""
        out: Tensor = self.proj(images)
        return out

    def of_patches(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Some patches alone: [B, 3, H, W] and their numbers [B, k], row by row -> [B, k, E]."""
        side = self.proj.kernel_size[0]
        B, C, H, W = images.shape
        patches = images.view(B, C, H // side, side, W // side, side).permute(0, 2, 4, 1, 3, 5)
        rows = torch.arange(B, device=images.device)[:, None]
        some = patches[rows, numbers // (W // side), numbers % (W // side)]
        return F.linear(some.flatten(2), self.proj.weight.flatten(1), self.proj.bias)


class ConvStem(nn.Module):
    """Four 3x3 convolutions of stride 2 with batch norm and ReLU, then a 1x1
    convolution (Xiao et al. 2021).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = (3, width // 8, width // 4, width // 2, width)
        for before, after in pairwise(channels):
            layers.append(nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1, bias=False))
            layers.extend([BatchNorm(after), nn.ReLU(inplace=True)])
        self.proj = nn.Sequential(*layers, nn.Conv2d(width, width, kernel_size=1))

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, E, H / 16, W / 16]."""
        out: Tensor = self.proj(images)
        return out
