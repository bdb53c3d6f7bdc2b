"""MoCo v3 (Chen, Xie, He 2021): which encoder sees which view, which head, which loss, and when the
average moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastmoco.config import Config, MoCoV3Config
from fastmoco.models.encoder import family_of
from fastmoco.models.heads import HeadForm, build_head, moco_v3_forms
from fastmoco.objectives.interface import Features, Inputs, Objective, Output, Progress
from fastmoco.objectives.key_comparison import info_nce_reference, start_comparing
from fastmoco.objectives.momentum import Momentum
from fastmoco.objectives.view_pairs import by_view, plain_projection, two_views
from fastmoco_pipelines.loading.step_parts import KEY_FORWARD, LOSS, QUERY_FORWARD, part


class MoCoV3(Objective):
    """An encoder with projector and predictor, its momentum encoder, and the symmetric InfoNCE
    between them.

    One step: `update_momentum_encoder(m)`, `forward`, backward, optimizer. The update uses the
    encoder as the last optimizer step left it; whether it runs right after that step, before the
    query side's forward or after it changes no number, because nothing in between moves a
    parameter. A trainer takes it at the end of the step before (`ema_momentum`).

    Fast path, equal to `reference` under a test: both views pass a trunk as one batch where the
    trunk couples no images, heads see both views at once but keep their batch statistics apart,
    and patch tokens are computed once for both encoders while their stems are frozen and equal.

    Args:
        build_encoder: called twice; its encoders must have equal shapes, and a free `head`.
        projection_dim: width D of queries and keys.
        hidden_dim: hidden width of projector and predictor.
        projector: form of the projector; None: that of MoCo v3 for the kind of the encoder.
        predictor: form of the predictor; None: likewise.
        temperature: > 0, divides the cosines.
        ema_momentum: momentum of the average at step 0.
        ema_schedule: "cosine" rises to 1 at the end of the run, "constant" stays.
        with_predictor: whether queries pass a predictor.
        head_norm: whether the heads have batch norms.
        ring: see the attribute.

    Attributes:
        encoder: the query side; `encoder.head` is its projector.
        momentum_encoder: its average, without gradient.
        predictor: query side only; the identity without a predictor.
        ring: whether keys of the other ranks come a block at a time; else they are gathered.
            May change between steps, on all ranks at once; results differ by rounding only.

    Raises:
        ValueError: if the temperature is not positive.
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
        temperature: float = 0.2,
        ema_momentum: float = 0.99,
        ema_schedule: Literal["cosine", "constant"] = "cosine",
        with_predictor: bool = True,
        head_norm: bool = True,
        ring: bool = False,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be positive")
        self.temperature = temperature
        self.ring = ring
        self.encoder, self.momentum_encoder = build_encoder(), build_encoder()
        usual = moco_v3_forms(family_of(self.encoder))
        for encoder in (self.encoder, self.momentum_encoder):
            form = replace(projector or usual[0], norm=head_norm)
            encoder.head = build_head(encoder.embed_dim, hidden_dim, projection_dim, form)
        self.predictor: nn.Module = nn.Identity()
        if with_predictor:
            form = replace(predictor or usual[1], norm=head_norm)
            self.predictor = build_head(projection_dim, hidden_dim, projection_dim, form)
        self.momentum = Momentum(
            self.encoder, self.momentum_encoder, start=ema_momentum, schedule=ema_schedule
        )
        self.coupling = self.momentum.coupling
        self.coupling_reason = self.encoder.coupling_reason

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> MoCoV3:
        """The objective of a config."""
        own = config.objective
        assert isinstance(own, MoCoV3Config)  # noqa: S101 - a type: each class is built from its own config
        return cls(
            build_encoder,
            projection_dim=config.model.projection_dim,
            hidden_dim=config.model.hidden_dim,
            temperature=own.temperature,
            ema_momentum=own.ema_momentum,
            ema_schedule=own.ema_schedule,
            with_predictor=own.predictor,
            head_norm=own.head_norm,
            ring=own.keys == "ring",
        )

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Both views through both encoders: [b, 2, E] of the encoder, and of the momentum encoder.

        Raises:
            ValueError: if the views differ in shape, or are not two.
        """
        return self.momentum.features(inputs, target=target)

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """Heads and loss of the whole batch; keys of all ranks are gathered, or come in a ring.

        Args:
            features: class features of both views, [B, 2, E] of either encoder.
            at: the step.
            accuracy: whether to count, in the pass of the loss, how the positives rank among all
                keys.
        """
        # Keys leave before the queries are computed.
        with torch.no_grad(), part(KEY_FORWARD):
            keys = self.momentum_encoder.head(by_view(features.target[0]))
            compared = start_comparing(
                keys, temperature=self.temperature, ring=self.ring, accuracy=accuracy
            )
        with part(QUERY_FORWARD):
            queries = self.predictor(self.encoder.head(by_view(features.online[0])))
        with part(LOSS):
            found = compared(queries)
        watch = {"queries": queries.detach(), "keys": keys}
        if (shares := found.shares) is not None:
            watch["accuracy"] = shares
        return Output(found.loss, watch)

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same with nothing saved and nothing fused.

        Each encoder embeds and encodes each view alone, every block sees every token, and the loss
        is written out: `2 * temperature * CE(u(q) u(keys)^T / temperature, rank * B + i)`, summed
        over both directions.
        """

        views = two_views(inputs)
        queries = torch.stack(
            [
                self.predictor(plain_projection(self.encoder, view, *inputs.paths_of(number)))
                for number, view in enumerate(views)
            ]
        )
        with torch.no_grad():
            keys = torch.stack([plain_projection(self.momentum_encoder, view) for view in views])
        loss, shares = info_nce_reference(queries, keys, temperature=self.temperature)
        watch = {"queries": queries.detach(), "keys": keys}
        if accuracy:
            watch["accuracy"] = shares
        return Output(loss, watch)

    def averages(self) -> Mapping[nn.Parameter, Tensor]:
        """Weights of encoder and projector -> those of the momentum encoder."""
        return self.momentum.averages()

    def ema_momentum(self, at: Progress) -> float | None:
        """That of the next step, m(t + 1): the paper averages before a step's forward. None at the
        end of the last step."""
        return self.momentum.next_value(at)

    def schedules(self, at: Progress) -> Mapping[str, float]:
        """The momentum that made this step's keys."""
        return {"ema_momentum": self.momentum.value(at.step, at)}

    def uninformed_loss(self, batch: int) -> float:
        """That of equal logits: `2 * temperature * ln(batch)` in each direction."""
        return 4 * self.temperature * math.log(batch)

    def choices(self, at: Progress) -> Hashable:
        """Whether both encoders share patch tokens."""
        return self.momentum.shares_tokens()
