"""MAE (He et al. 2022): the encoder sees a quarter of the patches, and a decoder predicts the pixels
of the others.

Nothing couples images and every image has equally many masked patches, so the loss of the batch is
the mean over its images: it may be accumulated over chunks as it is.

Legend: B images, L patches, K of them seen, E width of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.config.model import Positions
from fastmoco.models.blocks import xavier_
from fastmoco.models.decoder import TokenDecoder
from fastmoco.models.encoder import Coupling
from fastmoco.models.masks import PatchMasks, mask_of
from fastmoco.models.vit import VisionTransformer
from fastmoco.objectives.interface import (
    Features,
    Inputs,
    Output,
    Progress,
)
from fastmoco.objectives.masked import (
    MaskedObjective,
    masked_loss,
    masked_view,
    pixel_targets,
    plain_masked_loss,
    require_own_masks,
    require_pooling,
    require_size,
    require_vit,
    watched,
)
from fastmoco.recipes.mae import MAEConfig
from fastmoco_pipelines.loading.step_parts import LOSS, QUERY_FORWARD, part

INITIAL_STD = 0.02
"""Deviation of the initial class token."""


class MAE(MaskedObjective):
    """An encoder of the patches that are seen, and a decoder of all patches.

    The encoder starts as MAE: every linear layer Xavier-uniform, q, k and v as one matrix; the
    patch projection likewise with torch's bias; class token normal with deviation 0.02.

    Args:
        build_encoder: called once; a ViT with linear patches, layer norms and a class token.
        mask_ratio: share of the patches that are predicted.
        normalise_pixels: whether each patch is normalised before it is predicted.
        decoder_width: channels of the decoder.
        decoder_depth: its blocks.
        decoder_heads: its attention heads.
        decoder_positions: its table of positions, "sincos_columns" or "sincos".
        mask_blocks: whether patches are masked in blocks of 2 x 2.
        attention: attention backend of the decoder.
        seed: of the masks.

    Attributes:
        encoder: sees K patches in training; an evaluation gives it all of them.
        decoder: predicts the pixels of a patch in the order row, column, channel.
        kept: K.

    Raises:
        ValueError: if the encoder is another one, or no patch would be seen, or none predicted.
    """

    mask_count: int = 1
    """Views that are masked, the first ones."""
    absolute_errors: bool = False
    """Whether the errors of pixels are absolute ones, not squares."""
    poolings: tuple[str, ...] = ("class",)
    """Features that the encoder may have."""

    def __init__(
        self,
        build_encoder: Callable[[], Any],
        *,
        mask_ratio: float = 0.75,
        normalise_pixels: bool = True,
        decoder_width: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        decoder_positions: Positions = "sincos_columns",
        mask_blocks: bool = False,
        attention: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        encoder = build_encoder()
        require_vit(encoder, "whose patches can be left out")
        reads_class = self.poolings == ("class",)
        needs = "the decoder reads a class token" if reads_class else "tokens need a norm"
        require_pooling(encoder, self.poolings, needs)
        self.encoder = encoder
        self.normalise_pixels = normalise_pixels
        self.coupling = Coupling.NONE
        grid = encoder.image_size // encoder.patch_size
        self.masks = PatchMasks(seed=seed, grid=grid, ratio=mask_ratio, blocks=mask_blocks)
        self.kept = self.masks.kept
        initialise_(encoder)
        self._build_decoder = partial(
            TokenDecoder,
            in_dim=encoder.embed_dim,
            grid=grid,
            width=decoder_width,
            num_heads=decoder_heads,
            class_tokens=int(encoder.pooling == "class"),
            positions=decoder_positions,
            attention=attention,
        )
        self.decoder = self._build_decoder(depth=decoder_depth, out_dim=3 * encoder.patch_size**2)

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> MAE:
        """The objective of a config.

        Raises:
            ValueError: if an option has no effect beside the masks.
        """
        own = config.objective
        assert isinstance(own, MAEConfig)  # noqa: S101 - a type: each class is built from its own config
        return cls(build_encoder, **options_of(config, own))

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Online: the loss of each image [b]. Target: figures of each image for telemetry [b, 2],
        and the class feature [b, E].

        Encoder, decoder and loss of a chunk are one pass, of which a number per image stays.
        """
        loss, latents, figures = self._passed(inputs)
        if not target:
            return Features((loss,))
        return Features((loss,), (figures, latents[:, 0].detach().clone()))

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same with nothing left out early: all patches are embedded, mask tokens are appended
        and put in their places, and the loss is a sum over the batch by a count over the batch."""
        loss, latents, figures = self._plain(inputs)
        return Output(loss, watched(figures, latents[:, 0].detach()))

    def view_flops(self, number: int, side: int, keep: float = 1.0) -> float:
        """FLOPs of a step for the view: forward and backward of the encoder on the patches that it
        sees, and of the decoder on all."""
        seen = self.encoder.forward_flops(side, self.kept / self._patches)
        return float(3 * (seen + self.decoder.forward_flops()))

    def _seen(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The first view, and the patches of it that the encoder sees.

        Raises:
            ValueError: if it is not of the encoder's size, or there are other views or masks.
        """
        view, kept = masked_view(inputs, views=self.view_count, masks=self.mask_count)
        require_size(self.encoder, view)
        return view, kept

    def _passed(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each image [b], what the encoder makes of the seen tokens [b, 1 + K, E], and
        figures [b, 2] without gradient."""
        view, kept = self._seen(inputs)
        with part(QUERY_FORWARD):
            latents = self.encoder.latents(view, *inputs.paths_of(0))
            predictions = self.decoder(latents, kept)
        with part(LOSS):
            mask, targets = mask_of(kept, self._patches), self.targets(view)
            count = self._patches - self.kept
            loss, figures = masked_loss(
                predictions, targets, mask, count, absolute=self.absolute_errors
            )
        return loss, latents, figures

    def _plain(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Reference of `_passed`, with the loss of the batch."""
        view, kept = self._seen(inputs)
        latents = self.encoder.plain_latents(view, *inputs.paths_of(0))
        predictions = self.decoder.plain(latents, kept)
        rows = torch.arange(len(view), device=view.device)[:, None]
        removed = torch.ones_like(predictions[..., 0])
        removed[rows, kept] = 0
        loss, figures = plain_masked_loss(
            predictions, self.targets(view), removed, absolute=self.absolute_errors
        )
        return loss, latents, figures

    def targets(self, view: Tensor) -> Tensor:
        """Pixels of the patches of images [b, 3, S, S], normalised if so: [b, L, 3 p^2]."""
        side = self.encoder.patch_size
        return pixel_targets(view, side, normalised=self.normalise_pixels)


def options_of(config: Config, own: MAEConfig) -> dict[str, Any]:
    """Arguments of `MAE` by a config.

    Raises:
        ValueError: if an option has no effect beside the masks.
    """
    require_own_masks(config)
    return {
        "mask_ratio": own.mask_ratio,
        "normalise_pixels": own.normalise_pixels,
        "decoder_width": own.decoder_width,
        "decoder_depth": own.decoder_depth,
        "decoder_heads": own.decoder_heads,
        "attention": config.model.attention,
        "seed": config.seed,
    }


@torch.no_grad()
def initialise_(encoder: VisionTransformer) -> None:
    """The initial weights of MAE's ViT, beside those that MoCo v3 has too."""
    encoder.blocks.apply(xavier_)
    for module in encoder.patch_embed.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()  # the bias
            nn.init.xavier_uniform_(module.weight.flatten(1))
    if encoder.cls_token is not None:
        nn.init.normal_(encoder.cls_token, std=INITIAL_STD)
