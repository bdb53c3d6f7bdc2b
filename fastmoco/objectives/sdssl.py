"""SDSSL (Jang et al. 2023): MoCo v3, BYOL or SimCLR, of which every block of the ViT learns.

The feature after each block, by the one final norm, passes a projector of its own, and with a
momentum encoder a predictor of its own. Three terms are added:

* output: the loss of the method, of the last block.
* intermediate: the same of all other blocks, against the targets of the last block, times a ratio
  that rises over the run.
* detached: that of all blocks once more, from projections without gradient, times their number: it
  trains predictors alone, which the ratio would leave behind. SimCLR has none.

Here V views, B images, n blocks, width D; block n - 1 is the last one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from fastmoco.config import Config
from fastmoco.distributed.gather import gather_keys, start_gathering
from fastmoco.models.encoder import Coupling, with_heads
from fastmoco.models.heads import FORMS, HeadForm, HeadStack, build_head
from fastmoco.objectives.interface import (
    Features,
    Inputs,
    Objective,
    Output,
    ParameterGroup,
    Progress,
)
from fastmoco.objectives.momentum import Momentum
from fastmoco.objectives.sdssl_terms import (
    Terms,
    info_nce_terms,
    info_nce_terms_reference,
    nt_xent_terms,
    nt_xent_terms_reference,
    regression_terms,
)
from fastmoco.objectives.view_pairs import by_view, plain_projection, two_views
from fastmoco.objectives.watched import feature_deviation
from fastmoco.optim.groups import decaying_matrices
from fastmoco.recipes.sdssl import SDSSLConfig
from fastmoco_pipelines.loading.step_parts import KEY_FORWARD, LOSS, QUERY_FORWARD, part


def loss_ratio(step: int, total_steps: int, end: float) -> float:
    """Weight of the intermediate blocks: half a cosine from 0 to `end` over the whole run."""
    done = min(step, total_steps) / total_steps
    return end - 0.5 * end * (1 + math.cos(math.pi * done))


class SDSSL(Objective):
    """What the three methods share: an encoder read after every block, and heads of every block.

    Args:
        encoder: a ViT of at least two blocks with a free `head`.
        projection_dim: width D of what the loss compares.
        hidden_dim: hidden width of the last projector.
        intermediate_hidden_dim: that of the other projectors.
        projector: form of all projectors.
        ratio: weight of the intermediate blocks at the end of the run.
        temperature: > 0, divides the cosines.

    Attributes:
        encoder: `encoder.head` is the projector of the last block.
        projectors: those of all other blocks.

    Raises:
        ValueError: if the encoder is no ViT of two blocks, or a number makes no sense.
    """

    view_count = 2

    def __init__(
        self,
        encoder: Any,
        *,
        projection_dim: int,
        hidden_dim: int,
        intermediate_hidden_dim: int,
        projector: HeadForm,
        ratio: float,
        temperature: float = 0.2,
    ) -> None:
        super().__init__()
        if not hasattr(encoder, "encode_taps") or len(encoder.blocks) < 2:
            raise ValueError(
                "objective.kind=sdssl: every block of the encoder learns, so it must be a ViT of at "
                "least 2 blocks; take model.architecture vit_small, or another objective"
            )
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be positive")
        self.ratio = ratio
        self.temperature = temperature
        self.blocks = len(encoder.blocks)
        self.encoder = encoder
        self.encoder.head = build_head(encoder.embed_dim, hidden_dim, projection_dim, projector)
        self.projectors = HeadStack(
            self.blocks - 1,
            encoder.embed_dim,
            intermediate_hidden_dim,
            projection_dim,
            projector,
        )
        self.coupling = with_heads(encoder)
        self.coupling_reason = encoder.coupling_reason

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> SDSSL:
        """The objective of a config."""
        own = config.objective
        assert isinstance(own, SDSSLConfig)  # noqa: S101 - a type: each class is built from its own config
        model = config.model
        shared: dict[str, Any] = {
            "projection_dim": model.projection_dim,
            "hidden_dim": model.hidden_dim,
            "intermediate_hidden_dim": own.intermediate_hidden_dim or max(1, model.hidden_dim // 2),
            "ratio": own.ratio,
        }
        if own.on == "simclr":
            return SDSimCLR(
                build_encoder,
                temperature=own.temperature,
                local_gradient=own.local_gradient,
                **shared,
            )
        shared |= {"ema_momentum": own.ema_momentum, "ema_schedule": own.ema_schedule}
        if own.on == "byol":
            return SDBYOL(build_encoder, **shared)
        return SDMoCoV3(build_encoder, temperature=own.temperature, **shared)

    def loss_ratio(self, at: Progress) -> float:
        """Weight of the intermediate blocks in a step."""
        return loss_ratio(at.step, at.total_steps, self.ratio)

    def schedules(self, at: Progress) -> Mapping[str, float]:
        """The weight of the intermediate blocks."""
        return {"loss_ratio": self.loss_ratio(at)}

    def parameter_group(self, name: str, parameter: nn.Parameter) -> ParameterGroup:
        """Biases and norms do not decay."""
        return decaying_matrices(name, parameter)

    def _project(self, taps: Tensor) -> Tensor:
        """[..., n, E] features -> [..., n, D] projections. Leading dimensions are those of
        `build_head`."""
        last = self.encoder.head(taps[..., -1, :].contiguous())
        others = self.projectors(taps[..., :-1, :].flatten(-2))
        return torch.cat([others.unflatten(-1, (self.blocks - 1, -1)), last[..., None, :]], -2)

    def _project_alone(self, taps: Tensor) -> Tensor:
        """Reference of `_project`: each head by itself; [R, n, E] -> [R, n, D]."""
        rows = [self.projectors.alone(i, taps[:, i]) for i in range(self.blocks - 1)]
        return torch.stack([*rows, self.encoder.head(taps[:, -1])], dim=1)


class _WithMomentum(SDSSL):
    """SDSSL with predictors and a momentum encoder, of which the projection after the last block is
    the target of all blocks.

    The average moves after the optimizer, with the new weights, by the momentum of the step that
    ends. It averages the trunk and the last projector; no other head has a target.

    Args:
        build_encoder: called twice; its encoders must have equal shapes, and a free `head`.
        ema_momentum: momentum of the average at step 0.
        ema_schedule: "cosine" rises to 1 at the end of the run, "constant" stays.

    Attributes:
        momentum_encoder: without gradient.
        predictors: of all blocks.
    """

    last_norm: bool
    """Whether a batch norm ends each head."""
    all_at_zero = False
    """As for `Terms.loss`."""

    def __init__(
        self,
        build_encoder: Callable[[], Any],
        *,
        projection_dim: int = 256,
        hidden_dim: int = 4096,
        intermediate_hidden_dim: int = 2048,
        ratio: float = 1.0,
        temperature: float = 0.2,
        ema_momentum: float = 0.996,
        ema_schedule: Literal["cosine", "constant"] = "cosine",
    ) -> None:
        encoder, momentum_encoder = build_encoder(), build_encoder()
        projector, predictor = heads_of(last_norm=self.last_norm)
        super().__init__(
            encoder,
            projection_dim=projection_dim,
            hidden_dim=hidden_dim,
            intermediate_hidden_dim=intermediate_hidden_dim,
            projector=projector,
            ratio=ratio,
            temperature=temperature,
        )
        self.momentum_encoder = momentum_encoder
        momentum_encoder.head = build_head(encoder.embed_dim, hidden_dim, projection_dim, projector)
        self.predictors = HeadStack(
            self.blocks, projection_dim, hidden_dim, projection_dim, predictor
        )
        self.momentum = Momentum(
            self.encoder, self.momentum_encoder, start=ema_momentum, schedule=ema_schedule
        )

    @abstractmethod
    def _terms(self, targets: Tensor, accuracy: bool) -> Callable[[Tensor, Tensor], Terms]:
        """Start to exchange targets [2, B, D], and return what makes the terms of predictions and
        detached predictions, [2, n, B, D] each."""

    @abstractmethod
    def _plain_terms(
        self, predictions: Tensor, detached: Tensor, targets: Tensor, accuracy: bool
    ) -> Terms:
        """Reference of `_terms`."""

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Both views through both encoders: [b, 2, n, E] of the encoder after every block, and
        [b, 2, E] of the momentum encoder.

        Raises:
            ValueError: if the views differ in shape, or are not two.
        """
        return self.momentum.features(inputs, target=target, taps=True)

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """Heads and loss of the whole batch."""
        # Targets leave before the predictions are computed.
        with torch.no_grad(), part(KEY_FORWARD):
            targets = self.momentum_encoder.head(by_view(features.target[0]))
            terms_of = self._terms(targets, accuracy)
        with part(QUERY_FORWARD):
            projections = self._project(by_view(features.online[0]))

            # Predictors see each view twice, with the projections' gradient and without.
            twice = torch.stack([projections, projections.detach()], dim=1)
            predicted = self.predictors(twice.flatten(0, 1).flatten(2))
            predicted = predicted.view(*twice.shape[:4], -1).transpose(2, 3)
        with part(LOSS):
            terms = terms_of(*predicted.unbind(1))
        return self._output(terms, predicted[:, 0], targets, at)

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same with nothing shared and nothing stacked: each encoder sees each view alone, each
        head is one of its own, and the loss is written out."""
        predictions: list[Tensor] = []
        detached: list[Tensor] = []
        for number, view in enumerate(two_views(inputs)):
            taps = self.encoder.plain_taps(view, *inputs.paths_of(number))
            rows = self._project_alone(taps).transpose(0, 1)
            for found, given in ((predictions, rows), (detached, rows.detach())):
                found.append(
                    torch.stack([self.predictors.alone(i, z) for i, z in enumerate(given)])
                )
        with torch.no_grad():
            targets = torch.stack(
                [plain_projection(self.momentum_encoder, view) for view in inputs.views]
            )
        p = torch.stack(predictions)
        terms = self._plain_terms(p, torch.stack(detached), targets, accuracy)
        return self._output(terms, p, targets, at)

    def _output(self, terms: Terms, predictions: Tensor, targets: Tensor, at: Progress) -> Output:
        loss = terms.loss(self.loss_ratio(at), self.blocks, all_at_zero=self.all_at_zero)
        rows = {"queries": predictions[:, -1].detach(), "keys": targets}
        others = {"intermediate_feature_std": feature_deviation(predictions[:, :-1])}
        return Output(loss, rows | others | terms.watch())

    def averages(self) -> Mapping[nn.Parameter, Tensor]:
        """Weights of the trunk and the last projector -> those of the momentum encoder."""
        return self.momentum.averages()

    def ema_momentum(self, at: Progress) -> float:
        """That of the step which ends, m(t): after the last step, too."""
        return self.momentum.value(at.step, at)

    def schedules(self, at: Progress) -> Mapping[str, float]:
        """The weight of the intermediate blocks, and the momentum of the move that ends this
        step."""
        return {**super().schedules(at), "ema_momentum": self.ema_momentum(at)}

    def choices(self, at: Progress) -> Hashable:
        """Whether both encoders share patch tokens."""
        return self.momentum.shares_tokens()


class SDMoCoV3(_WithMomentum):
    """SDSSL on MoCo v3: every block's queries against the keys of the last block."""

    last_norm = True

    def _terms(self, targets: Tensor, accuracy: bool) -> Callable[[Tensor, Tensor], Terms]:
        finish = start_gathering(torch.cat([*targets], dim=1))

        def terms_of(predictions: Tensor, detached: Tensor) -> Terms:
            # Queries of a view are compared with keys of the other one.
            keys = torch.stack(finish().chunk(2, dim=1)).flip(0)
            return info_nce_terms(
                predictions, detached, keys, temperature=self.temperature, accuracy=accuracy
            )

        return terms_of

    def _plain_terms(
        self, predictions: Tensor, detached: Tensor, targets: Tensor, accuracy: bool
    ) -> Terms:
        keys = torch.stack([gather_keys(rows) for rows in targets]).flip(0)
        return info_nce_terms_reference(
            predictions, detached, keys, temperature=self.temperature, accuracy=accuracy
        )


class SDBYOL(_WithMomentum):
    """SDSSL on BYOL: every block predicts the momentum encoder's projection of the other view. The
    heads have no last norm. There is no accuracy, and nothing is gathered."""

    last_norm = False
    all_at_zero = True

    def _terms(self, targets: Tensor, accuracy: bool) -> Callable[[Tensor, Tensor], Terms]:
        return lambda predictions, detached: regression_terms(
            predictions, detached, targets.flip(0)
        )

    def _plain_terms(
        self, predictions: Tensor, detached: Tensor, targets: Tensor, accuracy: bool
    ) -> Terms:
        expected = targets.flip(0)[:, None].expand_as(predictions)
        losses, of_detached = (
            (2 - 2 * cosine_similarity(p, expected, dim=-1)).mean(-1).sum(0)
            for p in (predictions, detached)
        )
        return Terms(losses[-1], losses[:-1].mean(), of_detached.mean())


class SDSimCLR(SDSSL):
    """SDSSL on SimCLR: no momentum encoder and no predictors. Batch norms see both views of all
    ranks as one batch.

    Args:
        build_encoder: called once; its encoder must have a free `head`.
        projection_dim: width D of what the loss compares.
        hidden_dim: hidden width of the last projector.
        intermediate_hidden_dim: that of the other projectors.
        ratio: weight of the intermediate blocks at the end of the run.
        temperature: > 0, divides the cosines.
        local_gradient: whether the last block's loss has the gradient of the official code on
            several ranks, which leaves out what other ranks' losses say of a rank's rows.
    """

    def __init__(
        self,
        build_encoder: Callable[[], Any],
        *,
        projection_dim: int = 256,
        hidden_dim: int = 4096,
        intermediate_hidden_dim: int = 2048,
        ratio: float = 0.8,
        temperature: float = 0.2,
        local_gradient: bool = False,
    ) -> None:
        super().__init__(
            build_encoder(),
            projection_dim=projection_dim,
            hidden_dim=hidden_dim,
            intermediate_hidden_dim=intermediate_hidden_dim,
            projector=FORMS["moco_v3_projector"],
            ratio=ratio,
            temperature=temperature,
        )
        self.local_gradient = local_gradient

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Both views through the encoder as one batch: [b, 2, n, E] after every block.

        Raises:
            ValueError: if the views differ in shape, or are not two.
        """
        views = two_views(inputs)
        with part(QUERY_FORWARD):
            taps = self.encoder.taps(torch.cat(views), *inputs.paths_of(0, 1))
        return Features((taps.view(2, len(views[0]), *taps.shape[1:]).transpose(0, 1),))

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """Projectors and loss of the whole batch; projections of the last block are gathered."""
        with part(QUERY_FORWARD):
            taps = by_view(features.online[0])
            rows = self._project(taps.flatten(0, 1))
            projections = rows.view(*taps.shape[:3], -1).permute(2, 0, 1, 3)
        with part(LOSS):
            terms = nt_xent_terms(
                projections,
                temperature=self.temperature,
                local_gradient=self.local_gradient,
                accuracy=accuracy,
            )
        return self._output(terms, projections, at)

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same with nothing stacked: each view passes the trunk alone where that makes no
        difference, and logits are whole matrices."""
        views = two_views(inputs)
        if self.coupling is Coupling.TRUNK:
            taps = self.encoder.plain_taps(torch.cat(views), *inputs.paths_of(0, 1))
        else:
            taps = torch.cat(
                [self.encoder.plain_taps(view, *inputs.paths_of(i)) for i, view in enumerate(views)]
            )
        rows = self._project_alone(taps)
        projections = rows.view(2, len(views[0]), *rows.shape[1:]).permute(2, 0, 1, 3)
        terms = nt_xent_terms_reference(
            projections,
            temperature=self.temperature,
            local_gradient=self.local_gradient,
            accuracy=accuracy,
        )
        return self._output(terms, projections, at)

    def _output(self, terms: Terms, projections: Tensor, at: Progress) -> Output:
        shown = projections[-1].detach()
        loss = terms.loss(self.loss_ratio(at), self.blocks)
        rows = {"queries": shown, "keys": shown}
        others = {"intermediate_feature_std": feature_deviation(projections[:-1])}
        return Output(loss, rows | others | terms.watch())


def heads_of(*, last_norm: bool) -> tuple[HeadForm, HeadForm]:
    """Projector and predictor of MoCo v3 on a ViT, with or without their last norm."""
    projector, predictor = FORMS["moco_v3_projector"], FORMS["moco_v3_predictor"]
    return replace(projector, last_norm=last_norm), replace(predictor, last_norm=last_norm)
