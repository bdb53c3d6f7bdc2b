"""MACRL, as far as its abstract says: two branches with masks of different size, absolute errors of
pixels, and InfoNCE between the features of both.

The source is the abstract alone, and no code is known. It has two branches, one with more masked
patches and stronger augmentation, an InfoNCE loss between features of the encoders, and a
reconstruction with absolute errors; a reader adds projectors and a bank of keys. The rest is our
choice: ratios 0.75 and 0.5, the second branch is a momentum encoder (0.99, rising to 1), features are
the mean of the seen patches behind heads of MoBY, a queue of 4096 keys, temperature 0.2, both losses
weigh alike. A reconstruction of the second branch would have no gradient then, so there is none.

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
from fastmoco.models.masks import PatchMasks
from fastmoco.objectives.interface import Features, Inputs, Output, Progress
from fastmoco.objectives.key_queue import KeepsKeys, queued_reference, require_whole_batches
from fastmoco.objectives.mae import MAE, options_of
from fastmoco.objectives.masked import watched
from fastmoco.objectives.momentum import Average
from fastmoco.objectives.view_pairs import two_views
from fastmoco.recipes.macrl import MACRLConfig
from fastmoco_kernels import queued_info_nce_loss
from fastmoco_pipelines.loading.step_parts import KEY_FORWARD, LOSS, QUERY_FORWARD, part


class MACRL(KeepsKeys, MAE):
    """MAE on view 1, and the comparison of its encoder with a momentum encoder on view 2 that sees
    more patches.

    The mean of the patch tokens that the encoder saw passes projector and predictor: the query.
    That of the momentum encoder passes its projector: the key. With pixels t of masked patches and
    predictions p the loss is

        mean |p - t| + contrast_weight * CE([q k, q queue] / temperature, 0)

    of queries, keys and queue at unit length, in this direction alone. The average moves as in
    MoBY, at the end of a step with the momentum of the next one.

    Args:
        build_encoder: as for `MAE`, called twice; it may pool by "norm_mean", and then has no class
            token and evaluates what is compared here, on all patches.
        key_mask_ratio: share of the patches that the momentum encoder does not see.
        projection_dim: D.
        hidden_dim: hidden width of projector and predictor.
        contrast_weight: factor on the InfoNCE loss.
        temperature: > 0, divides the cosines.
        ema_momentum: momentum of the average at step 0.
        ema_schedule: "cosine" rises to 1 at the end of the run, "constant" stays.
        queue: keys in it, a multiple of the global batch.
        masked: further arguments of `MAE`.

    Attributes:
        encoder: as for `MAE`; `encoder.head` is its projector.
        momentum_encoder: its average, without gradient.
        predictor: online side only.
        queue: [queue, D], see `KeepsKeys`.

    Raises:
        ValueError: as `MAE`, or if a number makes no sense.
    """

    view_count = 2
    mask_count = 2
    absolute_errors = True
    poolings = ("class", "norm_mean")

    def __init__(
        self,
        build_encoder: Callable[[], Any],
        *,
        key_mask_ratio: float = 0.5,
        projection_dim: int = 256,
        hidden_dim: int = 4096,
        contrast_weight: float = 1.0,
        temperature: float = 0.2,
        ema_momentum: float = 0.99,
        ema_schedule: Literal["cosine", "constant"] = "cosine",
        queue: int = 4096,
        **masked: Any,
    ) -> None:
        super().__init__(build_encoder, **masked)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be positive")
        self.coupling = Coupling.HEADS
        self.contrast_weight, self.temperature = contrast_weight, temperature
        self.key_masks = PatchMasks(
            seed=self.masks.seed,
            grid=self.masks.grid,
            ratio=key_mask_ratio,
            field="key_mask_ratio",
        )
        self.momentum_encoder = build_encoder()
        form = FORMS["moby"]
        for encoder in (self.encoder, self.momentum_encoder):
            encoder.head = build_head(encoder.embed_dim, hidden_dim, projection_dim, form)
        self.predictor = build_head(projection_dim, hidden_dim, projection_dim, form)
        self.average = Average(
            self.encoder, self.momentum_encoder, start=ema_momentum, schedule=ema_schedule
        )
        self.make_queue(queue, projection_dim)

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> MACRL:
        """The objective of a config.

        Raises:
            ValueError: if an option has no effect beside the masks, or the queue is no multiple of
                the global batch.
        """
        own = config.objective
        assert isinstance(own, MACRLConfig)  # noqa: S101 - a type: each class is built from its own config
        require_whole_batches(own.queue, config.global_batch_size)
        return cls(
            build_encoder,
            key_mask_ratio=own.key_mask_ratio,
            projection_dim=config.model.projection_dim,
            hidden_dim=config.model.hidden_dim,
            contrast_weight=own.contrast_weight,
            temperature=own.temperature,
            ema_momentum=own.ema_momentum,
            ema_schedule=own.ema_schedule,
            queue=own.queue,
            **options_of(config, own),
        )

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Online: the loss of the pixels of each image [b], and the mean of its seen patches [b, E].
        Target: figures of each image for telemetry [b, 2], and the mean of the seen patches of the
        other view by the momentum encoder [b, E].

        Raises:
            ValueError: if there are not two views of the encoder's size, with their masks.
        """
        _, view2 = two_views(inputs)
        loss, latents, figures = self._passed(inputs)
        online = (loss, self._patch_tokens(latents).mean(dim=1))
        if not target:
            return Features(online)
        with torch.no_grad(), part(KEY_FORWARD):
            tokens = self.momentum_encoder.latents(view2, None, inputs.kept[1])
            return Features(online, (figures, self._patch_tokens(tokens).mean(dim=1)))

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """The mean loss of the pixels, and the heads of the whole batch against the queue."""
        (losses, pooled), (figures, target) = features.online, features.target
        with torch.no_grad(), part(KEY_FORWARD):
            keys = self.momentum_encoder.head(target)
        with part(QUERY_FORWARD):
            queries = self.predictor(self.encoder.head(pooled))
        with part(LOSS):
            found = queued_info_nce_loss(
                queries, keys, self.queue, temperature=self.temperature, accuracy=accuracy
            )
        return self._output(losses.mean(), found.loss, figures, queries, keys, found.shares)

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """As that of `MAE`, with the means and the whole logits written out."""
        of_pixels, latents, figures = self._plain(inputs)
        seen = self._patch_tokens(latents)
        q = self.predictor(self.encoder.head(seen.sum(dim=1) / seen.shape[1]))
        with torch.no_grad():
            tokens = self.momentum_encoder.plain_latents(inputs.views[1], None, inputs.kept[1])
            seen = self._patch_tokens(tokens)
            k = self.momentum_encoder.head(seen.sum(dim=1) / seen.shape[1])
        loss, shares = queued_reference(q, k, self.queue, self.temperature)
        return self._output(of_pixels, loss, figures, q, k, shares if accuracy else None)

    def view_flops(self, number: int, side: int, keep: float = 1.0) -> float:
        """FLOPs of a step: those of MAE for the first view, and a forward of the momentum encoder on
        the patches that it sees of the other one."""
        if number:
            return float(self.encoder.forward_flops(side, self.key_masks.kept / self._patches))
        return super().view_flops(number, side)

    def averages(self) -> Mapping[nn.Parameter, Tensor]:
        """Weights of encoder and projector -> those of the momentum encoder."""
        return self.average.averages()

    def ema_momentum(self, at: Progress) -> float | None:
        """That of the next step; None at the end of the last step."""
        return self.average.next_value(at)

    def schedules(self, at: Progress) -> Mapping[str, float]:
        """The momentum that made this step's keys."""
        return {"ema_momentum": self.average.value(at.step, at)}

    def _kept(self, views: tuple[Tensor, ...], at: Progress) -> tuple[Tensor, ...]:
        """The patches of each view that its encoder sees, also in evaluation mode."""
        (kept,) = super()._kept(views, at)
        return kept, self.key_masks(views[1], step=at.step, number=1)

    def _patch_tokens(self, latents: Tensor) -> Tensor:
        """Tokens without that of the class, if there is one."""
        return latents[:, self.decoder.class_tokens :]

    def _output(
        self,
        of_pixels: Tensor,
        of_keys: Tensor,
        figures: Tensor,
        queries: Tensor,
        keys: Tensor,
        shares: Tensor | None,
    ) -> Output:
        """The loss of both parts, and what telemetry sees; the keys are also kept for the queue."""
        self.push(keys)
        watch = {
            **watched(figures, queries.detach(), name="queries"),
            "keys": keys.detach()[None],
            "queue_fill": self.queue_fill,
            "reconstruction_loss": of_pixels.detach(),
            "contrast_loss": of_keys.detach(),
        }
        if shares is not None:
            watch["accuracy"] = shares
        return Output(of_pixels + self.contrast_weight * of_keys, watch)
