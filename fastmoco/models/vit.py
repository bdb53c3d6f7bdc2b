"""The vision transformers of MoCo v3: fixed positions, frozen patch projection,
class-token feature; and the variants of its ablations.

Two optimizations have a plain reference that a test compares with them. `patch_tokens` and `encode`
are separate, so that two encoders with the same frozen projection can share the patch tokens.
`encode` computes only the class token of the last block (see `blocks`), unless the feature is a
mean of tokens, blocks for the class token follow, or a batch norm in the block sees every token; its
reference is `encode_plain`.
`encode_taps` does the same and gives the feature after every block; its reference is `plain_taps`.

Legend: B images, L patch tokens, E width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fastmoco.config.model import MlpNorm, Pooling, Positions
from fastmoco.models.blocks import (
    CONV_STEM_STRIDE,
    Block,
    ConvStem,
    LayerNorm,
    PatchStem,
    Recompute,
    sum_of,
)
from fastmoco.models.class_attention import ClassBlock
from fastmoco.models.encoder import Coupling, Family, Parts
from fastmoco.models.positions import FIXED_POSITIONS, resized_positions
from fastmoco.models.token_drop import taken

STEM_COUPLES = (
    "its convolutional stem has batch norms, whose statistics are those of the whole batch"
)
BLOCKS_COUPLE = (
    "mlp_norm=batch puts a batch norm into each block, whose statistics are those of the whole "
    "batch"
)
CLASS_TOKEN = ("class", "class_attention")
"""Kinds of pooling whose feature is a class token."""
REGION_POOLINGS = ("class", "mean", "norm_mean")
"""Kinds of pooling whose feature is among `latents`, or their mean, as `regions` needs it."""
CLASS_BLOCKS = 2
"""Blocks of class attention behind the others, with `pooling="class_attention"`."""


class VisionTransformer(nn.Module):
    """A ViT; parameter names are timm's. Its feature is the class token after the final norm, or a
    mean of patch tokens.

    Images may have another size than `image_size`, a multiple of the patch size: positions are then
    interpolated (`resized_positions`), fixed ones too, so that a small crop is at the coordinates
    of a large one.

    Initialisation (Chen, Xie, He 2021): every linear layer Xavier-uniform, with q, k and v taken as
    three matrices; biases 0; class token normal with deviation 1e-6; patch projection uniform by
    its own fan-in and fan-out. Sine-cosine positions are a parameter that never trains, learned
    ones start normal with deviation 0.02. An objective attaches its projector as `head`;
    the encoder itself does not apply it.

    Args:
        image_size: height and width of the images, in pixels; a multiple of the patch size.
        patch_size: height and width of a patch, in pixels; 16 with the conv stem.
        embed_dim: width E, divisible by `num_heads`, by 4 with sine-cosine positions, and by 8 with
            the conv stem.
        depth: number of blocks.
        num_heads: attention heads A.
        mlp_ratio: hidden width of the MLP over E.
        stem: "patch" projects patches linearly, "conv" is a small convolutional
            network with batch norm.
        freeze_patch_embed: keep the random patch projection fixed, as MoCo v3 does for stability;
            has no effect on the conv stem, which always trains.
        pooling: "class": the class token after the final norm; "mean_norm": the norm of the mean of
            the patch tokens, beside which there is a class token; without a class token,
            "norm_mean": the mean of the patch tokens after the final norm, "mean": of the patch
            tokens, without a final norm; "class_attention": a class token without a position, which
            reads the patch tokens in two blocks behind the others (`ClassBlock`), after the final
            norm.
        positions: "sincos" is the fixed table of MoCo v3, "sincos_columns" that of MAE, "learned" a
            trained one, "none" adds nothing.
        mlp_norm: norm before each MLP: "layer", or "batch" over all tokens of the global batch.
        attention: backend of `fastmoco_kernels.attention`; the last block does not use it.

    Attributes:
        tokens: tokens of a view in a block, including the class token if it is among them.
        cls_token: [1, 1, E]; None with a mean of patch tokens.
        blocks_token: the blocks in which the class token reads the others; empty where it is one of
            them, or there is none.
        pos_embed: [1, tokens, E]; None without positions.
        mask_token: [1, 1, E]; None unless an objective has called `add_mask_token`.
        coupling: `Coupling.TRUNK` if the tokens of an image depend on the other images of the batch
            (batch norm in the conv stem or before the MLPs); then two views may not share a batch.
            Otherwise `Coupling.NONE`.
        coupling_reason: the reason, as a clause; empty for `Coupling.NONE`.

    Raises:
        ValueError: naming the field, its value and the rule.
    """

    family: Family = "vit"
    cls_token: nn.Parameter | None
    pos_embed: nn.Parameter | None
    mask_token: nn.Parameter | None

    def __init__(
        self,
        *,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        stem: Literal["patch", "conv"] = "patch",
        freeze_patch_embed: bool = True,
        pooling: Pooling = "class",
        positions: Positions = "sincos",
        mlp_norm: MlpNorm = "layer",
        attention: str = "auto",
    ) -> None:
        super().__init__()
        _check_sizes(image_size, patch_size, embed_dim, depth, num_heads, stem, positions)
        for name, value, kind in (
            ("pooling", pooling, Pooling),
            ("positions", positions, Positions),
            ("mlp_norm", mlp_norm, MlpNorm),
        ):
            if value not in get_args(kind):
                raise ValueError(f"{name}={value!r}: must be one of {get_args(kind)}")
        self.image_size = image_size
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.pooling = pooling
        self.positions = positions
        self.mlp_norm = mlp_norm
        self.tokens = (image_size // patch_size) ** 2 + self._class_tokens
        reasons = [STEM_COUPLES] * (stem == "conv") + [BLOCKS_COUPLE] * (mlp_norm == "batch")
        self.coupling = Coupling.TRUNK if reasons else Coupling.NONE
        self.coupling_reason = ", and ".join(reasons)

        # In this order, because it is that of the random draws.
        self.cls_token = (
            nn.Parameter(torch.empty(1, 1, embed_dim).normal_(std=1e-6))
            if pooling in (*CLASS_TOKEN, "mean_norm")
            else None
        )
        self.pos_embed = self._positions(positions, image_size // patch_size)
        self.patch_embed: nn.Module = (
            ConvStem(embed_dim) if stem == "conv" else PatchStem(patch_size, embed_dim)
        )
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, round(mlp_ratio * embed_dim), attention, mlp_norm)
            for _ in range(depth)
        )
        self.blocks_token = nn.ModuleList(
            ClassBlock(embed_dim, num_heads, round(mlp_ratio * embed_dim))
            for _ in range(CLASS_BLOCKS if pooling == "class_attention" else 0)
        )
        self.norm: nn.Module = (
            nn.Identity() if pooling == "mean" else LayerNorm(embed_dim, eps=1e-6)
        )
        self.head: nn.Module = nn.Identity()
        self.mask_token = None
        if freeze_patch_embed and stem == "patch":
            self.patch_embed.requires_grad_(False)

    def recompute(self, what: Recompute) -> None:
        """Choose which activations the backward computes again instead of
        keeping them; see `blocks`.
        """
        for block in (*self.blocks, *self.blocks_token):
            assert isinstance(block, Block)  # noqa: S101 - a type: all blocks are of this class
            block.recompute = what

    def patch_tokens(self, images: Tensor) -> Tensor:
        """Embed the patches and add their fixed positions: [B, 3, S, S] -> [B, L, E], row by row,
        without the class token. Learned positions are added by `encode`, so that encoders whose
        positions differ can share the tokens.

        Raises:
            ValueError: if the images are not squares of whole patches.
        """
        if images.ndim != 4 or images.shape[1:] != (3, self.image_size, self.image_size):
            self._require_whole_patches(images)
        return self._with_fixed(self._projected(images))

    def encode(
        self, patch_tokens: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """[B, L, E] patch tokens -> [B, E] feature. Where only the class token of the last block is
        read, and no batch norm needs the others, the block computes nothing else.

        Args:
            patch_tokens: of `patch_tokens`.
            paths: [B, depth, 2] factors of the residual branches (`drop_path`); None: all 1.
            kept: [B, k] numbers of the patch tokens that the blocks see (`token_drop`); None: all.
                Or [n * B, k], n sets of tokens of each image, set by set: then so are paths and
                features.
        """
        return self._encoded(self._placed(patch_tokens, kept), paths)

    def _encoded(self, tokens: Tensor, paths: Tensor | None) -> Tensor:
        """Blocks and final norm on tokens with all their positions."""
        by_block = self._by_block(paths)
        branch = None
        for block, factors in zip(self.blocks[:-1], by_block, strict=False):
            tokens, branch = block(tokens, branch, factors)
        last = self.blocks[-1]
        assert isinstance(last, Block)  # noqa: S101 - a type: all blocks are of this class
        feature: Tensor
        if self.reads_class_row:
            feature = self.norm(last.class_row(tokens, branch, by_block[-1]))
            return feature
        tokens = sum_of(*last(tokens, branch, by_block[-1]))
        feature = self._pooled(tokens)
        return feature

    def encode_plain(
        self, patch_tokens: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """Reference of `encode`: all tokens get their positions, then some are left out; every
        block and the final norm on every token that stays, then the row of the class token or the
        mean.
        """
        tokens = self._plain_tokens(patch_tokens, kept)
        for block, factors in zip(self.blocks, self._by_block(paths), strict=True):
            tokens = sum_of(*block(tokens, None, factors))
        return self._plain_feature(tokens)

    def encode_taps(
        self, patch_tokens: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """[B, L, E] patch tokens -> [B, depth, E]: the feature after every block, by the one final
        norm. The last one is that of `encode`, and the last block computes as little as there.

        Args:
            patch_tokens: of `patch_tokens`.
            paths: as for `encode`.
            kept: as for `encode`.
        """
        return self._tapped(self._placed(patch_tokens, kept), paths)

    def _tapped(self, tokens: Tensor, paths: Tensor | None) -> Tensor:
        """`encode_taps` of tokens with all their positions."""
        by_block = self._by_block(paths)
        branch = None
        rows = []
        for block, factors in zip(self.blocks[:-1], by_block, strict=False):
            tokens, branch = block(tokens, branch, factors)
            rows.append(self._read(tokens, branch))
        last = self.blocks[-1]
        assert isinstance(last, Block)  # noqa: S101 - a type: all blocks are of this class
        if self.reads_class_row:
            rows.append(last.class_row(tokens, branch, by_block[-1]))
        else:
            rows.append(self._read(*last(tokens, branch, by_block[-1])))
        taps = torch.stack(rows, dim=1)
        return self._normalised(taps) if self.pooling in CLASS_TOKEN else taps

    def taps(
        self, images: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """[B, 3, H, W] images -> [B, depth, E] features after every block; see `encode_taps`."""
        return self._tapped(self._embedded(images, kept), paths)

    def plain_taps(
        self, images: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """Reference of `taps`: every block and, after each of them, the final norm on every token
        that stays."""
        tokens = self._plain_tokens(self.patch_tokens(images), kept)
        taps = []
        for block, factors in zip(self.blocks, self._by_block(paths), strict=True):
            tokens = sum_of(*block(tokens, None, factors))
            taps.append(self._plain_feature(tokens))
        return torch.stack(taps, dim=1)

    def forward(
        self, images: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """[B, 3, H, W] images -> [B, E] features; `paths` and `kept` as for `encode`. Patches that
        are left out are not embedded.
        """
        if self._embeds_all(images, kept):
            return self.encode(self.patch_tokens(images), paths, kept)
        return self._encoded(self._embedded(images, kept), paths)

    def plain(
        self, images: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> Tensor:
        """Reference of `forward`."""
        return self.encode_plain(self.patch_tokens(images), paths, kept)

    def latents(
        self,
        images: Tensor,
        paths: Tensor | None = None,
        kept: Tensor | None = None,
        *,
        normalised: bool = True,
    ) -> Tensor:
        """[B, 3, H, W] images -> [B, T, E]: every token after all blocks and the final norm, for a
        decoder: the class token, if there is one, then the patch tokens in the order of `kept`.

        `paths` and `kept` as for `encode`; `normalised`: whether the final norm comes last.
        """
        tokens = self._through(self._embedded(images, kept), paths)
        return self._normalised(tokens) if normalised else tokens

    def plain_latents(
        self,
        images: Tensor,
        paths: Tensor | None = None,
        kept: Tensor | None = None,
        *,
        normalised: bool = True,
    ) -> Tensor:
        """Reference of `latents`: all tokens get their positions, then some are left out."""
        tokens = self._plain_tokens(self.patch_tokens(images), kept)
        for block, factors in zip(self.blocks, self._by_block(paths), strict=True):
            tokens = sum_of(*block(tokens, None, factors))
        return self._normalised(tokens) if normalised else tokens

    def add_mask_token(self) -> None:
        """Give the encoder a trained token in place of masked patches, `mask_token` [1, 1, E],
        normal with deviation 0.02. `masked_tokens` alone reads it."""
        self.mask_token = nn.Parameter(torch.empty(1, 1, self.embed_dim).normal_(std=0.02))

    def masked_tokens(self, images: Tensor, masked: Tensor, paths: Tensor | None = None) -> Tensor:
        """[B, 3, S, S] images -> [B, T, E]: every token after all blocks, without the final norm,
        with the mask token in place of masked patches. Positions are added after it (MaskFeat).

        Args:
            images: of whole patches.
            masked: [B, L] bool, True where masked.
            paths: as for `encode`.
        """
        patches = self._projected(images)
        tokens = torch.where(masked[:, :, None], self._mask_token(), patches)
        return self._through(self._all_tokens(self._with_fixed(tokens)), paths)

    def plain_masked_tokens(
        self, images: Tensor, masked: Tensor, paths: Tensor | None = None
    ) -> Tensor:
        """Reference of `masked_tokens`: x (1 - m) + mask token * m."""
        patches = self._projected(images)
        hidden = masked[:, :, None].to(patches.dtype)
        tokens = patches * (1 - hidden) + self._mask_token() * hidden
        tokens = self._all_tokens(self._with_fixed(tokens))
        for block, factors in zip(self.blocks, self._by_block(paths), strict=True):
            tokens = sum_of(*block(tokens, None, factors))
        return tokens

    def context_tokens(self, images: Tensor, paths: Tensor | None, context: Tensor) -> Tensor:
        """[B, 3, S, S] images -> [B, T, E]: every token after all blocks, without the final norm. In
        every block all tokens ask, and those of the context alone have keys and values, by their
        state before that block (MP3).

        Args:
            images: of whole patches.
            paths: as for `encode`.
            context: [B, K] numbers of tokens; with a class token, 0 is that token.
        """
        tokens, branch = self._all_tokens(self.patch_tokens(images)), None
        for block, factors in zip(self.blocks, self._by_block(paths), strict=True):
            tokens, branch = block(tokens, branch, factors, context)
        return sum_of(tokens, branch)

    def plain_context_tokens(self, images: Tensor, paths: Tensor | None, context: Tensor) -> Tensor:
        """Reference of `context_tokens`: an image at a time, with scores of all pairs of tokens, of
        which those outside of the context are left out by -inf."""
        found = []
        for number, image in enumerate(images):
            (tokens,) = self._all_tokens(self.patch_tokens(image[None]))
            outside = torch.ones(len(tokens), dtype=torch.bool, device=images.device)
            outside[context[number]] = False
            for depth, block in enumerate(self.blocks):
                assert isinstance(block, Block)  # noqa: S101 - a type: all blocks are of this class
                factors = [1, 1] if paths is None else paths[number, depth]
                heads = block.attn.num_heads
                rows = block.attn.qkv(block.norm1(tokens)).view(len(tokens), 3, heads, -1)
                q, k, v = rows.permute(1, 2, 0, 3).unbind()
                scores = q @ k.mT / math.sqrt(q.shape[-1])
                weights = scores.masked_fill(outside, -math.inf).softmax(dim=-1)
                attended = (weights @ v).transpose(0, 1).flatten(1)
                tokens = tokens + factors[0] * block.attn.proj(attended)
                tokens = tokens + factors[1] * block.mlp(block.norm2(tokens))
            found.append(tokens)
        return torch.stack(found)

    def regions(
        self, images: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] images -> [B, E] features as of `forward`, and [B, L, E] the patch tokens
        after all blocks and the final norm.

        `paths` and `kept` as for `encode`.
        """
        return self._regions(self.latents(images, paths, kept))

    def plain_regions(
        self, images: Tensor, paths: Tensor | None = None, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Reference of `regions`."""
        return self._regions(self.plain_latents(images, paths, kept))

    def _regions(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Feature and patch tokens of all tokens."""
        if self.pooling == "class":
            return latents[:, 0], latents[:, 1:]
        return latents.mean(dim=1), latents

    def token_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] images -> [B, L, E]: the patch tokens after every block and the final norm,
        row by row.
        """
        patches = self.patch_tokens(images)
        tokens = self._all_tokens(patches)
        for block in self.blocks:
            tokens = sum_of(*block(tokens))
        normalised: Tensor = self.norm(tokens[:, -patches.shape[1] :])
        return normalised

    def class_attention(self, images: Tensor) -> Tensor:
        """What the class token attends to in the last block that it is in.

        Args:
            images: [B, 3, H, W], as of a call.

        Returns:
            [B, A, L] shares of the attention of each head to the patch tokens, row by row of the
            image; their sum is 1 less the share of the class token itself.

        Raises:
            ValueError: if the feature is no class token.
        """
        if self.pooling not in CLASS_TOKEN:
            raise ValueError(
                f"pooling={self.pooling!r}: the feature is a mean of patch tokens, and no class "
                "token attends to them"
            )
        tokens = self._plain_tokens(self.patch_tokens(images), None)
        in_trunk = self.pooling == "class"
        for block in self.blocks[:-1] if in_trunk else self.blocks:
            tokens = sum_of(*block(tokens, None, None))
        if in_trunk:
            last = self.blocks[-1]
        else:
            *before, last = self.blocks_token
            assert self.cls_token is not None  # noqa: S101 - a type: there are blocks for it
            token = self.cls_token[:, 0].expand(len(tokens), -1)
            for block in before:
                assert isinstance(block, ClassBlock)  # noqa: S101 - a type: all are of this class
                token = block.plain(token, tokens)
            tokens = torch.cat([token[:, None], tokens], dim=1)
        assert isinstance(last, Block)  # noqa: S101 - a type: all blocks are of this class
        return last.attn.class_weights(last.norm1(tokens))[..., 1:]

    def stem_tensors(self) -> list[Tensor]:
        """All tensors that turn pixels into patch tokens."""
        tensors = list(self.patch_embed.parameters())
        if self.pos_embed is not None and self.positions in FIXED_POSITIONS:
            return [self.pos_embed, *tensors]
        return [*tensors]

    @property
    def reads_class_row(self) -> bool:
        """Whether `encode` calls `class_row` of the last block, not its `forward`."""
        return self.pooling == "class" and self.mlp_norm == "layer"

    def parts(self) -> Parts:
        """Modules by role. Objectives call more than `forward` of some of them."""
        methods: dict[str, tuple[str, ...]] = {
            "": (
                "encode",
                "taps",
                "encode_taps",
                "latents",
                "masked_tokens",
                "context_tokens",
                "regions",
            )
        }
        if isinstance(self.patch_embed, PatchStem):
            methods["patch_embed"] = ("of_patches",)
        if self.reads_class_row:
            methods[f"blocks.{len(self.blocks) - 1}"] = ("class_row",)
        return Parts(
            stem={"patch_embed": self.patch_embed},
            blocks=self.blocks,
            heads={"head": self.head},
            methods=methods,
        )

    def tokens_of(self, side: int) -> int:
        """Tokens of a view of this many pixels per side, including the class token."""
        return (side // self.patch_size) ** 2 + self._class_tokens

    def most_numbers(self, side: int | None = None) -> int:
        """Upper bound on the elements that training keeps per view, about twice the true value.

        It counts 40 elements per token, channel and block, and 8 per pair of tokens and head, which
        explicit attention keeps.

        Args:
            side: pixels per side of the view; default `image_size`.
        """
        first = self.blocks[0]
        assert isinstance(first, Block)  # noqa: S101 - a type: all blocks are of this class
        tokens = self.tokens if side is None else self.tokens_of(side)
        per_token = self.embed_dim * 40 + first.attn.num_heads * tokens * 8
        return tokens * per_token * (len(self.blocks) + len(self.blocks_token) + 1)

    def forward_flops(self, side: int, keep: float = 1.0) -> float:
        """FLOPs of the products in one forward of a view of this many pixels per side, with every
        token that stays in every block.

        Args:
            side: pixels per side.
            keep: share of the patch tokens that stay; the others are not embedded.
        """
        tokens = int((side // self.patch_size) ** 2 * keep) + self._class_tokens
        weights = sum(parameter.numel() for parameter in self.blocks.parameters())
        weights += sum(parameter.numel() for parameter in self.patch_embed.parameters())
        flops = 2 * weights * tokens + 4 * tokens**2 * self.embed_dim * len(self.blocks)
        for block in self.blocks_token:  # the weights once, for the class token
            assert isinstance(block, ClassBlock)  # noqa: S101 - a type: all blocks are of this class
            flops += 2 * sum(parameter.numel() for parameter in block.parameters())
            flops += 4 * tokens * self.embed_dim * block.attn.num_heads
        return flops

    def _projected(self, images: Tensor) -> Tensor:
        """[B, L, E] patches alone.

        Raises:
            ValueError: if the images are not squares of whole patches.
        """
        if images.ndim != 4 or images.shape[1:] != (3, self.image_size, self.image_size):
            self._require_whole_patches(images)
        patches: Tensor = self.patch_embed(images)
        return patches.flatten(2).transpose(1, 2)

    def _with_fixed(self, tokens: Tensor) -> Tensor:
        """Patch tokens with their positions, where these are fixed."""
        if self.pos_embed is None or self.positions not in FIXED_POSITIONS:
            return tokens
        return tokens + self._patch_positions(tokens.shape[1])

    def _mask_token(self) -> Tensor:
        """The trained token in place of masked patches.

        Raises:
            ValueError: if there is none.
        """
        if self.mask_token is None:
            raise ValueError("mask_token=None: call add_mask_token() when the encoder is built")
        return self.mask_token

    def _through(self, tokens: Tensor, paths: Tensor | None) -> Tensor:
        """All tokens through all blocks."""
        branch = None
        for block, factors in zip(self.blocks, self._by_block(paths), strict=True):
            tokens, branch = block(tokens, branch, factors)
        return sum_of(tokens, branch)

    def _by_block(self, paths: Tensor | None) -> Sequence[Tensor | None]:
        """Factors [B, 2] of each block, each contiguous, so that compiled blocks share a graph."""
        if paths is None:
            return [None] * len(self.blocks)
        return paths[:, : len(self.blocks)].transpose(0, 1).contiguous().unbind()

    @property
    def _class_tokens(self) -> int:
        """1 with a class token among the others, otherwise 0."""
        return int(self.pooling in ("class", "mean_norm"))

    def _positions(self, kind: Positions, grid: int) -> nn.Parameter | None:
        """[1, tokens, E]: the fixed table, or one that trains."""
        if kind == "none":
            return None
        if kind in FIXED_POSITIONS:
            table = FIXED_POSITIONS[kind](grid, self.embed_dim)[1 - self._class_tokens :]
            return nn.Parameter(table[None], requires_grad=False)
        return nn.Parameter(torch.empty(1, self.tokens, self.embed_dim).normal_(std=0.02))

    def _embeds_all(self, images: Tensor, kept: Tensor | None) -> bool:
        """Whether every patch is embedded: none is left out, or several sets of patches stay."""
        few = kept is not None and len(kept) == len(images)
        return not (few and isinstance(self.patch_embed, PatchStem))

    def _placed(self, patch_tokens: Tensor, kept: Tensor | None) -> Tensor:
        """The tokens that stay, with all their positions."""
        if kept is None:
            return self._all_tokens(patch_tokens)
        positions = self._own_positions(patch_tokens.shape[1])
        return self._some_tokens(taken(patch_tokens, kept), positions, kept)

    def _embedded(self, images: Tensor, kept: Tensor | None) -> Tensor:
        """`_placed` of images; patches that are left out are not embedded."""
        if kept is None or self._embeds_all(images, kept):
            return self._placed(self.patch_tokens(images), kept)
        assert isinstance(self.patch_embed, PatchStem)  # noqa: S101 - a type: others embed all patches
        self._require_whole_patches(images)
        tokens = self.patch_embed.of_patches(images, kept)
        positions = None
        if self.pos_embed is not None:
            positions = self._patch_positions((images.shape[-1] // self.patch_size) ** 2)
        return self._some_tokens(tokens, positions, kept)

    def _plain_tokens(self, patch_tokens: Tensor, kept: Tensor | None) -> Tensor:
        """Reference of `_placed`: all tokens get their positions, then some are left out."""
        tokens = self._all_tokens(patch_tokens)
        if kept is None:
            return tokens
        patches = taken(tokens[:, self._class_tokens :], kept)
        if not self._class_tokens:
            return patches
        sets = len(kept) // len(tokens)
        return torch.cat([tokens[:, :1].repeat(sets, 1, 1), patches], dim=1)

    def _read(self, tokens: Tensor, branch: Tensor | None) -> Tensor:
        """[B, E] of the residual stream after a block: the class token before the final norm, of
        which alone the sum is taken where it is one of the tokens, or the feature."""
        if self.pooling == "class":
            return sum_of(tokens[:, 0], None if branch is None else branch[:, 0])
        if self.pooling == "class_attention":
            return self._class_of(sum_of(tokens, branch))
        return self._pooled(sum_of(tokens, branch))

    def _pooled(self, tokens: Tensor) -> Tensor:
        """[B, E]: the feature of tokens [B, T, E] after all blocks."""
        if self.pooling == "mean_norm":
            return self._normalised(tokens[:, 1:].mean(dim=1))
        if self.pooling in CLASS_TOKEN:
            return self._normalised(self._class_of(tokens))
        return self._normalised(tokens).mean(dim=1)

    def _class_of(self, tokens: Tensor, *, plain: bool = False) -> Tensor:
        """[B, E]: the class token before the final norm, of tokens [B, T, E] after all blocks."""
        if not self.blocks_token:
            return tokens[:, 0]
        assert self.cls_token is not None  # noqa: S101 - a type: there are blocks for it
        token = self.cls_token[:, 0].expand(
            tokens.shape[0], -1
        )  # not len, which an export would fix
        for block in self.blocks_token:
            assert isinstance(block, ClassBlock)  # noqa: S101 - a type: all blocks are of this class
            token = (block.plain if plain else block.read)(token, tokens)
        return token

    def _plain_feature(self, tokens: Tensor) -> Tensor:
        """[B, E]: reference of the feature, of tokens [B, T, E] after a block."""
        if self.pooling == "class_attention":
            return self._normalised(self._class_of(tokens, plain=True))
        if self.pooling == "mean_norm":
            return self._normalised(tokens[:, 1:].sum(dim=1) / (tokens.shape[1] - 1))
        normalised = self._normalised(tokens)
        return normalised[:, 0] if self.pooling == "class" else normalised.mean(dim=1)

    def _normalised(self, tokens: Tensor) -> Tensor:
        normalised: Tensor = self.norm(tokens)
        return normalised

    def _all_tokens(self, patch_tokens: Tensor) -> Tensor:
        """The patch tokens after the class token, if there is one, with all positions."""
        tokens = patch_tokens
        if self.cls_token is not None and self._class_tokens:
            class_token: Tensor = self.cls_token
            if self.pos_embed is not None and self.positions in FIXED_POSITIONS:
                class_token = class_token + self.pos_embed[:, :1]
            tokens = torch.cat([class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)
        if self.pos_embed is not None and self.positions == "learned":
            tokens = tokens + self._learned_positions(patch_tokens.shape[1])
        return tokens

    def _some_tokens(self, patch_tokens: Tensor, positions: Tensor | None, kept: Tensor) -> Tensor:
        """Patch tokens that stay, [B, k, E], after the class token, with their positions.

        `positions`: [1, L, E], those that the patch tokens do not have yet.
        """
        tokens = patch_tokens
        if positions is not None:
            tokens = tokens + taken(positions, kept)
        if self.cls_token is None or not self._class_tokens:
            return tokens
        class_token: Tensor = self.cls_token
        if self.pos_embed is not None:
            class_token = class_token + self.pos_embed[:, :1]
        return torch.cat([class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)

    def _own_positions(self, count: int) -> Tensor | None:
        """[1, count, E]: positions that `patch_tokens` does not add, the learned ones."""
        return self._patch_positions(count) if self.positions == "learned" else None

    def _patch_positions(self, count: int) -> Tensor:
        """[1, count, E]: positions of the patch tokens of a square view with `count` of them."""
        assert self.pos_embed is not None  # noqa: S101 - a type: both callers have positions
        return resized_positions(self.pos_embed[:, self._class_tokens :], math.isqrt(count))

    def _learned_positions(self, count: int) -> Tensor:
        """[1, tokens, E]: trained positions, that of the class token first if there is one."""
        assert self.pos_embed is not None  # noqa: S101 - a type: both callers have positions
        if count + self._class_tokens == self.tokens:
            return self.pos_embed
        patches = self._patch_positions(count)
        return torch.cat([self.pos_embed[:, : self._class_tokens], patches], dim=1)

    def _require_whole_patches(self, images: Tensor) -> None:
        """Refuse images that are no squares of whole patches.

        Raises:
            ValueError: with the sizes that fit.
        """
        patch, side = self.patch_size, images.shape[-1]
        fits = images.ndim == 4 and images.shape[1:] == (3, side, side)
        if not fits or side < patch or side % patch:
            raise ValueError(
                f"images shape={tuple(images.shape)}: this encoder takes [B, 3, S, S], S a "
                f"multiple of patch_size={patch}, such as image_size={self.image_size}; "
                "change the size of the view or of the evaluation crop"
            )


def _check_sizes(
    image_size: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    num_heads: int,
    stem: str,
    positions: str,
) -> None:
    if stem not in ("patch", "conv"):
        raise ValueError(f'stem={stem!r}: is "patch" or "conv"')
    if patch_size < 1 or (stem == "conv" and patch_size != CONV_STEM_STRIDE):
        rule = (
            "the conv stem shrinks images by 16"
            if stem == "conv"
            else "a patch is at least 1 pixel wide"
        )
        raise ValueError(f"patch_size={patch_size}: {rule}")
    if image_size < patch_size or image_size % patch_size:
        raise ValueError(f"image_size={image_size}: must be a multiple of patch_size={patch_size}")
    if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
        raise ValueError(f"embed_dim={embed_dim}: must be a multiple of num_heads={num_heads}")
    if embed_dim % (8 if stem == "conv" else 4 if positions in FIXED_POSITIONS else 1):
        rule = (
            "must be a multiple of 8, because the conv stem starts with an eighth of it"
            if stem == "conv"
            else "must be a multiple of 4, because sine-cosine positions have four equal parts"
        )
        raise ValueError(f"embed_dim={embed_dim}: {rule}")
    if depth < 1:
        raise ValueError(f"depth={depth}: needs at least 1 block")


@dataclass(frozen=True, slots=True)
class ViTArchitecture:
    """A size of the vision transformer; calling it builds an encoder of this size.

    Attributes:
        width: channels E.
        depth: number of blocks.
        heads: attention heads A.
        stem: "patch" or "conv", see `VisionTransformer`.
        image_size: default pixels per side of an image.
        patch_size: default pixels per side of a patch.
    """

    width: int
    depth: int
    heads: int
    stem: Literal["patch", "conv"] = "patch"
    image_size: int = 224
    patch_size: int = 16

    def __call__(
        self,
        *,
        image_size: int | None = None,
        patch_size: int | None = None,
        freeze_patch_embed: bool = True,
        pooling: Pooling = "class",
        positions: Positions = "sincos",
        mlp_norm: MlpNorm = "layer",
        attention: str = "auto",
    ) -> VisionTransformer:
        """Build an encoder; the arguments are those of `VisionTransformer`."""
        return VisionTransformer(
            image_size=self.image_size if image_size is None else image_size,
            patch_size=self.patch_size if patch_size is None else patch_size,
            embed_dim=self.width,
            depth=self.depth,
            num_heads=self.heads,
            stem=self.stem,
            freeze_patch_embed=freeze_patch_embed,
            pooling=pooling,
            positions=positions,
            mlp_norm=mlp_norm,
            attention=attention,
        )


# For images of 8 to 16 and of 28 to 64 pixels: seconds and minutes on a CPU.
vit_nano = ViTArchitecture(64, 2, 4, image_size=8, patch_size=2)
vit_micro = ViTArchitecture(128, 4, 4, image_size=32, patch_size=4)
# As DeiT-Ti. ViT-S of MoCo v3 has 12 heads; that of DeiT, DINO and timm has 6. ViT-H of the paper
# has patches of 14 pixels.
vit_tiny = ViTArchitecture(192, 12, 3)
vit_small = ViTArchitecture(384, 12, 12)
deit_small = ViTArchitecture(384, 12, 6)
vit_base = ViTArchitecture(768, 12, 12)
vit_large = ViTArchitecture(1024, 24, 16)
vit_huge = ViTArchitecture(1280, 32, 16, patch_size=14)
# The convolutional stem replaces one block.
vit_conv_small = ViTArchitecture(384, 11, 12, stem="conv")
vit_conv_base = ViTArchitecture(768, 11, 12, stem="conv")

ARCHITECTURES = {
    name: value for name, value in globals().items() if isinstance(value, ViTArchitecture)
}
"""Architectures by name."""
