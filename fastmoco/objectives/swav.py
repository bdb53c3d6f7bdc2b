"""SwAV (Caron et al. 2020): predict the code of one view from another, where codes assign the
images of the whole batch evenly to trained prototypes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.distributed.agree import largest, total
from fastmoco.distributed.gather import gather_keys
from fastmoco.distributed.mesh import group_rank, group_size
from fastmoco.models.encoder import with_heads
from fastmoco.models.heads import FORMS, build_head
from fastmoco.objectives.interface import (
    Features,
    Inputs,
    Objective,
    Output,
    ParameterGroup,
    Progress,
)
from fastmoco.objectives.view_pairs import by_size
from fastmoco.recipes.swav import SwAVConfig
from fastmoco_kernels import soft_cross_entropy
from fastmoco_kernels.tensors import local
from fastmoco_pipelines.loading.step_parts import LOSS, QUERY_FORWARD, part

ASSIGNED = 2
"""The first views of an image, those of full size, get codes; all views predict them."""


class SwAV(Objective):
    """An encoder with a projector, and prototypes. There is no momentum encoder.

    Views of one size pass the trunk as one batch, and the projector takes all rows of all views as
    one batch: batch statistics are joint. Any number of views of any sizes; the first two are
    assigned.

    With a queue, the codes of a batch are computed together with the features of the last batches.
    The queue has the rows of all ranks and is equal on all of them. A row belongs to an image of
    its global batch, not to a rank: a run that continues on another number of ranks continues with
    the same queue. Each rank assigns a part of its rows, whichever, because codes are of all rows
    together. The queue is in use from the step at which its oldest row is filled, and then to the
    end of the run.

    Args:
        build_encoder: makes the encoder, with a free `head`.
        projection_dim: width D of projections and prototypes.
        hidden_dim: hidden width of the projector.
        prototypes: number K of prototypes.
        temperature: > 0, divides the scores of the prediction.
        epsilon: > 0, divides the scores of the assignment; see `sinkhorn` for its lower limit.
        sinkhorn_iterations: at least 1.
        freeze_prototypes_steps: steps at the start without an update of the prototypes.
        queue: rows of the queue over all ranks, a multiple of the global batch; 0: no queue.
        queue_start_epoch: epoch from which the queue is filled.
        decay_prototypes: whether the weight decay applies to the prototypes, as in LARC.

    Attributes:
        encoder: the trunk; `encoder.head` is the projector.
        prototypes: a linear layer without bias; its rows have unit length in a forward.
        queue: [2, rows, D] embeddings of either assigned view, newest first; absent without queue.
        queue_used: [2] whether it is in use.
    """

    least_large = ASSIGNED
    queue: Tensor
    queue_used: Tensor

    def __init__(
        self,
        build_encoder: Callable[[], Any],
        *,
        projection_dim: int = 128,
        hidden_dim: int = 2048,
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        freeze_prototypes_steps: int = 0,
        queue: int = 0,
        queue_start_epoch: float = 0,
        decay_prototypes: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.epsilon = epsilon
        self.sinkhorn_iterations = sinkhorn_iterations
        self._freeze_steps = freeze_prototypes_steps
        self._queue_start = queue_start_epoch
        self._decay_prototypes = decay_prototypes
        self.encoder = build_encoder()
        self.encoder.head = build_head(
            self.encoder.embed_dim, hidden_dim, projection_dim, FORMS["swav_projector"]
        )
        self.prototypes = Prototypes(projection_dim, prototypes)
        self.coupling = with_heads(self.encoder)
        self.coupling_reason = self.encoder.coupling_reason
        self._has_queue = queue > 0
        if queue:
            self.register_buffer("queue", torch.zeros(ASSIGNED, queue, projection_dim))
            self.register_buffer("queue_used", torch.zeros(ASSIGNED, dtype=torch.bool))
        self._pushed: Tensor | None = None

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> SwAV:
        """The objective of a config.

        Raises:
            ValueError: if the queue is no multiple of the global batch, or begins after the run.
        """
        own = config.objective
        assert isinstance(own, SwAVConfig)  # noqa: S101 - a type: each class is built from its own config
        batch = config.global_batch_size
        if own.queue % batch:
            raise ValueError(
                f"objective.queue={own.queue}: must be a multiple of global_batch_size={batch}, "
                f"whose rows it takes in each step; take {max(1, own.queue // batch) * batch}"
            )
        if own.queue and own.queue_start_epoch >= config.epochs:
            raise ValueError(
                f"objective.queue_start_epoch={own.queue_start_epoch:g}: the run has "
                f"epochs={config.epochs:g}, so its queue would never be filled; take an earlier "
                "epoch, or --objective.queue 0"
            )
        return cls(
            build_encoder,
            projection_dim=config.model.projection_dim,
            hidden_dim=config.model.hidden_dim,
            prototypes=own.prototypes,
            temperature=own.temperature,
            epsilon=own.epsilon,
            sinkhorn_iterations=own.sinkhorn_iterations,
            freeze_prototypes_steps=own.freeze_prototypes_steps,
            queue=own.queue,
            queue_start_epoch=own.queue_start_epoch,
            decay_prototypes=config.optim.name not in ("adamw", "lamb"),
        )

    def before_step(self, at: Progress) -> None:
        """Prototypes become unit rows, in place: the optimizer has moved them off the sphere."""
        self.prototypes.normalise_()

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """All views through the encoder: [b, V, E]. Neighbours of one size pass as one batch.

        Raises:
            ValueError: if there are fewer than two views.
        """
        with part(QUERY_FORWARD):
            return Features((by_size(inputs, self.encoder, least=ASSIGNED),))

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """Projector, prototypes, codes and loss of the whole batch. There is no accuracy: nothing
        is compared with other images."""
        rows = features.online[0].transpose(0, 1)
        views, images = rows.shape[:2]
        with part(QUERY_FORWARD):
            embeddings = unit_rows(self.encoder.head(rows.flatten(0, 1)))

            # Scores of views and queue in one call: sharded prototypes are gathered for each.
            fills = self._fills(at)
            queue = self._part_of_queue().to(embeddings.dtype) if fills else embeddings[:0]
            scores = self.prototypes(torch.cat([embeddings, queue.flatten(0, -2)]))
            scores, queued = scores.tensor_split([views * images])
            scores = scores.view(views, images, -1)

        # Codes, which are constants, and the loss, which keeps no second tensor of all scores.
        with part(LOSS):
            embeddings = embeddings.detach().view(views, images, -1)
            with torch.no_grad():
                queued = queued.view(ASSIGNED, -1, queued.shape[1])
                codes = self.assign(scores[:ASSIGNED].detach(), queued)
            self._pushed = embeddings[:ASSIGNED] if fills else None
            loss = soft_cross_entropy(scores, codes, temperature=self.temperature)
            return Output(loss, self._watch(embeddings, scores[0], codes))

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same written out: scores of all ranks are gathered and assigned in one matrix, and
        each pair of views has its own term."""
        rows = by_size(inputs, self.encoder.plain, least=ASSIGNED)
        views = rows.shape[1]
        projected = self.encoder.head(torch.cat([rows[:, v] for v in range(views)]))
        embeddings = F.normalize(projected, dim=1).chunk(views)
        weight = self.prototypes.weight
        scores = [own @ weight.T for own in embeddings]
        codes = []
        with torch.no_grad():
            for view in range(ASSIGNED):
                every = gather_keys(scores[view])
                if self._fills(at) and bool(self._in_use()[view]):
                    every = torch.cat([every, self.queue[view] @ weight.T])
                assigned = sinkhorn_reference(every, self.epsilon, self.sinkhorn_iterations)
                codes.append(assigned[group_rank() * len(rows) :][: len(rows)])
        self._pushed = torch.stack(embeddings[:ASSIGNED]).detach() if self._fills(at) else None

        log_shares = [(own / self.temperature).log_softmax(1) for own in scores]
        terms = [
            -(code * log_shares[v]).sum(1).mean()
            for c, code in enumerate(codes)
            for v in range(views)
            if v != c
        ]
        watch = self._watch(torch.stack(embeddings).detach(), scores[0], torch.stack(codes))
        return Output(torch.stack(terms).mean(), watch)

    def assign(self, scores: Tensor, queued: Tensor) -> Tensor:
        """The codes of the assigned views, by all ranks together.

        Args:
            scores: [2, B, K] of this rank's images.
            queued: [2, rows, K] of this rank's part of the queue; no rows where it is not filled.

        Returns:
            [2, B, K]; each row sums to 1.
        """
        images = scores.shape[1]
        assigned = partial(sinkhorn, epsilon=self.epsilon, iterations=self.sinkhorn_iterations)
        if not self._has_queue or not queued.shape[1]:
            return assigned(scores)

        # Rows of a queue that is not yet in use have no weight. The device decides.
        used = self._in_use().to(scores.dtype)
        weights = torch.ones_like(scores[..., 0])
        weights = torch.cat([weights, used[:, None].expand(-1, queued.shape[1])], dim=1)
        rows = images * group_size() + used * self.queue.shape[1]
        both = torch.cat([scores, queued], dim=1)
        return assigned(both, weights=weights, rows=rows)[:, :images]

    @torch.no_grad()
    def after_step(self, skipped: Tensor | None, at: Progress) -> None:
        """Push the embeddings of this step, those of all ranks, to the front of the queue."""
        pushed, self._pushed = self._pushed, None
        if pushed is None:
            return
        newest = gather_keys(pushed.transpose(0, 1)).transpose(0, 1).to(self.queue.dtype)
        moved = torch.cat([newest, self.queue], dim=1)[:, : self.queue.shape[1]]
        used = self._in_use()
        if skipped is not None:
            moved = torch.where(skipped > 0, self.queue, moved)
            used = torch.where(skipped > 0, self.queue_used, used)
        self.queue.copy_(moved)
        self.queue_used.copy_(used)

    def frozen(self, at: Progress) -> frozenset[str]:
        """The prototypes, in the first steps."""
        return frozenset({"prototypes.weight"} if at.step < self._freeze_steps else ())

    def parameter_group(self, name: str, parameter: nn.Parameter) -> ParameterGroup:
        """Prototypes are normalised in every step: with AdamW, a decay would only change the length
        of their steps."""
        if name == "prototypes.weight" and not self._decay_prototypes:
            return ParameterGroup(weight_decay_scale=0.0)
        return ParameterGroup()

    def uninformed_loss(self, batch: int) -> float:
        """That of codes and predictions that are alike for all images: ln K."""
        return math.log(self.prototypes.out_features)

    @torch.no_grad()
    def _watch(self, embeddings: Tensor, scores: Tensor, codes: Tensor) -> dict[str, Tensor]:
        """What shows a collapse, which the loss does not.

        Args:
            embeddings: [V, B, D] unit rows of all views.
            scores: [B, K] of the first view.
            codes: [2, B, K].

        Returns:
            `code_entropy`, the mean entropy of a code: ln K where codes do not depend on the image.
            `mean_code_entropy`, that of the mean code of this rank's images: near ln K where they
            share all prototypes evenly. `used_prototypes`, exp of the entropy of the mean
            prediction of the first view: the number of prototypes among which this rank's images
            are spread. Telemetry takes the deviation of the unit rows from the embeddings.
        """
        mean = (scores / self.temperature).softmax(-1).mean(0)
        entropy = torch.special.entr
        of_codes = entropy(codes).sum(-1).mean()
        return {
            "queries": embeddings,
            "keys": embeddings,
            "code_entropy": of_codes,
            "target_entropy": of_codes,  # the name that methods with targets share
            "mean_code_entropy": entropy(codes.mean(1)).sum(-1).mean(),
            "used_prototypes": entropy(mean).sum().exp(),
        }

    def _fills(self, at: Progress) -> bool:
        """Whether the queue takes the embeddings of a step."""
        return self._has_queue and at.epoch >= self._queue_start

    def _part_of_queue(self) -> Tensor:
        """[2, rows, D]: the rows that this rank assigns."""
        return self.queue.tensor_split(group_size(), dim=1)[group_rank()]

    def _in_use(self) -> Tensor:
        """[2] whether a view's queue is in use: once it is, it stays so."""
        return self.queue_used | self.queue[:, -1].any(dim=-1)


class Prototypes(nn.Linear):
    """K trained directions: scores [n, K] of embeddings [n, D], multiplied in float32 or wider.

    Attributes:
        gathers_wide: sharded training gathers the weight in its own dtype, also in a run in bf16.
    """

    gathers_wide = True

    def __init__(self, width: int, count: int) -> None:
        super().__init__(width, count, bias=False)
        self.normalise_()

    def forward(self, rows: Tensor) -> Tensor:
        """The dot products with all prototypes.

        Scores are divided by 0.05 and exponentiated: in bf16 their error would be 8 % and more.
        """
        wide = torch.promote_types(rows.dtype, torch.float32)
        with torch.autocast(rows.device.type, enabled=False):
            return F.linear(rows.to(wide), self.weight.to(wide))

    @torch.no_grad()
    def normalise_(self) -> None:
        """Divide the rows by their lengths, in place; shards are whole rows.

        A row whose length is 1 up to rounding stays as it is. So a second call changes no bit, and
        a step that is skipped leaves no trace.
        """
        (rows,) = local([self.weight.detach()])
        lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float64)
        rounding = max(torch.finfo(rows.dtype).eps, 16 * torch.finfo(torch.float64).eps)
        off = (lengths - 1).abs() > rounding
        rows.copy_(torch.where(off, rows / lengths.clamp(min=1e-12), rows))


def unit_rows(rows: Tensor) -> Tensor:
    """Rows divided by their lengths, in float32 or wider."""
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=-1)


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    *,
    epsilon: float,
    iterations: int,
    weights: Tensor | None = None,
    rows: Tensor | float | None = None,
) -> Tensor:
    """Codes: shares of the prototypes in each row, such that all prototypes get about the same.

    `exp(scores / epsilon)`, whose columns, the prototypes, are scaled to the sum 1 / K and then its
    rows to the sum 1 / N, where N counts the rows of all ranks; this `iterations` times. The last
    scaling is of the rows, so that columns have equal sums only nearly. One all-reduce of K sums
    for an iteration, and one of the largest score.

    The largest score of all ranks is subtracted first, so that nothing overflows; it cancels in the
    first scaling. Rows that are more than 87 * epsilon below it in float32 underflow: of unit
    vectors, scores are at most 2 apart, so epsilon must be at least 0.025. The codes of a row that
    has underflowed as a whole are 0, and not NaN.

    Args:
        scores: [..., b, K] of this rank's rows, any floating dtype.
        epsilon: > 0; small ones make codes of one prototype each.
        iterations: at least 1.
        weights: [..., b]: 1, or 0 for rows that take no part; default 1.
        rows: N; default b times the number of ranks.

    Returns:
        [..., b, K], at least float32; rows sum to 1. The same with the rows on any number of ranks.
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    exponents = scores.to(wide) / epsilon
    shares = exponents.sub_(largest(exponents.amax((-2, -1), keepdim=True))).exp_()
    if weights is not None:
        shares *= weights[..., None]
    count: Tensor | float = float(scores.shape[-2] * group_size()) if rows is None else rows
    if isinstance(count, Tensor):
        count = count.to(wide)[..., None, None]
    tiny = torch.finfo(wide).tiny
    for _ in range(iterations):
        columns = total(shares.sum(-2, keepdim=True))
        shares /= (columns * scores.shape[-1]).clamp_(min=tiny)
        shares /= (shares.sum(-1, keepdim=True) * count).clamp_(min=tiny)
    return shares.mul_(count)


def sinkhorn_reference(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """The codes of the rows [N, K] of all ranks, as Caron et al. write them."""
    matrix = (scores / epsilon).exp().T
    prototypes, images = matrix.shape
    matrix = matrix / matrix.sum()
    for _ in range(iterations):
        matrix = matrix / matrix.sum(dim=1, keepdim=True) / prototypes
        matrix = matrix / matrix.sum(dim=0, keepdim=True) / images
    return (matrix * images).T
