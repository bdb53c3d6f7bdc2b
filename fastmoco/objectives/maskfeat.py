"""MaskFeat on images (Wei et al. 2022): the encoder sees a token in place of masked patches, and
predicts their histograms of oriented gradients.

Nothing couples images but the number of masked patches, which differs between images: the loss of
a batch is a sum over its masked patches by their number. The numbers of all ranks are known before
the first forward, so a patch counts its share of them (`masked_shares`), and the loss is a mean over
images that may be accumulated over chunks. The official code divides by the number of the process
alone, so there images of a process with fewer masked patches count more.

Legend: B images, L patches, T tokens, E width of the encoder, P numbers of a patch's histograms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.models.decoder import LinearDecoder
from fastmoco.models.encoder import Coupling
from fastmoco.models.masks import block_masks, masked_shares
from fastmoco.models.vit import VisionTransformer
from fastmoco.objectives.hog import BINS, hog_targets
from fastmoco.objectives.interface import (
    START,
    Features,
    Inputs,
    Output,
    Progress,
)
from fastmoco.objectives.masked import (
    MaskedObjective,
    figures_of,
    masked_loss,
    require_own_masks,
    require_pooling,
    require_size,
    require_vit,
    watched,
)
from fastmoco.recipes.maskfeat import InitialWeights, MaskFeatConfig
from fastmoco_pipelines.loading.step_parts import LOSS, QUERY_FORWARD, part

INITIAL_STD = 0.02
"""Deviation of the initial weights."""
INITIAL_BIAS = 0.02
"""Initial biases of the trunk."""
WIDE_STD = 0.4
"""Deviation of trained positions beside patches of a Xavier-uniform projection, which is about theirs:
positions of 0.02 are lost among them, and a masked patch is then predicted by its place alone."""


class MaskFeat(MaskedObjective):
    """An encoder of all patches, of which some are replaced by one trained token, and a layer norm
    and a linear layer on the masked ones. The loss is the mean squared difference to their
    histograms.

    Args:
        build_encoder: called once; a ViT with linear patches and layer norms.
        mask_ratio: share of the patches that are masked, at most: `block_masks` may mask fewer.
        cell: side of a cell of the histograms in pixels.
        initial_weights: "maskfeat": as in the official code (`initialise_`); "xavier": as the encoder
            is built, with trained positions of deviation 0.4.
        seed: of the masks.

    Attributes:
        encoder: its final norm is not part of the method and keeps its start values; an evaluation
            reads the class token behind it, of images without a mask.
        decoder: predicts the P numbers of a patch, in the order of `hog_targets`.
        masked: patches to mask in each image.

    Raises:
        ValueError: if the encoder is another one, the cells do not fill its patches, or no patch
            would be masked, or all.
    """

    def __init__(
        self,
        build_encoder: Callable[[], Any],
        *,
        mask_ratio: float = 0.4,
        cell: int = 8,
        initial_weights: InitialWeights = "maskfeat",
        seed: int = 0,
    ) -> None:
        super().__init__()
        encoder = build_encoder()
        require_vit(encoder, "whose tokens can be replaced")
        require_pooling(encoder, ("class",), "a class token goes along with the patches")
        if encoder.positions == "none":
            raise ValueError(
                "model.positions='none': all masked patches of an image would look alike; take "
                "--model.positions learned"
            )
        side = encoder.patch_size
        if side % cell:
            raise ValueError(
                f"objective.cell={cell}: must divide model.patch_size={side}; take "
                f"--objective.cell {side}"
            )
        self.encoder = encoder
        self.cell, self.seed = cell, seed
        self.coupling = Coupling.NONE
        self.masked = round(self._grid**2 * mask_ratio)
        if not 1 <= self.masked < self._grid**2:
            few, cure = ("none", "larger") if self.masked < 1 else ("all", "smaller")
            raise ValueError(
                f"objective.mask_ratio={mask_ratio}: masks {few} of the {self._grid**2} patches; "
                f"take a {cure} share"
            )
        encoder.add_mask_token()
        if initial_weights == "maskfeat":
            initialise_(encoder)
        elif encoder.positions == "learned":
            nn.init.normal_(encoder.pos_embed, std=WIDE_STD)
        encoder.norm.requires_grad_(False)
        self.decoder = LinearDecoder(encoder.embed_dim, 3 * BINS * (side // cell) ** 2)

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> MaskFeat:
        """The objective of a config.

        Raises:
            ValueError: if an option has no effect beside the masks.
        """
        own = config.objective
        assert isinstance(own, MaskFeatConfig)  # noqa: S101 - a type: each class is built from its own config
        require_own_masks(config)
        return cls(
            build_encoder,
            mask_ratio=own.mask_ratio,
            cell=own.cell,
            initial_weights=own.initial_weights,
            seed=config.seed,
        )

    def inputs(
        self,
        views: tuple[Tensor, ...],
        masks: tuple[Tensor, ...] = (),
        at: Progress = START,
        *,
        labels: Tensor | None = None,
    ) -> Inputs:
        """The view, and as its mask what each patch counts in the loss [B, L]: 0 where it is seen.

        All ranks must call this together, because the loss is by the masked patches of all.

        Args:
            views: of the local batch.
            masks: [B, L] bool, True where masked; drawn if there is none, also in evaluation mode.
            at: the step.
            labels: not read.

        Raises:
            ValueError: if there is not one view of the encoder's size, or the mask does not fit.
        """
        if len(views) != 1:
            raise ValueError(f"views: {len(views)}; MaskFeat takes one view")
        (view,) = views
        require_size(self.encoder, view)
        shape = (len(view), self._grid**2)
        if not masks:
            drawn = block_masks(
                self.seed, len(view), self._grid, self.masked, step=at.step, device=view.device
            )
            masks = (drawn,)
        if len(masks) != 1 or masks[0].shape != shape or masks[0].dtype != torch.bool:
            found = ", ".join(f"{tuple(mask.shape)} {mask.dtype}" for mask in masks)
            raise ValueError(f"masks: {found}; must be one [{shape[0]}, {shape[1]}] of bool")
        return super().inputs(views, (masked_shares(masks[0]),), at, labels=labels)

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Online: the loss of each image [b]. Target: figures of each image for telemetry [b, 2],
        and the class feature before the final norm [b, E].

        Encoder, decoder and loss of a chunk are one pass, of which a number per image stays. The
        decoder goes over all patches, because masked ones are of no fixed number.
        """
        (view,), (shares,) = inputs.views, inputs.masks
        with part(QUERY_FORWARD):
            tokens = self.encoder.masked_tokens(view, shares > 0, *inputs.paths_of(0))
            predictions = self.decoder(tokens[:, -shares.shape[1] :])
        with part(LOSS):
            targets = self.targets(view)
            loss, figures = masked_loss(predictions, targets, shares.to(targets.dtype), 1)
        if not target:
            return Features((loss,))
        return Features((loss,), (figures, tokens[:, 0].detach().clone()))

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same on one process: the decoder on masked rows alone, and a mean over all of them."""
        (view,), (shares,) = inputs.views, inputs.masks
        masked = shares > 0
        tokens = self.encoder.plain_masked_tokens(view, masked, *inputs.paths_of(0))
        rows = self.decoder(tokens[:, -shares.shape[1] :][masked])
        labels = self.targets(view)[masked]
        figures = torch.stack(figures_of(rows, labels), dim=1)
        return Output(((rows - labels) ** 2).mean(), watched(figures, tokens[:, 0].detach()))

    def targets(self, view: Tensor) -> Tensor:
        """Histograms of the patches of images [b, 3, S, S]: [b, L, P], float32 or wider."""
        return hog_targets(view, self.encoder.patch_size, self.cell)

    def _kept(self, views: tuple[Tensor, ...], at: Progress) -> tuple[Tensor, ...]:
        """No choice: the encoder has all patches, of which some are replaced."""
        return ()

    @property
    def _grid(self) -> int:
        """Patches per side."""
        return int(self.encoder.image_size // self.encoder.patch_size)


@torch.no_grad()
def initialise_(encoder: VisionTransformer) -> None:
    """The initial weights of MaskFeat's ViT: linear layers, patch projection, class token, mask token
    and trained positions normal with deviation 0.02, biases of linear layers and of layer norms at
    0.02, that of the projection as torch's. What does not train keeps its own."""
    for module in encoder.patch_embed.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()  # the bias
    for name, parameter in encoder.named_parameters():
        if not parameter.requires_grad or name.startswith("norm."):
            continue
        if parameter.ndim > 1:
            parameter.normal_(std=INITIAL_STD)
        elif name.endswith("bias") and name.startswith("blocks."):
            parameter.fill_(INITIAL_BIAS)
