"""MoBY (Xie, Lin, Yao, Zhang, Dai, Cao, Hu 2021): tell the key of an image's other view from a queue
of keys of earlier batches, in both directions, with BYOL's predictor and an asymmetric drop path."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.models.heads import FORMS, build_head
from fastmoco.objectives.interface import (
    Features,
    Inputs,
    Output,
    ParameterGroup,
    Progress,
)
from fastmoco.objectives.key_queue import KeepsKeys, queued_reference, require_whole_batches
from fastmoco.objectives.momentum import Momentum
from fastmoco.objectives.view_pairs import by_view, plain_projection, two_views
from fastmoco.optim.groups import decaying_matrices
from fastmoco.recipes.moby import MoBYConfig
from fastmoco_kernels import queued_info_nce_loss
from fastmoco_pipelines.loading.step_parts import KEY_FORWARD, LOSS, QUERY_FORWARD, part


class MoBY(KeepsKeys):
    """An encoder with projector and predictor, its momentum encoder with a projector, and a queue
    for either view.

    With queries q of the encoder, keys k of the momentum encoder, and both views,

        loss = CE([q1 k2, q1 Q2] / temperature, 0) + CE([q2 k1, q2 Q1] / temperature, 0)

    Q1 and Q2 have the keys of views 1 and 2 of the last batches, of all ranks in their order, and
    are equal on all ranks. Keys enter at the end of a step, so other images of a batch are no
    negatives. Heads take batch statistics of each view alone, over all ranks. Stochastic depth is
    that of the encoder alone; the momentum encoder has none, and both are in training mode.

    The average moves as in MoCo v3: at the end of a step with the momentum of the next one, which
    is the method's order.

    Args:
        build_encoder: called twice; its encoders must have equal shapes, and a free `head`.
        projection_dim: width D of queries and keys.
        hidden_dim: hidden width of projector and predictor.
        temperature: > 0, divides the cosines.
        ema_momentum: momentum of the average at step 0.
        ema_schedule: "cosine" rises to 1 at the end of the run, "constant" stays.
        queue: length K of either queue, a multiple of the global batch.

    Attributes:
        encoder: the online side; `encoder.head` is its projector.
        momentum_encoder: its average, without gradient.
        predictor: online side only.
        queue: [2, K, D] keys of views 1 and 2 at unit length, float32 or wider; random directions
            at first.
        queue_ptr: [1] int64, the row that is written next.
        queue_keys: [1] int64, how many rows are keys; the others are random still.

    Raises:
        ValueError: if a number makes no sense.
    """

    view_count = 2

    def __init__(
        self,
        build_encoder: Callable[[], Any],
        *,
        projection_dim: int = 256,
        hidden_dim: int = 4096,
        temperature: float = 0.2,
        ema_momentum: float = 0.99,
        ema_schedule: Literal["cosine", "constant"] = "cosine",
        queue: int = 4096,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be positive")
        self.temperature = temperature
        self.encoder, self.momentum_encoder = build_encoder(), build_encoder()
        form = FORMS["moby"]
        for encoder in (self.encoder, self.momentum_encoder):
            encoder.head = build_head(encoder.embed_dim, hidden_dim, projection_dim, form)
        self.predictor = build_head(projection_dim, hidden_dim, projection_dim, form)
        self.momentum = Momentum(
            self.encoder, self.momentum_encoder, start=ema_momentum, schedule=ema_schedule
        )
        self.coupling = self.momentum.coupling
        self.coupling_reason = self.encoder.coupling_reason
        self.make_queue(2, queue, projection_dim)

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> MoBY:
        """The objective of a config.

        Raises:
            ValueError: if the queues are no multiple of the global batch.
        """
        own = config.objective
        assert isinstance(own, MoBYConfig)  # noqa: S101 - a type: each class is built from its own config
        require_whole_batches(own.queue, config.global_batch_size)
        return cls(
            build_encoder,
            projection_dim=config.model.projection_dim,
            hidden_dim=config.model.hidden_dim,
            temperature=own.temperature,
            ema_momentum=own.ema_momentum,
            ema_schedule=own.ema_schedule,
            queue=own.queue,
        )

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Both views through both encoders: [b, 2, E] of the encoder, and of the momentum encoder.

        Raises:
            ValueError: if the views differ in shape, or are not two.
        """
        return self.momentum.features(inputs, target=target)

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """Heads and loss of the whole batch; nothing is gathered before the end of the step."""
        with torch.no_grad(), part(KEY_FORWARD):
            keys = self.momentum_encoder.head(by_view(features.target[0]))
        with part(QUERY_FORWARD):
            queries = self.predictor(self.encoder.head(by_view(features.online[0])))
        with part(LOSS):
            found = [
                queued_info_nce_loss(
                    queries[own],
                    keys[other],
                    self.queue[other],
                    temperature=self.temperature,
                    accuracy=accuracy,
                )
                for own, other in ((0, 1), (1, 0))
            ]
        watch = self._watch(queries, keys)
        shares = [each for result in found if (each := result.shares) is not None]
        if shares:
            watch["accuracy"] = torch.stack(shares).mean(0)
        return Output(found[0].loss + found[1].loss, watch)

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same with nothing shared: each encoder sees each view alone, and the loss is the sum
        of two cross-entropies of whole logits."""
        views = two_views(inputs)
        q = [
            self.predictor(plain_projection(self.encoder, view, *inputs.paths_of(number)))
            for number, view in enumerate(views)
        ]
        with torch.no_grad():
            k = [plain_projection(self.momentum_encoder, view) for view in views]

        found = [
            queued_reference(q[own], k[other], self.queue[other], self.temperature)
            for own, other in ((0, 1), (1, 0))
        ]
        (loss1, shares1), (loss2, shares2) = found
        watch = self._watch(torch.stack(q), torch.stack(k))
        if accuracy:
            watch["accuracy"] = (shares1 + shares2) / 2
        return Output(loss1 + loss2, watch)

    def averages(self) -> Mapping[nn.Parameter, Tensor]:
        """Weights of encoder and projector -> those of the momentum encoder."""
        return self.momentum.averages()

    def ema_momentum(self, at: Progress) -> float | None:
        """That of the next step, m(t + 1): the method averages before the keys' forward, with the
        weights from before the step. None at the end of the last step."""
        return self.momentum.next_value(at)

    def schedules(self, at: Progress) -> Mapping[str, float]:
        """The momentum that made this step's keys."""
        return {"ema_momentum": self.momentum.value(at.step, at)}

    def parameter_group(self, name: str, parameter: nn.Parameter) -> ParameterGroup:
        """Biases and tensors of one dimension do not decay; class token, positions and tables of
        relative positions do, as in the official runs."""
        return decaying_matrices(name, parameter)

    def uninformed_loss(self, batch: int) -> float:
        """That of equal logits: ln(K + 1) in each direction. While the queues are random, the loss
        of the first steps is lower."""
        return 2 * math.log(self.queue.shape[1] + 1)

    def choices(self, at: Progress) -> Hashable:
        """Whether both encoders share patch tokens."""
        return self.momentum.shares_tokens()

    def _watch(self, queries: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """What telemetry sees; the keys are also kept for the queues."""
        self.push(keys)
        return {
            "queries": queries.detach(),
            "keys": keys.detach(),
            "queue_fill": self.queue_fill,
        }
