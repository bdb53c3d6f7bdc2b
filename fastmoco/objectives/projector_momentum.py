"""MoCo v3 with an average of the projector alone: keys come from the features of the one trunk.

Pham et al. 2022 (arXiv 2208.05744) report that the effect of a momentum encoder is in its last
layers. There is no official code: this composition is fastmoco's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.models.encoder import Coupling, family_of, with_heads
from fastmoco.models.heads import HeadForm, build_head, moco_v3_forms
from fastmoco.objectives.interface import Features, Inputs, Objective, Output, Progress
from fastmoco.objectives.key_comparison import info_nce_reference, start_comparing
from fastmoco.objectives.momentum import Average
from fastmoco.objectives.view_pairs import by_view, encoded_views, two_views
from fastmoco.recipes.projector_momentum import ProjectorMomentumConfig
from fastmoco_pipelines.loading.step_parts import KEY_FORWARD, LOSS, QUERY_FORWARD, part


class ProjectorMomentum(Objective):
    """An encoder with projector and predictor, an average of the projector, and the symmetric
    InfoNCE between queries and keys of all ranks.

    Each view passes the trunk once. Queries are predictions of the projected features. Keys are the
    same features, as constants, through the average of the projector, which moves before a step's
    forward, as in MoCo v3. It has batch norms with statistics and running averages of its own.

    Args:
        build_encoder: called once; its encoder must have a free `head`.
        projection_dim: width D of queries and keys.
        hidden_dim: hidden width of projector and predictor.
        projector: form of the projector; None: that of MoCo v3 for the kind of the encoder.
        predictor: form of the predictor; None: likewise.
        temperature: > 0, divides the cosines.
        ema_momentum: momentum of the average at step 0.
        ema_schedule: "cosine" rises to 1 at the end of the run, "constant" stays.
        ring: whether keys of the other ranks come a block at a time; else they are gathered.

    Attributes:
        encoder: the trunk; `encoder.head` is the projector.
        predictor: of the queries.
        momentum_projector: the average of the projector, without gradient.

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
        ring: bool = False,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be positive")
        self.temperature = temperature
        self.ring = ring
        self.encoder = build_encoder()
        usual = moco_v3_forms(family_of(self.encoder))
        widths = (self.encoder.embed_dim, hidden_dim, projection_dim)
        self.encoder.head = build_head(*widths, projector or usual[0])
        self.momentum_projector = build_head(*widths, projector or usual[0])
        self.predictor = build_head(
            projection_dim, hidden_dim, projection_dim, predictor or usual[1]
        )
        self.momentum = Average(
            self.encoder.head, self.momentum_projector, start=ema_momentum, schedule=ema_schedule
        )
        self.coupling = with_heads(self.encoder)
        self.coupling_reason = self.encoder.coupling_reason

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> ProjectorMomentum:
        """The objective of a config."""
        own = config.objective
        assert isinstance(own, ProjectorMomentumConfig)  # noqa: S101 - a type: each class is built from its own config
        return cls(
            build_encoder,
            projection_dim=config.model.projection_dim,
            hidden_dim=config.model.hidden_dim,
            temperature=own.temperature,
            ema_momentum=own.ema_momentum,
            ema_schedule=own.ema_schedule,
            ring=own.keys == "ring",
        )

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Both views through the encoder: [b, 2, E], for queries and keys.

        They pass as one batch, except through a trunk whose batch norms must see each view alone.

        Raises:
            ValueError: if the views differ in shape, or are not two.
        """
        with part(QUERY_FORWARD):
            together = self.coupling is not Coupling.TRUNK
            rows = encoded_views(self.encoder, inputs, together=together)
        return Features((rows.transpose(0, 1),))

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """Heads and loss of the whole batch; keys of all ranks are gathered, or come in a ring.

        Args:
            features: of both views, [B, 2, E].
            at: the step.
            accuracy: whether to count, in the pass of the loss, how the positives rank among all
                keys.
        """
        rows = by_view(features.online[0])
        # Keys leave before the queries are computed.
        with torch.no_grad(), part(KEY_FORWARD):
            keys = self.momentum_projector(rows.detach())
            compared = start_comparing(
                keys, temperature=self.temperature, ring=self.ring, accuracy=accuracy
            )
        with part(QUERY_FORWARD):
            queries = self.predictor(self.encoder.head(rows))
        with part(LOSS):
            found = compared(queries)
        watch = {"queries": queries.detach(), "keys": keys}
        if (shares := found.shares) is not None:
            watch["accuracy"] = shares
        return Output(found.loss, watch)

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same with nothing shared but the features of a view: each passes trunk and heads
        alone, and the loss is written out."""
        queries, keys = [], []
        for number, view in enumerate(two_views(inputs)):
            feature = self.encoder.plain(view, *inputs.paths_of(number))
            queries.append(self.predictor(self.encoder.head(feature)))
            with torch.no_grad():
                keys.append(self.momentum_projector(feature.detach()))
        loss, shares = info_nce_reference(
            torch.stack(queries), torch.stack(keys), temperature=self.temperature
        )
        watch = {"queries": torch.stack(queries).detach(), "keys": torch.stack(keys)}
        if accuracy:
            watch["accuracy"] = shares
        return Output(loss, watch)

    def averages(self) -> Mapping[nn.Parameter, Tensor]:
        """Weights of the projector -> those of its average."""
        return self.momentum.averages()

    def ema_momentum(self, at: Progress) -> float | None:
        """That of the next step, m(t + 1); None at the end of the last step."""
        return self.momentum.next_value(at)

    def schedules(self, at: Progress) -> Mapping[str, float]:
        """The momentum that made this step's keys."""
        return {"ema_momentum": self.momentum.value(at.step, at)}

    def uninformed_loss(self, batch: int) -> float:
        """That of equal logits: `2 * temperature * ln(batch)` in each direction."""
        return 4 * self.temperature * math.log(batch)
