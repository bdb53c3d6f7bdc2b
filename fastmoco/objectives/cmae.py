"""CMAE (Huang et al. 2023): MAE, and a second decoder whose mean feature is compared with that of a
momentum encoder on all patches of another view.

The heads have batch norms and the keys are those of the batch, so they see the whole batch. Encoder
and both decoders go in chunks, of which the loss and the mean feature of each image stay.

Legend: B images, L patches, K of them seen, E width of the encoder, D of queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.models.encoder import Coupling
from fastmoco.models.heads import FORMS, build_head
from fastmoco.objectives.interface import Features, Inputs, Output, ParameterGroup, Progress
from fastmoco.objectives.key_comparison import one_way_reference, start_comparing_one_way
from fastmoco.objectives.mae import MAE, options_of
from fastmoco.objectives.masked import watched
from fastmoco.objectives.momentum import Average
from fastmoco.objectives.view_pairs import two_views
from fastmoco.recipes.cmae import CMAEConfig
from fastmoco_pipelines.loading.step_parts import KEY_FORWARD, LOSS, QUERY_FORWARD, part

WITHOUT_DECAY = ("cls_token", "mask_token", "pos_embed")


class CMAE(MAE):
    """MAE with masks of blocks of 2 x 2 patches, a momentum encoder and a decoder of features.

    The encoder sees some patches of view 1. The first decoder predicts the pixels of the others,
    the second one a feature [E] for every patch, whose mean over all patches passes projector and
    predictor: the query. The momentum encoder sees all patches of view 2; the mean of its patch
    tokens before the final norm passes its projector: the key. With u(v) = v / |v| the loss is

        that of MAE + 2 * temperature * CE(u(queries) u(keys of all ranks)^T / temperature, own)

    in this one direction. The average moves after a step, with a momentum that stays: the official
    configs have 0.996 as its first and its last value. The momentum encoder has an average of the
    final norm too, which evaluation may take and the keys do not read.

    The official feature decoder gives 3 * 16 * 16 numbers, the width of ViT-B by accident; here it
    gives E for every size. The heads start as torch's linear layers: how the official ones start is
    not known. Everything else starts as MAE.

    Args:
        build_encoder: as for `MAE`, called twice.
        projection_dim: D.
        hidden_dim: hidden width of projector and predictor.
        temperature: > 0, divides the cosines.
        ema_momentum: momentum of the average at step 0.
        ema_schedule: "cosine" rises to 1 at the end of the run, "constant" stays.
        feature_decoder_depth: blocks of the decoder of features, which is as wide as the other one.
        masked: further arguments of `MAE`.

    Attributes:
        encoder: as for `MAE`; `encoder.head` is its projector.
        momentum_encoder: its average, without gradient.
        feature_decoder: from the seen tokens to a feature of every patch.
        predictor: online side only.

    Raises:
        ValueError: as `MAE`, if the patches of a side are an odd number, or a number makes no sense.
    """

    view_count = 2

    def __init__(
        self,
        build_encoder: Callable[[], Any],
        *,
        projection_dim: int = 256,
        hidden_dim: int = 1536,
        temperature: float = 0.07,
        ema_momentum: float = 0.996,
        ema_schedule: Literal["cosine", "constant"] = "constant",
        feature_decoder_depth: int = 2,
        **masked: Any,
    ) -> None:
        super().__init__(build_encoder, decoder_positions="sincos", mask_blocks=True, **masked)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be positive")
        self.coupling = Coupling.HEADS
        self.temperature = temperature
        width, form = self.encoder.embed_dim, FORMS["cmae"]
        self.feature_decoder = self._build_decoder(depth=feature_decoder_depth, out_dim=width)
        self.momentum_encoder = build_encoder()
        for encoder in (self.encoder, self.momentum_encoder):
            encoder.head = build_head(width, hidden_dim, projection_dim, form)
        self.predictor = build_head(projection_dim, hidden_dim, projection_dim, form)
        self.average = Average(
            self.encoder, self.momentum_encoder, start=ema_momentum, schedule=ema_schedule
        )

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> CMAE:
        """The objective of a config.

        Raises:
            ValueError: if an option has no effect beside the masks.
        """
        own = config.objective
        assert isinstance(own, CMAEConfig)  # noqa: S101 - a type: each class is built from its own config
        return cls(
            build_encoder,
            projection_dim=config.model.projection_dim,
            hidden_dim=config.model.hidden_dim,
            temperature=own.temperature,
            ema_momentum=own.ema_momentum,
            ema_schedule=own.ema_schedule,
            feature_decoder_depth=own.feature_decoder_depth,
            **options_of(config, own),
        )

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Online: the loss of MAE of each image [b], and the mean of its decoded features [b, E].
        Target: figures of each image for telemetry [b, 2], and the mean of the patch tokens of the
        other view by the momentum encoder [b, E].

        Raises:
            ValueError: if there are not two views of the encoder's size, the first with its mask.
        """
        two_views(inputs)
        loss, latents, figures = self._passed(inputs)
        with part(QUERY_FORWARD):
            pooled = self.feature_decoder(latents, inputs.kept[0]).mean(dim=1)
        if not target:
            return Features((loss, pooled))
        with torch.no_grad(), part(KEY_FORWARD):
            tokens = self.momentum_encoder.latents(inputs.views[1], normalised=False)
            return Features((loss, pooled), (figures, tokens[:, 1:].mean(dim=1)))

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """The mean loss of MAE over images, and the heads and keys of the whole batch."""
        (losses, pooled), (figures, target) = features.online, features.target
        with torch.no_grad(), part(KEY_FORWARD):
            keys = self.momentum_encoder.head(target)
        compared = start_comparing_one_way(keys, temperature=self.temperature, accuracy=accuracy)
        with part(QUERY_FORWARD):
            queries = self.predictor(self.encoder.head(pooled))
        with part(LOSS):
            found = compared(queries)
            of_pixels = losses.mean()
            total = of_pixels + found.loss
        watch = self._watch(figures, queries, keys, of_pixels, found.loss)
        if found.shares is not None:
            watch["accuracy"] = found.shares
        return Output(total, watch)

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """As that of `MAE`, with the mean features and the whole logits written out."""
        of_pixels, latents, figures = self._plain(inputs)
        decoded = self.feature_decoder.plain(latents, inputs.kept[0])
        q = self.predictor(self.encoder.head(decoded.sum(dim=1) / decoded.shape[1]))
        with torch.no_grad():
            tokens = self.momentum_encoder.plain_latents(inputs.views[1], normalised=False)[:, 1:]
            k = self.momentum_encoder.head(tokens.sum(dim=1) / tokens.shape[1])
        loss, shares = one_way_reference(q, k, self.temperature)
        watch = self._watch(figures, q, k, of_pixels, loss)
        if accuracy:
            watch["accuracy"] = shares
        return Output(of_pixels + loss, watch)

    def view_flops(self, number: int, side: int, keep: float = 1.0) -> float:
        """FLOPs of a step: those of MAE and of the second decoder for the first view, and a forward
        of the momentum encoder on all patches of the other one."""
        if number:
            return float(self.encoder.forward_flops(side))
        return super().view_flops(number, side) + 3 * self.feature_decoder.forward_flops()

    def averages(self) -> Mapping[nn.Parameter, Tensor]:
        """Weights of encoder and projector -> those of the momentum encoder."""
        return self.average.averages()

    def ema_momentum(self, at: Progress) -> float:
        """That of this step: the method averages after the optimizer."""
        return self.average.value(at.step, at)

    def schedules(self, at: Progress) -> Mapping[str, float]:
        """The momentum of the move that ends the step."""
        return {"ema_momentum": self.ema_momentum(at)}

    def parameter_group(self, name: str, parameter: nn.Parameter) -> ParameterGroup:
        """Biases, layer norms, class token and mask tokens do not decay; weights of batch norms
        do, as in the official runs."""
        of_norm = "norm" in name.rpartition(".")[0].rpartition(".")[2]
        plain = of_norm or name.endswith(("bias", *WITHOUT_DECAY))
        return ParameterGroup(weight_decay_scale=0.0 if plain else 1.0)

    def _watch(
        self, figures: Tensor, queries: Tensor, keys: Tensor, of_pixels: Tensor, of_keys: Tensor
    ) -> dict[str, Tensor]:
        """What telemetry sees."""
        return {
            **watched(figures, queries.detach(), name="queries"),
            "keys": keys.detach()[None],
            "reconstruction_loss": of_pixels.detach(),
            "contrast_loss": of_keys.detach(),
        }
