"""FCMAE (Woo et al. 2023, ConvNeXt V2): a convolutional encoder sees some patches, and a small
decoder predicts the pixels of the others.

The encoder computes on a dense map that is zero where patches are hidden (`ConvNeXtV2.masked`).
With the norms of `GRN` of each image, as in the paper, nothing couples images. The official PyTorch
release takes them over all images of a process; that is an option here (`scope="batch"`), and then
a batch cannot go in chunks. Weights start with deviation 0.02 as in the paper; the official release
starts most of them with a deviation near 1.

Legend: B images, L patches, K of them seen, E width of the encoder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastmoco.config import Config
from fastmoco.models.convnextv2 import ConvNeXtV2
from fastmoco.models.encoder import Coupling
from fastmoco.models.grn import Scope
from fastmoco.models.map_decoder import MapDecoder
from fastmoco.models.masks import PatchMasks, mask_of
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
    watched,
)
from fastmoco.recipes.fcmae import FCMAEConfig
from fastmoco_pipelines.loading.step_parts import LOSS, QUERY_FORWARD, part

COUPLES = "objective.response_norms=batch takes norms over the whole batch of a process"


class FCMAE(MaskedObjective):
    """An encoder of the patches that are seen, and a decoder of all patches.

    The final norm of the encoder is not used in training and stays as it starts; an evaluation
    takes it.

    Args:
        build_encoder: called once; a ConvNeXt V2.
        mask_ratio: share of the patches that are predicted.
        normalise_pixels: whether each patch is normalised before it is predicted.
        decoder_width: channels of the decoder.
        decoder_depth: its blocks.
        scope: of the norms in the encoder's `GRN`, "image" or "batch".
        seed: of the masks.

    Attributes:
        encoder: sees K patches in training; an evaluation gives it all of them.
        decoder: predicts the pixels of a patch in the order row, column, channel.
        kept: K.

    Raises:
        ValueError: if the encoder is another one, an image is no whole patches, or none would be
            seen.
    """

    def __init__(
        self,
        build_encoder: Callable[[], Any],
        *,
        mask_ratio: float = 0.6,
        normalise_pixels: bool = True,
        decoder_width: int = 512,
        decoder_depth: int = 1,
        scope: Scope = "image",
        seed: int = 0,
    ) -> None:
        super().__init__()
        encoder = build_encoder()
        if not isinstance(encoder, ConvNeXtV2):
            raise ValueError(
                "model.architecture: must be a ConvNeXt V2; take --model.architecture "
                "convnextv2_tiny, or the method MAE for a ViT"
            )
        self.encoder = encoder
        self.normalise_pixels = normalise_pixels
        self.scope: Scope = scope
        self.coupling = Coupling.NONE if scope == "image" else Coupling.TRUNK
        self.coupling_reason = "" if scope == "image" else COUPLES
        if encoder.image_size % encoder.stride:
            raise ValueError(
                f"model.image_size={encoder.image_size}: must be a multiple of {encoder.stride}, the "
                "side of a hidden patch"
            )
        grid = encoder.image_size // encoder.stride
        self.masks = PatchMasks(seed=seed, grid=grid, ratio=mask_ratio)
        self.kept = self.masks.kept
        encoder.norm.requires_grad_(False)
        self.decoder = MapDecoder(
            in_dim=encoder.embed_dim,
            width=decoder_width,
            depth=decoder_depth,
            out_dim=3 * encoder.stride**2,
        )

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> FCMAE:
        """The objective of a config."""
        own = config.objective
        assert isinstance(own, FCMAEConfig)  # noqa: S101 - a type: each class is built from its own config
        return cls(
            build_encoder,
            mask_ratio=own.mask_ratio,
            normalise_pixels=own.normalise_pixels,
            decoder_width=own.decoder_width,
            decoder_depth=own.decoder_depth,
            scope=own.response_norms,
            seed=config.seed,
        )

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Online: the loss of each image [b]. Target: figures of each image for telemetry [b, 2],
        and the mean of its seen positions [b, E].

        Encoder, decoder and loss of a chunk are one pass, of which a number per image stays.
        """
        view, mask, paths = self._seen(inputs)
        with part(QUERY_FORWARD):
            latents = self.encoder.masked(view, ~mask, self.scope, paths)
            predictions = self.decoder(latents, mask)
        with part(LOSS):
            count = self._patches - self.kept
            loss, figures = masked_loss(predictions, self.targets(view), mask, count)
        return Features((loss,), (figures, self._pooled(latents)) if target else ())

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same by the reference of each block, and the loss as a sum over the batch by a count
        over the batch."""
        view, mask, paths = self._seen(inputs)
        latents = self.encoder.masked(view, ~mask, self.scope, paths, plain=True)
        predictions, targets = self.decoder.plain(latents, mask), self.targets(view)
        loss, figures = plain_masked_loss(predictions, targets, mask.to(targets.dtype))
        return Output(loss, watched(figures, self._pooled(latents)))

    def targets(self, view: Tensor) -> Tensor:
        """Pixels of the patches of images [b, 3, S, S], normalised if so: [b, L, 3 p^2]."""
        return pixel_targets(view, self.encoder.stride, normalised=self.normalise_pixels)

    def _seen(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """The view, the mask of its patches [b, L], and factors of stochastic depth.

        Raises:
            ValueError: if there is not one view with a mask.
        """
        view, kept = masked_view(inputs)
        return view, mask_of(kept, self._patches), inputs.paths_of(0)[0]

    def _pooled(self, latents: Tensor) -> Tensor:
        """[b, E] mean over the positions that are seen, without gradient."""
        return latents.detach().sum((2, 3)) / self.kept
