"""ConvNeXt V2 (Woo et al. 2023): four stages of depthwise 7x7 convolutions and MLPs with global
response normalization (`grn`).

Parameters have the names and shapes of the published files (`downsample_layers.0.0.weight`,
`stages.2.0.dwconv.weight`, `stages.2.0.grn.gamma`, `norm.weight`), without the classifier `head`.
The feature is the final norm of the mean over positions. Norms are of one position or one image, so
no image depends on another one: views share a batch, and batches go in chunks.

An image loses the rows and columns that no whole position covers: published sizes take multiples of
32 pixels without a loss.

`convnextv2_micro` is our own, for images of 16 to 64 pixels on a CPU: one block in each of the four
stages, widths 16, 32, 64 and 128, and a stem with patches of 2 pixels.

`masked` is the encoder of FCMAE: all operations exist on kept positions only, by a dense map that is
zero elsewhere.

Legend: B images, C channels, H and W positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.models.blocks import LayerNorm, Linear, Recompute, checkpointed
from fastmoco.models.drop_path import scaled
from fastmoco.models.encoder import Coupling, Family, Parts
from fastmoco.models.grn import GRN, Scope

STAGES = 4
MLP_RATIO = 4
EPS = 1e-6
INIT_STD = 0.02


class ChannelNorm(LayerNorm):
    """Layer norm over the channels of each position of a map."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W], in memory with channels last."""
        out: Tensor = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


class ConvNeXtV2Block(nn.Module):
    """`x + pwconv2(GRN(gelu(pwconv1(LN(dwconv x)))))`, gelu with the exact error function.

    Args:
        width: channels C.

    Attributes:
        recompute: the activations that the backward computes again, "none" or "full".
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.recompute: Recompute = "none"
        self.dwconv = nn.Conv2d(width, width, kernel_size=7, padding=3, groups=width)
        self.norm = LayerNorm(width, eps=EPS)
        self.pwconv1 = Linear(width, MLP_RATIO * width)
        self.grn = GRN(MLP_RATIO * width)
        self.pwconv2 = Linear(MLP_RATIO * width, width)

    def forward(
        self,
        x: Tensor,
        factors: Tensor | None = None,
        keep: Tensor | None = None,
        scope: Scope = "image",
    ) -> Tensor:
        """[B, C, H, W] -> [B, C, H, W].

        Args:
            x: zero at the positions that are not kept.
            factors: [B] of the residual branch (`drop_path`); None: all 1.
            keep: [B, H, W, 1], 1 for kept positions and 0 for the others, where the result is zero
                too; None: all are kept.
            scope: of the norms of `GRN`.
        """
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._whole(x, factors, keep, scope)
        whole = partial(self._whole, factors=factors, keep=keep, scope=scope)
        return checkpointed(whole, x, draws=False)

    def _whole(
        self, x: Tensor, factors: Tensor | None, keep: Tensor | None, scope: Scope
    ) -> Tensor:
        hidden = F.gelu(self.pwconv1(self.norm(self.dwconv(x).permute(0, 2, 3, 1))))
        if keep is not None:
            hidden = hidden * keep.to(hidden.dtype)  # biases fill the positions in between
        branch = self.pwconv2(self.grn(hidden, scope))
        if keep is not None:
            branch = branch * keep.to(branch.dtype)
        out: Tensor = x + scaled(branch, factors).permute(0, 3, 1, 2)
        return out

    def plain(
        self,
        x: Tensor,
        factors: Tensor | None = None,
        keep: Tensor | None = None,
        scope: Scope = "image",
    ) -> Tensor:
        """Reference of `forward`: every layer of its own, the mask before and after the convolution,
        before the norms and at the end; nothing recomputed."""
        rows = torch.ones_like(x[:, :1]) if keep is None else keep.permute(0, 3, 1, 2).to(x.dtype)
        branch = (self.dwconv(x * rows) * rows).permute(0, 2, 3, 1)
        branch = F.gelu(self.pwconv1(self.norm(branch))) * rows.permute(0, 2, 3, 1)
        branch = self.pwconv2(self.grn.plain(branch, scope)).permute(0, 3, 1, 2)
        if factors is not None:
            branch = branch * factors[:, None, None, None]
        out: Tensor = (x + branch) * rows
        return out


class ConvNeXtV2(nn.Module):
    """A ConvNeXt V2 whose feature is the final norm of the mean over positions.

    Weights of convolutions and linear layers start normal with deviation 0.02, biases and `GRN` at
    zero. The official code truncates at +-2, which is 100 deviations and so never happens.

    Args:
        depths: blocks of the four stages.
        widths: channels of the four stages.
        patch_size: side of the patches of the stem, in pixels.
        image_size: height and width of the largest images, in pixels. Only `most_numbers` uses it;
            the encoder takes images of any size that leaves a position.

    Attributes:
        embed_dim: channels of the feature.
        stride: pixels per position of the last stage.
        coupling: always `Coupling.NONE`.

    Raises:
        ValueError: naming the field, its value and the rule.
    """

    family: Family = "convnextv2"
    coupling = Coupling.NONE
    coupling_reason = ""

    def __init__(
        self,
        *,
        depths: tuple[int, int, int, int],
        widths: tuple[int, int, int, int],
        patch_size: int = 4,
        image_size: int = 224,
    ) -> None:
        super().__init__()
        for name, numbers in (("depths", depths), ("widths", widths)):
            if len(numbers) != STAGES or min(numbers) < 1:
                raise ValueError(f"{name}={numbers}: needs {STAGES} numbers of at least 1")
        if patch_size < 1:
            raise ValueError(f"patch_size={patch_size}: must be at least 1 pixel")
        self.stride = patch_size * 2 ** (STAGES - 1)
        self.embed_dim = widths[-1]
        self.image_size = image_size
        self._require_positions(image_size, image_size)

        # The stem, and what halves the positions before each other stage.
        first = nn.Conv2d(3, widths[0], kernel_size=patch_size, stride=patch_size)
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(first, ChannelNorm(widths[0], eps=EPS))]
        )
        for before, after in pairwise(widths):
            halve = nn.Conv2d(before, after, kernel_size=2, stride=2)
            self.downsample_layers.append(nn.Sequential(ChannelNorm(before, eps=EPS), halve))
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtV2Block(width) for _ in range(depth)))
            for depth, width in zip(depths, widths, strict=True)
        )
        self.norm = LayerNorm(self.embed_dim, eps=EPS)
        self.head: nn.Module = nn.Identity()
        self.apply(start_)

    def forward(self, images: Tensor, paths: Tensor | None = None) -> Tensor:
        """[B, 3, H, W] images -> [B, E] features, at least float32.

        Args:
            images: height and width of at least `stride` pixels.
            paths: [B, depth, 2] factors of residual branches (`drop_path`); a block has one branch
                and takes the first. None: all 1.

        Raises:
            ValueError: if the images are not [B, 3, H, W], or too small.
        """
        x = self._map(images, paths)
        pooled = x.mean((2, 3), dtype=torch.promote_types(x.dtype, torch.float32))
        features: Tensor = self.norm(pooled)
        return features

    def plain(self, images: Tensor, paths: Tensor | None = None) -> Tensor:
        """Reference of `forward`: each block in turn as the paper writes it, nothing recomputed."""
        features: Tensor = self.norm(self._map(images, paths, plain=True).flatten(2).mean(2))
        return features

    def masked(
        self,
        images: Tensor,
        keep: Tensor,
        scope: Scope = "image",
        paths: Tensor | None = None,
        *,
        plain: bool = False,
    ) -> Tensor:
        """The map after the last stage of images of which some patches are hidden, without a final
        norm (FCMAE, section 2 of the paper).

        A patch has `stride` pixels a side and is one position of the last map. Depthwise
        convolutions read zeros at hidden positions, norms count kept ones only, and no hidden
        position is ever filled. Equal to sparse convolutions on the kept positions.

        Args:
            images: [B, 3, H, W], H and W multiples of `stride`.
            keep: [B, H / stride * W / stride] by row, true or 1 for patches that are kept.
            scope: positions of the norms of `GRN`: "image" as the paper, or "batch" as the official
                PyTorch release, which couples the images of a batch.
            paths: as for a call.
            plain: whether blocks are computed by their reference.

        Returns:
            [B, E, H / stride, W / stride], exactly zero where hidden.

        Raises:
            ValueError: if the images are not whole patches, or `keep` has not one entry for each.
        """
        self._require_images(images)
        height, width = images.shape[-2:]
        if height % self.stride or width % self.stride:
            raise ValueError(
                f"images shape={tuple(images.shape)}: must be multiples of {self.stride} pixels, a "
                "hidden patch"
            )
        grid = (height // self.stride, width // self.stride)
        if keep.shape != (len(images), grid[0] * grid[1]):
            raise ValueError(
                f"keep shape={tuple(keep.shape)}: must be {(len(images), grid[0] * grid[1])}"
            )
        return self._map(images, paths, keep.view(-1, 1, *grid), scope, plain=plain)

    def recompute(self, what: Recompute) -> None:
        """Choose which activations the backward computes again.

        Raises:
            ValueError: for "selective", which is a choice among the parts of transformer blocks.
        """
        if what == "selective":
            raise ValueError(
                "recompute='selective': is for the blocks of a ViT; use full or none for a "
                "ConvNeXt V2"
            )
        for block in self._blocks():
            block.recompute = what

    def parts(self) -> Parts:
        """Modules by role. Blocks differ in shape, so measurements may not leave any out."""
        return Parts(
            stem={"downsample_layers.0": self.downsample_layers[0]},
            blocks=nn.ModuleList(self._blocks()),
            heads={"head": self.head},
            methods={"": ("forward", "masked")},
            alike=False,
        )

    def layers(self, by: Literal["block", "group"]) -> dict[str, int]:
        """Layer of each part, by the beginning of its parameters' names, for layer decay as the
        official fine-tuning has it; what is in no part, as the final norm, is one layer above.

        Args:
            by: "block": each block is a layer, and what comes before a stage belongs to its first
                one. "group": the third stage has a layer for three blocks, each other stage is one,
                and the stem has its own. The official code counts groups for 27 blocks in that stage;
                with fewer, here no numbers are left out.
        """
        found: dict[str, int] = {}
        depths = [len(stage) for stage in self.stages]  # type: ignore[arg-type]
        if by == "block":
            for stage, depth in enumerate(depths):
                first = sum(depths[:stage]) + 1
                found[f"downsample_layers.{stage}."] = first
                found |= {f"stages.{stage}.{block}.": first + block for block in range(depth)}
            return found
        last = 3 + -(-depths[2] // 3)
        found = {f"downsample_layers.{stage}.": n for stage, n in enumerate((0, 2, 3, last))}
        found |= {f"stages.{stage}.": number for stage, number in ((0, 1), (1, 2), (3, last))}
        return found | {f"stages.2.{block}.": 3 + block // 3 for block in range(depths[2])}

    def most_numbers(self, side: int | None = None) -> int:
        """Upper bound on the elements that training keeps per view, at least twice the true value.

        The true value is about 15 times its channels per position of a block: its input, the
        convolution and its norm, and three hidden maps of four times the width.

        Args:
            side: pixels per side of the view; default `image_size`.
        """
        sides = self._sides(self.image_size if side is None else side)
        maps = sum(layer.weight.shape[0] * positions**2 for layer, positions in sides)
        return 6 * maps

    def forward_flops(self, side: int, keep: float = 1.0) -> float:
        """FLOPs of the convolutions and linear layers in one forward of a view of this many pixels
        per side; `keep` has no effect, because it has no tokens.
        """
        sides = self._sides(side)
        return float(sum(2 * layer.weight.numel() * positions**2 for layer, positions in sides))

    def _map(
        self,
        images: Tensor,
        paths: Tensor | None,
        keep: Tensor | None = None,
        scope: Scope = "image",
        *,
        plain: bool = False,
    ) -> Tensor:
        """[B, E, h, w] after the last stage; `keep` [B, 1, h, w] of the same positions."""
        self._require_images(images)
        by_block = iter(self._by_block(paths))
        x = images
        for number, (down, stage) in enumerate(
            zip(self.downsample_layers, self.stages, strict=True)
        ):
            x = down(x)
            rows = None
            if keep is not None:
                times = 2 ** (STAGES - 1 - number)
                fine = keep.repeat_interleave(times, 2).repeat_interleave(times, 3)
                x = x * fine.to(x.dtype)
                rows = fine.permute(0, 2, 3, 1)
            for block in _blocks_of(stage):
                x = (block.plain if plain else block)(x, next(by_block), rows, scope)
        return x

    def _require_images(self, images: Tensor) -> None:
        """Refuse what is no batch of images, or has no position in the last stage."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images shape={tuple(images.shape)}: this encoder takes [B, 3, H, W]")
        self._require_positions(*images.shape[2:])

    def _require_positions(self, height: int, width: int) -> None:
        if min(height, width) < self.stride:
            raise ValueError(
                f"image of {height} x {width} pixels: this encoder takes at least {self.stride} "
                "pixels a side"
            )

    def _by_block(self, paths: Tensor | None) -> list[Tensor | None]:
        """Factors [B] of the branch of each block."""
        if paths is None:
            return [None] * len(self._blocks())
        return list(paths[..., 0].unbind(1))

    def _blocks(self) -> list[ConvNeXtV2Block]:
        """All blocks, first to last."""
        return [block for stage in self.stages for block in _blocks_of(stage)]

    def _sides(self, side: int) -> Iterator[tuple[nn.Conv2d | nn.Linear, int]]:
        """Every product with the height of its output, for images of a height."""
        for down, stage in zip(self.downsample_layers, self.stages, strict=True):
            for layer in down.children():
                if isinstance(layer, nn.Conv2d):
                    side //= layer.stride[0]
                    yield layer, side
            for block in _blocks_of(stage):
                yield from ((layer, side) for layer in (block.dwconv, block.pwconv1, block.pwconv2))


def _blocks_of(stage: nn.Module) -> list[ConvNeXtV2Block]:
    return [block for block in stage.children() if isinstance(block, ConvNeXtV2Block)]


def start_(module: nn.Module) -> None:
    """Give a convolution or linear layer its start values; no effect on other modules."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.normal_(module.weight, std=INIT_STD)
        assert module.bias is not None  # noqa: S101 - a type: all layers have biases
        nn.init.zeros_(module.bias)


@dataclass(frozen=True, slots=True)
class ConvNeXtV2Architecture:
    """A size of the ConvNeXt V2; calling it builds an encoder of this size.

    Attributes:
        first: channels of the first stage; each later one has twice as many.
        depths: blocks of each stage.
        patch_size: side of the patches of the stem, in pixels.
        image_size: default pixels per side of an image.
    """

    first: int
    depths: tuple[int, int, int, int]
    patch_size: int = 4
    image_size: int = 224

    @property
    def width(self) -> int:
        """Channels of the feature."""
        return self.first * 8

    def __call__(self, *, image_size: int | None = None) -> ConvNeXtV2:
        """Build an encoder; the argument is that of `ConvNeXtV2`."""
        one = self.first
        return ConvNeXtV2(
            depths=self.depths,
            widths=(one, 2 * one, 4 * one, 8 * one),
            patch_size=self.patch_size,
            image_size=self.image_size if image_size is None else image_size,
        )


convnextv2_micro = ConvNeXtV2Architecture(16, (1, 1, 1, 1), patch_size=2, image_size=32)
convnextv2_atto = ConvNeXtV2Architecture(40, (2, 2, 6, 2))
convnextv2_femto = ConvNeXtV2Architecture(48, (2, 2, 6, 2))
convnextv2_pico = ConvNeXtV2Architecture(64, (2, 2, 6, 2))
convnextv2_nano = ConvNeXtV2Architecture(80, (2, 2, 8, 2))
convnextv2_tiny = ConvNeXtV2Architecture(96, (3, 3, 9, 3))
convnextv2_base = ConvNeXtV2Architecture(128, (3, 3, 27, 3))
convnextv2_large = ConvNeXtV2Architecture(192, (3, 3, 27, 3))
convnextv2_huge = ConvNeXtV2Architecture(352, (3, 3, 27, 3))

CONVNEXTS = {
    name: value for name, value in globals().items() if isinstance(value, ConvNeXtV2Architecture)
}
"""ConvNeXt V2 by name."""
