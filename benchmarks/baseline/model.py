"""MoCo v3 (Chen, Xie, He 2021) on a vision transformer, in plain PyTorch.

Every block computes every token, and each view passes an encoder alone. Parameters have the names
of fastmoco's objective.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from fastmoco_pipelines.loading.step_parts import EMA, KEY_FORWARD, LOSS, QUERY_FORWARD, part

AttentionForm = Literal["sdpa", "explicit"]


class Attention(nn.Module):
    """Multi-head self-attention, by torch's fused function or written out."""

    def __init__(self, dim: int, num_heads: int, form: AttentionForm) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.form = form
        self.scale = (dim // num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, E] -> [B, L, E]."""
        B, L, E = x.shape
        qkv = self.qkv(x).reshape(B, L, 3, self.num_heads, E // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.form == "sdpa":
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            x = ((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1) @ v
        out: Tensor = self.proj(x.transpose(1, 2).reshape(B, L, E))
        return out


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[..., E] -> [..., E]."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, dim: int, num_heads: int, form: AttentionForm) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, form)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, E] -> [B, L, E]."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbed(nn.Module):
    """Patches to tokens by one convolution."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, L, E]."""
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return out


def sincos_table(grid: int, dim: int) -> Tensor:
    """[1, 1 + grid * grid, dim]: zeros for the class token, then sine and cosine of the row and of
    the column."""
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    rows, columns = torch.meshgrid(
        torch.arange(grid, dtype=torch.float32),
        torch.arange(grid, dtype=torch.float32),
        indexing="ij",
    )
    row, column = rows.flatten()[:, None] * omega, columns.flatten()[:, None] * omega
    table = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)
    return torch.cat([torch.zeros(1, dim), table])[None]


class VisionTransformer(nn.Module):
    """The ViT of MoCo v3: fixed positions, class token, `head` is the projector."""

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        dim: int,
        depth: int,
        num_heads: int,
        head: nn.Module,
        freeze_patch_embed: bool = True,
        attention: AttentionForm = "sdpa",
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(
            sincos_table(image_size // patch_size, dim), requires_grad=False
        )
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.blocks = nn.Sequential(*(Block(dim, num_heads, attention) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self._initialise(patch_size, dim)
        self.head = head
        if freeze_patch_embed:
            self.patch_embed.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D], the projection of the class token."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        out: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return out

    def features(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, E], the class token before the projector."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        out: Tensor = self.norm(self.blocks(x))[:, 0]
        return out

    def _initialise(self, patch_size: int, dim: int) -> None:
        """Xavier-uniform, with q, k and v as three matrices; biases 0."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                if name.endswith("qkv"):
                    bound = math.sqrt(6 / (2 * dim))
                    nn.init.uniform_(module.weight, -bound, bound)
                else:
                    nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.cls_token, std=1e-6)
        bound = math.sqrt(6 / (3 * patch_size**2 + dim))
        nn.init.uniform_(self.patch_embed.proj.weight, -bound, bound)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)


def mlp_head(layers: int, in_dim: int, hidden: int, out_dim: int) -> nn.Sequential:
    """Linear layers without bias, each followed by a batch norm; the last norm has no weights."""
    modules: list[nn.Module] = []
    for layer in range(layers):
        last = layer == layers - 1
        before, after = hidden if layer else in_dim, out_dim if last else hidden
        modules.append(nn.Linear(before, after, bias=False))
        modules.append(nn.BatchNorm1d(after, affine=not last))
        if not last:
            modules.append(nn.ReLU(inplace=True))
    return nn.Sequential(*modules)


class MoCo(nn.Module):
    """Encoder, momentum encoder and predictor; `forward` is one step up to the loss.

    Args:
        build_encoder: called twice.
        predictor: of the queries.
        temperature: divides the cosines.
    """

    def __init__(
        self, build_encoder: Callable[[], nn.Module], predictor: nn.Module, temperature: float
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.encoder = build_encoder()
        self.momentum_encoder = build_encoder()
        self.predictor = predictor
        for own, average in zip(
            self.encoder.parameters(), self.momentum_encoder.parameters(), strict=True
        ):
            average.data.copy_(own.data)
            average.requires_grad = False
        # What `forward` calls. `compile` replaces it.
        self.query_of: Callable[[Tensor], Tensor] = lambda x: self.predictor(self.encoder(x))
        self.key_of: Callable[[Tensor], Tensor] = lambda x: self.momentum_encoder(x)
        self.loss_of: Callable[[Tensor, Tensor], Tensor] = self.contrast

    def compile_parts(self) -> None:
        """Both encoders and the loss through torch.compile; one graph serves both views."""
        self.query_of = torch.compile(self.query_of, dynamic=False)
        self.key_of = torch.compile(self.key_of, dynamic=False)
        self.loss_of = torch.compile(self.loss_of, dynamic=False)

    def forward(self, view1: Tensor, view2: Tensor, ema_momentum: float) -> Tensor:
        """The loss of two views; also moves the momentum encoder, between queries and keys."""
        with part(QUERY_FORWARD):
            q1, q2 = self.query_of(view1), self.query_of(view2)
        with torch.no_grad():
            with part(EMA):
                self.update_momentum_encoder(ema_momentum)
            with part(KEY_FORWARD):
                k1, k2 = self.key_of(view1), self.key_of(view2)
        with part(LOSS):
            return self.loss_of(q1, k2) + self.loss_of(q2, k1)

    @torch.no_grad()
    def update_momentum_encoder(self, momentum: float) -> None:
        """Tensor by tensor: parameters only, not the buffers."""
        for own, average in zip(
            self.encoder.parameters(), self.momentum_encoder.parameters(), strict=True
        ):
            average.mul_(momentum).add_(own, alpha=1 - momentum)

    def contrast(self, q: Tensor, k: Tensor) -> Tensor:
        """`2 * temperature * CE(q k^T / temperature)`, [B, D] each; negatives of all ranks."""
        with torch.autocast(q.device.type, enabled=False):
            if q.dtype.itemsize < 4:
                q, k = q.float(), k.float()
            q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
            labels = torch.arange(len(q), device=q.device)
            if dist.is_initialized() and dist.get_world_size() > 1:
                parts = [torch.empty_like(k) for _ in range(dist.get_world_size())]
                dist.all_gather(parts, k.contiguous())
                k = torch.cat(parts)
                labels += dist.get_rank() * len(q)
            logits = q @ k.T / self.temperature
            return F.cross_entropy(logits, labels) * (2 * self.temperature)


class CPUSyncBatchNorm(nn.BatchNorm1d):
    """Batch norm over all ranks on a CPU, where torch's SyncBatchNorm does not train."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C] -> [B, C], with equal batches on all ranks."""
        if not self.training:
            return super().forward(x)
        assert self.num_batches_tracked is not None  # noqa: S101 - a type: norms here keep statistics
        self.num_batches_tracked += 1
        count = len(x) * dist.get_world_size()
        mean = all_reduce(x.sum(0)) / count  # type: ignore[no-untyped-call]
        squares = all_reduce((x - mean).square().sum(0))  # type: ignore[no-untyped-call]
        var = squares / count
        with torch.no_grad():
            assert self.running_mean is not None  # noqa: S101 - a type: norms here keep statistics
            assert self.running_var is not None  # noqa: S101 - a type: norms here keep statistics
            assert self.momentum is not None  # noqa: S101 - a type: norms here keep statistics
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        x = (x - mean) * torch.rsqrt(var + self.eps)
        return x * self.weight + self.bias if self.affine else x


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with batch norms over all ranks."""
    if device.type == "cuda":
        convert: Callable[[nn.Module], nn.Module] = nn.SyncBatchNorm.convert_sync_batchnorm
        return convert(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.__class__ = CPUSyncBatchNorm
    return model
