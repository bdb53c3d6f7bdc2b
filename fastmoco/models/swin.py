"""The Swin Transformer (Liu et al. 2021): attention inside windows, which every second block shifts,
in stages that halve the map and double the width.

Parameter names are those of the published files: `patch_embed.{proj,norm}`,
`layers.{s}.blocks.{b}.{norm1,attn,norm2,mlp}`, `layers.{s}.downsample.{norm,reduction}`, `norm`. The
feature is the mean of the tokens after the last norm. No image sees another one.

A block reorders tokens once into windows and once back (`Windows`): one gather does roll, padding
and partition, the other one undoes all three. Windows are heads to attention, whose additive mask is
the relative position bias, and in shifted windows -100 between tokens that are no neighbours. The
reference is `plain`, with `torch.roll`, padding and a softmax that is written out.

Window and shift of a block follow from the image size of the construction: with R the side of its
stage's map and M the window, a stage of R <= M has windows of R and no shift, any other has windows
of M, of which those of odd blocks are shifted by M // 2. Views of other sizes keep both and are
padded with zeros at the bottom and on the right, after the first norm of a block and before the norm
of a merging (EsViT, Li et al. 2022). Padded tokens are keys and values like others.

`swin_nano` is our own, for images of 8 to 64 pixels on a CPU: two stages of two blocks, widths 32
and 64, and patches of 2 pixels.

Legend: B images, L tokens of a map, C width of a stage, A heads, M side of a window, N = M^2, W
windows of a map.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmoco.models.blocks import LayerNorm, Linear, Mlp, Recompute, checkpointed
from fastmoco.models.drop_path import scaled
from fastmoco.models.encoder import Coupling, Family, Parts

Numbers: TypeAlias = np.ndarray[Any, np.dtype[Any]]
MLP_RATIO = 4
APART = -100.0
"""Added to the score of two tokens of a shifted window that are no neighbours on the map. Not minus
infinity: at extreme scores some weight is left, as in the published encoders."""
BIAS_TABLE = "relative_position_bias_table"
"""End of the names of tables of relative positions."""
STD = 0.02
"""Deviation of linear weights and bias tables at the start. The cut at 2, a hundred times as much,
changes nothing."""


class Windows(NamedTuple):
    """How the tokens of a square map are put into windows and back."""

    order: Tensor
    """[W * N] int64: the token in each place, window by window and row by row; L where it is
    padded."""
    back: Tensor
    """[L] int64: the place of each token."""
    apart: Tensor | None
    """[W, N, N] bool: pairs of a window that are no neighbours on the map; None without a shift."""


def windows_of(side: int, window: int, shift: int, device: torch.device | str = "cpu") -> Windows:
    """The windows of a map.

    Rolled by the shift, rows fall in three bands, [0, P - M), [P - M, P - shift) and [P - shift, P)
    with P the padded side, and columns likewise. Tokens of different bands are apart.

    Args:
        side: tokens per side of the map.
        window: tokens per side of a window, M.
        shift: tokens by which the map is rolled, to the top and to the left.
        device: of the result.
    """
    padded = -(-side // window) * window
    line = np.arange(padded)
    rolled = (line + shift) % padded
    inside = (rolled < side)[:, None] & (rolled < side)
    token = np.where(inside, rolled[:, None] * side + rolled, side**2)
    order = _cut(token, window).ravel()
    back = order.argsort(kind="stable")[: side**2]
    apart = None
    if shift:
        band = (line >= padded - window) + (line >= padded - shift).astype(np.int64)
        region = _cut(3 * band[:, None] + band, window)
        apart = _constant(region[:, :, None] != region[:, None, :], device)
    return Windows(_constant(order, device), _constant(back, device), apart)


def relative_index(window: int, device: torch.device | str = "cpu") -> Tensor:
    """[N, N] int64: the row of the bias table for the query i and key j of a window,
    `(y_i - y_j + M - 1) (2M - 1) + (x_i - x_j + M - 1)`."""
    row, column = np.divmod(np.arange(window**2), window)
    rows = row[:, None] - row + window - 1
    columns = column[:, None] - column + window - 1
    return _constant(rows * (2 * window - 1) + columns, device)


def _constant(array: Numbers, device: torch.device | str) -> Tensor:
    # Also one that is made in inference mode is saved for backwards.
    with torch.inference_mode(False):
        return torch.tensor(array, device=device)


# A few kilobytes for each size of view. Tensors of tracers and of fake modes are not kept.
_kept_windows = functools.lru_cache(maxsize=256)(windows_of)
_kept_index = functools.lru_cache(maxsize=32)(relative_index)


def resampled_bias(table: Tensor, window: int) -> Tensor:
    """A table of relative position biases for another window: bicubic on its grid, per head, with
    corners not aligned (EsViT, Li et al. 2022).

    Args:
        table: [(2 M' - 1)^2, A] for windows of M'.
        window: M of the result.

    Returns:
        [(2 M - 1)^2, A], at least float32; the table itself where the window is its own.
    """
    old, new = math.isqrt(len(table)), 2 * window - 1
    if old == new:
        return table
    picture = table.to(torch.promote_types(table.dtype, torch.float32)).T.reshape(1, -1, old, old)
    resized = F.interpolate(picture, size=(new, new), mode="bicubic", align_corners=False)
    return resized.flatten(2)[0].T.contiguous()


def window_of(table: Tensor) -> int:
    """M of a bias table of [(2 M - 1)^2, A]."""
    return (math.isqrt(len(table)) + 1) // 2


def _cut(grid: Numbers, window: int) -> Numbers:
    """[P, P] -> [W, N]: its windows, row by row."""
    parts = len(grid) // window
    return grid.reshape(parts, window, parts, window).swapaxes(1, 2).reshape(-1, window**2)


class _Windowed(torch.autograd.Function):
    """Tokens put into windows, or out of them: each is the backward of the other."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, windows: Windows, into: bool) -> Tensor:
        ctx.windows, ctx.into = windows, into
        return _put_in(tokens, windows) if into else _put_out(tokens, windows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        put = _put_out if ctx.into else _put_in
        return put(gradient, ctx.windows), None, None


def _put_in(tokens: Tensor, windows: Windows) -> Tensor:
    """[B, L, C] -> [B, W * N, C], with zeros where the map is padded."""
    if len(windows.order) > len(windows.back):
        tokens = F.pad(tokens, (0, 0, 0, 1))  # a row of zeros, number L
    return tokens.index_select(1, windows.order)


def _put_out(tokens: Tensor, windows: Windows) -> Tensor:
    """[B, W * N, C] -> [B, L, C]."""
    return tokens.index_select(1, windows.back)


def _windowed(tokens: Tensor, windows: Windows, *, into: bool) -> Tensor:
    if not (torch.is_grad_enabled() and tokens.requires_grad):
        return _put_in(tokens, windows) if into else _put_out(tokens, windows)
    out: Tensor = _Windowed.apply(tokens, windows, into)  # type: ignore[no-untyped-call]
    return out


class WindowAttention(nn.Module):
    """Attention inside windows, with a bias for each offset between two tokens and each head.

    Args:
        width: channels C.
        num_heads: heads A.
        window: tokens per side of a window, M.

    Attributes:
        relative_position_bias_table: [(2M - 1)^2, A].
    """

    def __init__(self, width: int, num_heads: int, window: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        offsets = (2 * window - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(
            torch.empty(offsets, num_heads).normal_(std=STD)
        )
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)

    def forward(self, x_BLC: Tensor, apart: Tensor | None) -> Tensor:
        """[B, W * N, C], window by window -> the same.

        `apart`: [W, N, N], the pairs that a shift keeps apart; None without one.
        """
        B, L, C = x_BLC.shape
        N, A = self.window**2, self.num_heads
        bias = self._bias()
        if apart is None:  # one mask for all windows, which are images here
            groups, heads, mask = B * (L // N), A, bias
        else:  # a mask for each window, which are heads here
            groups, heads = B, L // N * A
            mask = (bias + APART * apart[:, None].to(bias.dtype)).flatten(0, 1)
        qkv = self.qkv(x_BLC).view(groups, heads // A, N, 3, A, C // A)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).reshape(3, groups, heads, N, C // A).unbind()
        mask = mask.to(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None])
        attended = attended.view(groups, heads // A, A, N, C // A).transpose(2, 3)
        out: Tensor = self.proj(attended.reshape(B, L, C))
        return out

    def plain(self, x_GNC: Tensor, mask_WNN: Tensor) -> Tensor:
        """Reference of `forward`: [B * W, N, C], the windows of an image one after the other, and
        what is added to their scores."""
        G, N, C = x_GNC.shape
        qkv = self.qkv(x_GNC).view(G, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind()
        index = relative_index(self.window, x_GNC.device)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
        scores = scores + self.relative_position_bias_table[index].permute(2, 0, 1)
        scores = scores.unflatten(0, (-1, len(mask_WNN))) + mask_WNN[:, None]
        weights = scores.flatten(0, 1).softmax(-1)
        out: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(G, N, C))
        return out

    def _bias(self) -> Tensor:
        """[A, N, N]: the bias of every pair."""
        table = self.relative_position_bias_table
        kept = type(table) in (Tensor, nn.Parameter)
        index = (_kept_index if kept else relative_index)(self.window, table.device)
        # An embedding adds up its gradient in one order, an indexed tensor on threads in any.
        rows = F.embedding(index.flatten(), table)
        return rows.T.contiguous().view(-1, *index.shape)


class SwinBlock(nn.Module):
    """A pre-norm block with attention inside windows.

    Args:
        width: channels C.
        num_heads: heads A.
        window: tokens per side of a window, M.
        shift: tokens by which the windows are shifted; 0: not.
        eps: added to the variance in layer norms.

    Attributes:
        recompute: the activations that the backward computes again, "none" or "full".
    """

    def __init__(
        self, width: int, num_heads: int, window: int, shift: int, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.recompute: Recompute = "none"
        self.window = window
        self.shift = shift
        self.norm1 = LayerNorm(width, eps=eps)
        self.attn = WindowAttention(width, num_heads, window)
        self.norm2 = LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, MLP_RATIO * width)

    def forward(self, x_BLC: Tensor, paths_B2: Tensor | None = None) -> Tensor:
        """[B, L, C] tokens of a square map -> the same.

        `paths_B2`: factors of the branches of attention and MLP (`drop_path`); None: 1.
        """
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._whole(x_BLC, paths_B2)
        return checkpointed(lambda x: self._whole(x, paths_B2), x_BLC, draws=False)

    def _whole(self, x_BLC: Tensor, paths_B2: Tensor | None) -> Tensor:
        of_attention, of_mlp = _by_branch(paths_B2)
        side = math.isqrt(x_BLC.shape[1])
        kept = type(x_BLC) is Tensor
        windows = (_kept_windows if kept else windows_of)(
            side, self.window, self.shift, x_BLC.device
        )
        x_BLC, y = self.norm1.add(x_BLC)
        y = self.attn(_windowed(y, windows, into=True), windows.apart)
        y = _windowed(y, windows, into=False)
        x_BLC, y = self.norm2.add(x_BLC, scaled(y, of_attention))
        return x_BLC + scaled(self.mlp(y), of_mlp)

    def plain(self, x_BLC: Tensor, paths_B2: Tensor | None = None) -> Tensor:
        """Reference of `forward`: padding, roll, windows one by one, and everything back."""
        of_attention, of_mlp = _by_branch(paths_B2)
        B, L, C = x_BLC.shape
        side, M, s = math.isqrt(L), self.window, self.shift
        windows = windows_of(side, M, s, x_BLC.device)
        more = -side % M
        y = F.pad(self.norm1(x_BLC).view(B, side, side, C), (0, 0, 0, more, 0, more))
        y = y.roll((-s, -s), (1, 2))
        parts = (side + more) // M
        y = y.view(B, parts, M, parts, M, C).transpose(2, 3).reshape(-1, M * M, C)
        mask = y.new_zeros(1, M * M, M * M)
        if windows.apart is not None:
            mask = windows.apart.to(y.dtype) * APART
        y = self.attn.plain(y, mask)
        y = y.view(B, parts, parts, M, M, C).transpose(2, 3).reshape(B, parts * M, parts * M, C)
        y = y.roll((s, s), (1, 2))[:, :side, :side].reshape(B, L, C)
        x_BLC = x_BLC + scaled(y, of_attention)
        return x_BLC + scaled(self.mlp(self.norm2(x_BLC)), of_mlp)


def _by_branch(paths_B2: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The factors of attention and of the MLP."""
    return (None, None) if paths_B2 is None else (paths_B2[:, 0], paths_B2[:, 1])


class PatchEmbedding(nn.Module):
    """One linear projection of non-overlapping patches, as a convolution, and a layer norm. The
    convolution starts as torch's."""

    def __init__(self, patch_size: int, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)
        self.norm = LayerNorm(width, eps=eps)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> [B, L, C], row by row."""
        tokens: Tensor = self.norm(self.proj(images).flatten(2).transpose(1, 2))
        return tokens


class PatchMerging(nn.Module):
    """Four neighbours become one token of twice the width."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.norm = LayerNorm(4 * width, eps=eps)
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """[B, L, C] -> [B, L / 4, 2C]; odd sides are padded with zeros.

        Channels are those of (even row, even column), (odd, even), (even, odd), (odd, odd).
        """
        B, L, C = x_BLC.shape
        side = math.isqrt(L)
        x = x_BLC.view(B, side, side, C)
        if odd := side % 2:
            x = F.pad(x, (0, 0, 0, odd, 0, odd))
        half = (side + 1) // 2
        x = x.reshape(B, half, 2, half, 2, C).permute(0, 1, 3, 4, 2, 5)
        out: Tensor = self.reduction(self.norm(x.reshape(B, half**2, 4 * C)))
        return out


class Stage(nn.Module):
    """Blocks on a map, and the merging after them, which the last stage does not have.

    `forward` is not called: blocks and merging are units of their own when weights are sharded.
    """

    def __init__(self, blocks: Sequence[SwinBlock], downsample: PatchMerging | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample


class SwinTransformer(nn.Module):
    """A Swin Transformer whose feature is the mean of its last tokens.

    Initialisation: linear weights and bias tables normal with deviation 0.02, biases 0, the patch
    convolution as torch's. An objective attaches its projector as `head`.

    Args:
        image_size: height and width of the images of full size, in pixels, by which windows and
            shifts are chosen; a multiple of the patch size. Images of other sizes may follow.
        patch_size: height and width of a patch, in pixels.
        width: channels of the first stage; doubles from stage to stage.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        window: tokens per side of a window.
        eps: added to the variance in layer norms: 1e-5 in Swin and MoBY, 1e-6 in EsViT.

    Attributes:
        embed_dim: channels of the feature.
        tokens: tokens of the last map of an image of full size.
        coupling: always `Coupling.NONE`.

    Raises:
        ValueError: naming the field, its value and the rule.
    """

    family: Family = "swin"
    coupling = Coupling.NONE
    coupling_reason = ""

    def __init__(
        self,
        *,
        image_size: int = 224,
        patch_size: int = 4,
        width: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        window: int = 7,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        _check_sizes(image_size, patch_size, width, depths, heads, window)
        self.image_size = image_size
        self.patch_size = patch_size
        self.embed_dim = width * 2 ** (len(depths) - 1)
        self.patch_embed = PatchEmbedding(patch_size, width, eps)
        stages = []
        for s, (depth, num_heads) in enumerate(zip(depths, heads, strict=True)):
            channels, side = width * 2**s, image_size // patch_size // 2**s
            whole = side <= window
            blocks = [
                SwinBlock(
                    channels,
                    num_heads,
                    side if whole else window,
                    0 if whole or b % 2 == 0 else window // 2,
                    eps,
                )
                for b in range(depth)
            ]
            last = s == len(depths) - 1
            stages.append(Stage(blocks, None if last else PatchMerging(channels, eps)))
        self.layers = nn.ModuleList(stages)
        self.norm = LayerNorm(self.embed_dim, eps=eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.tokens = self._sides(image_size)[-1] ** 2
        self.head: nn.Module = nn.Identity()

    def forward(self, images: Tensor, paths: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] images -> [B, E] features, at least float32.

        Args:
            images: squares of whole patches.
            paths: [B, depth, 2] factors of the residual branches (`drop_path`), of the blocks of all
                stages; None: all 1.

        Raises:
            ValueError: if the images are not squares of whole patches.
        """
        return self.regions(images, paths)[0]

    def regions(self, images: Tensor, paths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, 3, S, S] images -> [B, E] features as of `forward`, and [B, L, E] the tokens whose
        mean they are (`token_features`)."""
        tokens = self.token_features(images, paths)
        return tokens.mean(1, dtype=torch.promote_types(tokens.dtype, torch.float32)), tokens

    def token_features(self, images: Tensor, paths: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] images -> [B, L, E]: the tokens of the last map after the last norm, row by
        row; arguments as of `forward`."""
        factors = iter(self._by_block(paths))
        tokens: Tensor = self.patch_embed(self._whole_patches(images))
        for stage in self._stages():
            for block in stage.blocks:
                tokens = block(tokens, next(factors))
            if stage.downsample is not None:
                tokens = stage.downsample(tokens)
        normalised: Tensor = self.norm(tokens)
        return normalised

    def plain(self, images: Tensor, paths: Tensor | None = None) -> Tensor:
        """Reference of `forward`: each block with its roll and its windows one by one, nothing
        recomputed; a merging takes the four neighbours one by one."""
        return self.plain_regions(images, paths)[0]

    def plain_regions(self, images: Tensor, paths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Reference of `regions`, as `plain`."""
        factors = iter(self._by_block(paths))
        tokens: Tensor = self.patch_embed(self._whole_patches(images))
        for stage in self._stages():
            for block in stage.blocks:
                assert isinstance(block, SwinBlock)  # noqa: S101 - a type: all blocks are of this class
                tokens = block.plain(tokens, next(factors))
            if stage.downsample is not None:
                side = math.isqrt(tokens.shape[1])
                grid = tokens.view(len(tokens), side, side, -1)
                grid = F.pad(grid, (0, 0, 0, side % 2, 0, side % 2))
                four = [grid[:, r::2, c::2] for c in (0, 1) for r in (0, 1)]
                merging = stage.downsample
                tokens = merging.reduction(merging.norm(torch.cat(four, -1))).flatten(1, 2)
        tokens = self.norm(tokens)
        return tokens.mean(1), tokens

    def recompute(self, what: Recompute) -> None:
        """Choose which activations the backward computes again.

        Raises:
            ValueError: for "selective", which is a choice among the parts of a ViT's blocks.
        """
        if what == "selective":
            raise ValueError("recompute='selective': is for the blocks of a ViT; use full or none")
        for block in self._blocks():
            block.recompute = what

    def parts(self) -> Parts:
        """Modules by role. Blocks differ in shape, so measurements may not leave any out."""
        return Parts(
            stem={"patch_embed": self.patch_embed},
            blocks=nn.ModuleList(self._blocks()),
            heads={"head": self.head},
            methods={"": ("forward", "regions")},
            alike=False,
        )

    def stem_tensors(self) -> list[Tensor]:
        """All tensors that turn pixels into tokens; they train."""
        return list(self.patch_embed.parameters())

    def most_numbers(self, side: int | None = None) -> int:
        """Upper bound on the elements that training keeps per view, about twice the true value.

        As for a ViT it counts 40 elements per token, channel and block, and 8 per pair of tokens of
        a window and head.

        Args:
            side: pixels per side of the view; default the image size.
        """
        total = 0
        for block, _, places, width in self._sizes(self.image_size if side is None else side):
            pairs = block.attn.num_heads * block.window**2
            total += places * (40 * width + 8 * pairs)
        return total + total // len(self._blocks())

    def forward_flops(self, side: int, keep: float = 1.0) -> float:
        """FLOPs of the products in one forward of a view of this many pixels per side, padded
        tokens included; `keep` has no effect, because all tokens stay.
        """
        total = 0
        for block, tokens, places, width in self._sizes(side):
            # Weights of attention have 4 C^2 elements, those of the MLP 8 C^2.
            attention = 8 * width**2 + 4 * block.window**2 * width
            total += places * attention + tokens * 4 * MLP_RATIO * width**2
        sides = self._sides(side)
        total += 2 * sides[0] ** 2 * self.patch_embed.proj.weight.numel()
        for stage, after in zip(self._stages(), sides[1:], strict=False):
            assert stage.downsample is not None  # noqa: S101 - a type: all but the last have one
            total += 2 * after**2 * stage.downsample.reduction.weight.numel()
        return float(total)

    def _by_block(self, paths: Tensor | None) -> Sequence[Tensor | None]:
        """Factors [B, 2] of each block."""
        if paths is None:
            return [None] * len(self._blocks())
        return paths.transpose(0, 1).contiguous().unbind()

    def _stages(self) -> Iterator[Stage]:
        for stage in self.layers:
            assert isinstance(stage, Stage)  # noqa: S101 - a type: all layers are of this class
            yield stage

    def _blocks(self) -> list[SwinBlock]:
        """All blocks, first to last."""
        blocks = [block for stage in self._stages() for block in stage.blocks]
        return [block for block in blocks if isinstance(block, SwinBlock)]

    def _sides(self, side: int) -> list[int]:
        """Tokens per side of each stage's map, of a view of so many pixels."""
        sides = [max(1, side // self.patch_size)]
        for _ in range(len(self.layers) - 1):
            sides.append((sides[-1] + 1) // 2)
        return sides

    def _sizes(self, side: int) -> Iterator[tuple[SwinBlock, int, int, int]]:
        """Every block with its tokens, the places of its windows and its width, for a view of so
        many pixels."""
        for stage, line in zip(self._stages(), self._sides(side), strict=True):
            for block in stage.blocks:
                assert isinstance(block, SwinBlock)  # noqa: S101 - a type: all blocks are of this class
                places = (-(-line // block.window) * block.window) ** 2
                yield block, line**2, places, block.attn.proj.in_features

    def _whole_patches(self, images: Tensor) -> Tensor:
        """The images, if they are squares of whole patches.

        Raises:
            ValueError: with the sizes that fit.
        """
        patch, side = self.patch_size, images.shape[-1]
        fits = images.ndim == 4 and images.shape[1:] == (3, side, side)
        if not fits or side < patch or side % patch:
            raise ValueError(
                f"images shape={tuple(images.shape)}: this encoder takes [B, 3, S, S], S a "
                f"multiple of its patches of {patch} pixels, such as image_size={self.image_size}; "
                "change the size of the view or of the evaluation crop"
            )
        return images


def _check_sizes(
    image_size: int,
    patch_size: int,
    width: int,
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    window: int,
) -> None:
    if not depths or min(depths) < 1 or len(heads) != len(depths):
        raise ValueError(f"depths={depths}, heads={heads}: need a number of at least 1 per stage")
    for s, number in enumerate(heads):
        if number < 1 or width < 1 or width * 2**s % number:
            raise ValueError(f"heads={heads}: {number} does not divide the {width * 2**s} channels")
    if window < 1:
        raise ValueError(f"window={window}: must be at least 1 token")
    least = patch_size * 2 ** (len(depths) - 1)
    if patch_size < 1 or image_size < least or image_size % patch_size:
        raise ValueError(
            f"image_size={image_size}: must be a multiple of patches of {patch_size} pixels, and at "
            f"least {least}, a token of the last stage"
        )


@dataclass(frozen=True, slots=True)
class SwinArchitecture:
    """A size of the Swin Transformer; calling it builds an encoder of this size.

    Attributes:
        channels: of the first stage.
        depths: blocks of each stage.
        heads: attention heads of each stage.
        image_size: default pixels per side of an image.
        patch_size: pixels per side of a patch.
    """

    channels: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    image_size: int = 224
    patch_size: int = 4

    @property
    def width(self) -> int:
        """Channels of the feature."""
        return int(self.channels * 2 ** (len(self.depths) - 1))

    def __call__(
        self, *, image_size: int | None = None, window: int = 7, eps: float = 1e-5
    ) -> SwinTransformer:
        """Build an encoder; the arguments are those of `SwinTransformer`."""
        return SwinTransformer(
            image_size=self.image_size if image_size is None else image_size,
            patch_size=self.patch_size,
            width=self.channels,
            depths=self.depths,
            heads=self.heads,
            window=window,
            eps=eps,
        )


swin_nano = SwinArchitecture(32, (2, 2), (1, 2), image_size=8, patch_size=2)
swin_tiny = SwinArchitecture(96, (2, 2, 6, 2), (3, 6, 12, 24))
swin_small = SwinArchitecture(96, (2, 2, 18, 2), (3, 6, 12, 24))
swin_base = SwinArchitecture(128, (2, 2, 18, 2), (4, 8, 16, 32))

SWINS = {name: value for name, value in globals().items() if isinstance(value, SwinArchitecture)}
"""Architectures by name."""
