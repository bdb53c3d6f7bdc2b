"""SimSiam (Chen, He 2021): predict the projection of the other view, with nothing but a stopped
gradient against collapse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from fastmoco.config import Config
from fastmoco.models.encoder import Coupling, Family, family_of, with_heads
from fastmoco.models.heads import FORMS, HeadForm, build_head
from fastmoco.objectives.interface import (
    Features,
    Inputs,
    Objective,
    Output,
    ParameterGroup,
    Progress,
)
from fastmoco.objectives.view_pairs import by_view, encoded_views, plain_projection, two_views
from fastmoco.objectives.watched import feature_deviation
from fastmoco.optim.groups import WHOLE
from fastmoco.recipes.simsiam import SimSiamConfig
from fastmoco_pipelines.loading.step_parts import LOSS, QUERY_FORWARD, part

FLOOR = 1e-8
"""Least length that a row is divided by."""


class SimSiam(Objective):
    """An encoder with projector and predictor, without momentum encoder, negatives and gathers.

    Each view is seen alone by batch norms, over all ranks. A projection is the target of the other
    view's prediction as a constant, and has its gradient through its own predictor alone.

    Args:
        build_encoder: called once; its encoder must have a free `head`.
        projection_dim: width D of projections and predictions.
        hidden_dim: hidden width of the projector.
        predictor_hidden_dim: hidden width of the predictor; 0: a quarter of D, as in the paper.
        projector: form of the projector; None: SimSiam's own on a ResNet, that of MoCo v3 on a ViT.
            A bias of its last linear layer stays at its random start.
        fix_predictor_lr: whether the predictor keeps the peak learning rate in every step.
        predictor_lr_scale: factor on the predictor's learning rate.

    Attributes:
        encoder: `encoder.head` is its projector.
        predictor: a bottleneck with a bias in its last layer and no norm after it.
    """

    view_count = 2

    def __init__(
        self,
        build_encoder: Callable[[], Any],
        *,
        projection_dim: int = 2048,
        hidden_dim: int = 2048,
        predictor_hidden_dim: int = 0,
        projector: HeadForm | None = None,
        fix_predictor_lr: bool = True,
        predictor_lr_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self._predictor_group = ParameterGroup(
            lr_scale=predictor_lr_scale, constant_lr=fix_predictor_lr
        )
        self.encoder = build_encoder()
        form = projector or projector_form(family_of(self.encoder))
        self.encoder.head = build_head(self.encoder.embed_dim, hidden_dim, projection_dim, form)
        _freeze_last_bias(self.encoder.head)
        bottleneck = predictor_hidden_dim or max(1, projection_dim // 4)
        self.predictor = build_head(
            projection_dim, bottleneck, projection_dim, FORMS["simsiam_predictor"]
        )
        self.coupling = with_heads(self.encoder)
        self.coupling_reason = self.encoder.coupling_reason

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> SimSiam:
        """The objective of a config."""
        own = config.objective
        assert isinstance(own, SimSiamConfig)  # noqa: S101 - a type: each class is built from its own config
        return cls(
            build_encoder,
            projection_dim=config.model.projection_dim,
            hidden_dim=config.model.hidden_dim,
            predictor_hidden_dim=own.predictor_hidden_dim,
            fix_predictor_lr=own.fix_predictor_lr,
            predictor_lr_scale=own.predictor_lr_scale,
        )

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Both views through the encoder: [b, 2, E].

        They pass as one batch, except through a trunk whose batch norms must see each view alone.

        Raises:
            ValueError: if the views differ in shape, or are not two.
        """
        with part(QUERY_FORWARD):
            together = self.coupling is not Coupling.TRUNK
            rows = encoded_views(self.encoder, inputs, together=together)
        return Features((rows.transpose(0, 1),))

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """Heads and loss of the whole batch. There is no accuracy: nothing is compared with other
        images."""
        with part(QUERY_FORWARD):
            projections = self.encoder.head(by_view(features.online[0]))
            predictions = self.predictor(projections)
        with part(LOSS):
            loss = negative_cosine(predictions, projections.detach().flip(0))
        return _output(loss, predictions, projections)

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same with nothing shared: the encoder sees each view alone, and both directions are
        written out."""
        z1, z2 = (
            plain_projection(self.encoder, view, *inputs.paths_of(number))
            for number, view in enumerate(two_views(inputs))
        )
        p1, p2 = self.predictor(z1), self.predictor(z2)

        def cosine(p: Tensor, z: Tensor) -> Tensor:
            rows = normalize(p, dim=1, eps=FLOOR) * normalize(z.detach(), dim=1, eps=FLOOR)
            return rows.sum(1).mean()

        loss = -0.5 * (cosine(p1, z2) + cosine(p2, z1))
        return _output(loss, torch.stack([p1, p2]), torch.stack([z1, z2]))

    def parameter_group(self, name: str, parameter: nn.Parameter) -> ParameterGroup:
        """The predictor has a learning rate of its own, if the config says so."""
        return self._predictor_group if name.startswith("predictor.") else WHOLE


def projector_form(family: Family) -> HeadForm:
    """The projector: SimSiam's own on a ResNet, that of MoCo v3 on a ViT, which is the same without
    the last bias."""
    return FORMS["simsiam_projector" if family == "resnet" else "moco_v3_projector"]


def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """Minus the cosine of predictions and targets, mean over views and images.

    Args:
        predictions: [V, B, D], any floating dtype.
        targets: [V, B, D] constants, of the other view.

    Returns:
        Scalar in [-1, 1], at least float32.
    """
    wide = torch.promote_types(predictions.dtype, torch.float32)
    cosines = cosine_similarity(predictions.to(wide), targets.to(wide), dim=-1, eps=FLOOR)
    loss: Tensor = -cosines.mean()
    return loss


def _freeze_last_bias(head: nn.Sequential) -> None:
    """A bias before a batch norm without affine weights has no effect: the official code keeps it
    at its start."""
    last = [layer for layer in head if isinstance(layer, nn.Linear)][-1]
    if last.bias is not None:
        last.bias.requires_grad_(False)


def _output(loss: Tensor, predictions: Tensor, projections: Tensor) -> Output:
    """A collapse has the loss -1, as success has it nearly, and the deviation 0."""
    watch: Mapping[str, Tensor] = {
        "queries": predictions.detach(),
        "keys": projections.detach(),
        "projection_std": feature_deviation(projections),
    }
    return Output(loss, watch)
