"""MP3, masked patch position prediction (Zhai et al. 2022): the encoder has no positions, and says of
each patch where in the image it is.

In every block all patches ask, and a random part of them, the context, has keys and values, taken
from their state before that block. The authors have released no code, so this follows the paper as
it is remembered and summarised by others: the share of the context, that it is gathered again in
each block (another implementation gives all blocks the context of the first one) and the mean over
all patches, those of the context included, are choices. So are start values: those of MoCo v3's ViT.

Nothing couples images, and every image has equally many patches, so the loss of the batch is the mean
over its images: it may be accumulated over chunks as it is.

Legend: B images, L patches, K of them in the context, E width of the encoder.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fastmoco.config import Config
from fastmoco.models.decoder import LinearDecoder
from fastmoco.models.encoder import Coupling
from fastmoco.models.masks import PatchMasks
from fastmoco.objectives.interface import (
    Features,
    Inputs,
    Output,
    Progress,
)
from fastmoco.objectives.masked import (
    MaskedObjective,
    masked_view,
    require_own_masks,
    require_pooling,
    require_size,
    require_vit,
)
from fastmoco.recipes.mp3 import MP3Config
from fastmoco_pipelines.loading.step_parts import LOSS, QUERY_FORWARD, part


class MP3(MaskedObjective):
    """An encoder without positions, and a layer norm and a linear layer that classify each patch by
    its number.

    Args:
        build_encoder: called once; a ViT with linear patches and layer norms, without positions and
            class token.
        mask_ratio: share of the patches outside of the context.
        seed: of the contexts.

    Attributes:
        encoder: its final norm is not part of the method and keeps its start values; an evaluation
            has all patches as context, and reads their mean.
        decoder: L logits of each patch.
        kept: K.

    Raises:
        ValueError: if the encoder is another one, or the context would be empty, or all patches.
    """

    exact_views = False

    def __init__(
        self, build_encoder: Callable[[], Any], *, mask_ratio: float = 0.75, seed: int = 0
    ) -> None:
        super().__init__()
        encoder = build_encoder()
        require_vit(encoder, "whose attention can be limited to some tokens")
        if encoder.positions != "none":
            raise ValueError(
                f"model.positions={encoder.positions!r}: would tell where a patch is; take "
                "--model.positions none"
            )
        require_pooling(encoder, ("norm_mean", "mean"), "MP3 has no class token")
        self.encoder = encoder
        self.coupling = Coupling.NONE
        grid = encoder.image_size // encoder.patch_size
        self.masks = PatchMasks(seed=seed, grid=grid, ratio=mask_ratio)
        self.kept = self.masks.kept
        encoder.norm.requires_grad_(False)
        self.decoder = LinearDecoder(encoder.embed_dim, self._patches)

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> MP3:
        """The objective of a config.

        Raises:
            ValueError: if an option has no effect beside the context, or its blocks cannot have one.
        """
        own = config.objective
        assert isinstance(own, MP3Config)  # noqa: S101 - a type: each class is built from its own config
        require_own_masks(config)
        for name, plain in (("blocks", "modules"), ("linears", "native")):
            value = getattr(config.model, name)
            if value != plain:
                raise ValueError(
                    f"model.{name}={value!r}: cannot limit keys and values to a context; take "
                    f"--model.{name} {plain}"
                )
        return cls(build_encoder, mask_ratio=own.mask_ratio, seed=config.seed)

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Online: the loss of each image [b]. Target: the share of its patches whose place is right
        [b], and the mean of its tokens [b, E].

        Encoder, decoder and loss of a chunk are one pass, of which a number per image stays.
        """
        view, kept = masked_view(inputs)
        require_size(self.encoder, view)
        paths = inputs.paths[0][:, 0] if inputs.paths else None
        with part(QUERY_FORWARD):
            tokens = self.encoder.context_tokens(view, paths, kept)
            logits = self.decoder(tokens)
        with part(LOSS):
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            places = torch.arange(self._patches, device=view.device).expand(len(view), -1)
            loss = cross_entropy(wide.mT, places, reduction="none").mean(dim=1)
        if not target:
            return Features((loss,))
        right = (wide.detach().argmax(dim=2) == places).to(wide.dtype).mean(dim=1)
        return Features((loss,), (right, tokens.detach().mean(dim=1)))

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """The mean over images."""
        with part(LOSS):
            loss = features.online[0].mean()
        right, rows = features.target
        return Output(loss, {"features": rows[None], "position_accuracy": right.mean()})

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same an image at a time, with attention written out."""
        view, kept = masked_view(inputs)
        paths = inputs.paths[0][:, 0] if inputs.paths else None
        tokens = self.encoder.plain_context_tokens(view, paths, kept)
        losses, right = [], []
        for rows in self.decoder(tokens):
            chosen = rows.log_softmax(dim=1).diagonal()
            losses.append(-chosen.mean())
            right.append((rows.argmax(dim=1) == torch.arange(len(rows))).to(rows.dtype).mean())
        watch = {
            "features": tokens.detach().mean(dim=1)[None],
            "position_accuracy": torch.stack(right).mean(),
        }
        return Output(torch.stack(losses).mean(), watch)

    def uninformed_loss(self, batch: int) -> float:
        """The logarithm of L: every place is as likely."""
        return math.log(self._patches)
