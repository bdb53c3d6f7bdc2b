"""BYOL (Grill et al. 2020): predict the momentum encoder's projection of the other view."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.models.encoder import Family, family_of
from fastmoco.models.heads import FORMS, HeadForm, build_head, moco_v3_forms
from fastmoco.objectives.interface import Features, Inputs, Objective, Output, Progress
from fastmoco.objectives.momentum import Momentum
from fastmoco.objectives.view_pairs import by_view, plain_projection, two_views
from fastmoco.recipes.byol import BYOLConfig
from fastmoco_pipelines.loading.step_parts import KEY_FORWARD, LOSS, QUERY_FORWARD, part

FLOOR = 1e-12
"""Least square of a length that a row is divided by."""


class BYOL(Objective):
    """An encoder with projector and predictor, and its momentum encoder, without negatives and
    without gathers.

    Wired as MoCo v3: both encoders see both views, heads take the batch statistics of each view
    alone, over all ranks. The average moves after the optimizer, with the new weights, by the
    momentum of the step that ends.

    Args:
        build_encoder: called twice; its encoders must have equal shapes, and a free `head`.
        projection_dim: width D of projections and predictions.
        hidden_dim: hidden width of projector and predictor.
        projector: form of the projector; None: BYOL's own on a ResNet, that of MoCo v3 on a ViT.
        predictor: form of the predictor; None: likewise.
        ema_momentum: momentum of the average at step 0.
        ema_schedule: "cosine" rises to 1 at the end of the run, "constant" stays.

    Attributes:
        encoder: the online side; `encoder.head` is its projector.
        momentum_encoder: its average, without gradient.
        predictor: online side only.
    """

    view_count = 2

    def __init__(
        self,
        build_encoder: Callable[[], Any],
        *,
        projection_dim: int = 256,
        hidden_dim: int = 4096,
        projector: HeadForm | None = None,
        predictor: HeadForm | None = None,
        ema_momentum: float = 0.99,
        ema_schedule: Literal["cosine", "constant"] = "cosine",
    ) -> None:
        super().__init__()
        self.encoder, self.momentum_encoder = build_encoder(), build_encoder()
        usual = forms(family_of(self.encoder))
        for encoder in (self.encoder, self.momentum_encoder):
            encoder.head = build_head(
                encoder.embed_dim, hidden_dim, projection_dim, projector or usual[0]
            )
        self.predictor = build_head(
            projection_dim, hidden_dim, projection_dim, predictor or usual[1]
        )
        self.momentum = Momentum(
            self.encoder, self.momentum_encoder, start=ema_momentum, schedule=ema_schedule
        )
        self.coupling = self.momentum.coupling
        self.coupling_reason = self.encoder.coupling_reason

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> BYOL:
        """The objective of a config."""
        own = config.objective
        assert isinstance(own, BYOLConfig)  # noqa: S101 - a type: each class is built from its own config
        projector, predictor = forms(config.model.family, last_norm=own.last_norm)
        return cls(
            build_encoder,
            projection_dim=config.model.projection_dim,
            hidden_dim=config.model.hidden_dim,
            projector=projector,
            predictor=predictor,
            ema_momentum=own.ema_momentum,
            ema_schedule=own.ema_schedule,
        )

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Both views through both encoders: [b, 2, E] of the encoder, and of the momentum encoder.

        Raises:
            ValueError: if the views differ in shape, or are not two.
        """
        return self.momentum.features(inputs, target=target)

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """Heads and loss of the whole batch. There is no accuracy: nothing is compared with other
        images."""
        with torch.no_grad(), part(KEY_FORWARD):
            targets = self.momentum_encoder.head(by_view(features.target[0]))
        with part(QUERY_FORWARD):
            predictions = self.predictor(self.encoder.head(by_view(features.online[0])))
        with part(LOSS):
            loss = regression_loss(predictions, targets.flip(0))
        return Output(loss, {"queries": predictions.detach(), "keys": targets})

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same with nothing shared: each encoder sees each view alone, and the loss is 2 - 2
        cos of both directions."""
        views = two_views(inputs)
        predictions = [
            self.predictor(plain_projection(self.encoder, view, *inputs.paths_of(number)))
            for number, view in enumerate(views)
        ]
        with torch.no_grad():
            targets = [plain_projection(self.momentum_encoder, view) for view in views]
        directions = zip(predictions, reversed(targets), strict=True)
        loss = torch.stack(
            [(2 - 2 * torch.cosine_similarity(p, z, dim=1)).mean() for p, z in directions]
        ).sum()
        return Output(
            loss, {"queries": torch.stack(predictions).detach(), "keys": torch.stack(targets)}
        )

    def averages(self) -> Mapping[nn.Parameter, Tensor]:
        """Weights of encoder and projector -> those of the momentum encoder; a predictor needs
        none."""
        return self.momentum.averages()

    def ema_momentum(self, at: Progress) -> float:
        """That of the step which ends, m(t): after the last step, too."""
        return self.momentum.value(at.step, at)

    def schedules(self, at: Progress) -> Mapping[str, float]:
        """The momentum of the move that ends this step."""
        return {"ema_momentum": self.ema_momentum(at)}

    def uninformed_loss(self, batch: int) -> float:
        """That of predictions at right angles to their targets: 2 in each direction. 0 is no
        success either: then all images may have one feature (`feature_std`)."""
        return 4.0

    def choices(self, at: Progress) -> Hashable:
        """Whether both encoders share patch tokens."""
        return self.momentum.shares_tokens()


def forms(family: Family, *, last_norm: bool = True) -> tuple[HeadForm, HeadForm]:
    """Projector and predictor: BYOL's own on a ResNet, which have no last norm, and those of
    MoCo v3 on a ViT, with or without theirs."""
    if family == "resnet":
        return FORMS["byol"], FORMS["byol"]
    projector, predictor = moco_v3_forms(family)
    return replace(projector, last_norm=last_norm), replace(predictor, last_norm=last_norm)


def regression_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Sum over directions of the mean over the batch of |n(p) - n(z)|^2.

    Here n(v) = v / sqrt(max(|v|^2, 1e-12)).
    The difference is taken before it is squared: 2 - 2 cos loses all digits where a prediction is
    almost on its target.

    Args:
        predictions: [V, B, D], any floating dtype.
        targets: [V, B, D], of the other view.

    Returns:
        Scalar, at least float32.
    """
    wide = torch.promote_types(predictions.dtype, torch.float32)
    difference = _directions(predictions.to(wide)) - _directions(targets.to(wide))
    loss: Tensor = difference.square().sum(dim=-1).mean(dim=-1).sum()
    return loss


def _directions(rows: Tensor) -> Tensor:
    """Rows over their lengths; the floor is on the square."""
    return rows * rows.square().sum(dim=-1, keepdim=True).clamp(min=FLOOR).rsqrt()
