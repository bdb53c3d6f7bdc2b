"""SimCLR (Chen, Kornblith, Norouzi, Hinton 2020): one encoder, both views, and all other rows as
negatives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import normalize

from fastmoco.config import Config
from fastmoco.distributed.gather import gather_keys
from fastmoco.distributed.mesh import group_rank, group_size
from fastmoco.models.encoder import Coupling, with_heads
from fastmoco.models.heads import FORMS, HeadForm, build_head
from fastmoco.objectives.interface import Features, Inputs, Objective, Output, Progress
from fastmoco.objectives.view_pairs import by_view, encoded_views
from fastmoco.recipes.simclr import SimCLRConfig
from fastmoco_pipelines.loading.step_parts import LOSS, QUERY_FORWARD, part

FLOOR = 1e-12
"""Least length that a row is divided by."""
TILE_CPU, TILE = 2**21, 2**23
"""Logits of a block of rows: 8 and 32 MiB in float32. Two or three tensors of that size are in
memory at a time."""
TIE = 64
"""Negatives within this many units in the last place of the positive rank before it: equal rows
must tie in any order of summation."""


class SimCLR(Objective):
    """An encoder with a projector, and the NT-Xent loss of both views of all ranks' images.

    There is no momentum encoder. Batch norms see both views of all ranks as one batch, in the
    projector and, where it has batch norms, in the trunk.

    Args:
        build_encoder: called once; its encoder must have a free `head`.
        projection_dim: width D of what the loss compares.
        hidden_dim: hidden width of the projector.
        temperature: > 0, divides the cosines.
        loss_scale: factor on the mean loss of all rows; the official code has 2.
        projector: form of the projector.
        joint_batch_statistics: whether batch norms see both views as one batch.

    Attributes:
        encoder: `encoder.head` is its projector.

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
        temperature: float = 0.2,
        loss_scale: float = 1.0,
        projector: HeadForm = FORMS["moco_v3_projector"],
        joint_batch_statistics: bool = True,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be positive")
        self.temperature = temperature
        self.loss_scale = loss_scale
        self.joint = joint_batch_statistics
        self.encoder = build_encoder()
        self.encoder.head = build_head(
            self.encoder.embed_dim, hidden_dim, projection_dim, projector
        )
        self.coupling = with_heads(self.encoder)
        self.coupling_reason = self.encoder.coupling_reason

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> SimCLR:
        """The objective of a config."""
        own = config.objective
        assert isinstance(own, SimCLRConfig)  # noqa: S101 - a type: each class is built from its own config
        form = replace(FORMS["simclr"], layers=own.layers, last_norm_weight=own.last_norm_weight)
        return cls(
            build_encoder,
            projection_dim=config.model.projection_dim,
            hidden_dim=config.model.hidden_dim,
            temperature=own.temperature,
            loss_scale=own.loss_scale,
            projector=form,
            joint_batch_statistics=own.joint_batch_statistics,
        )

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Both views through the encoder: [b, 2, E].

        They pass as one batch, except through a trunk whose batch norms shall see each view alone.

        Raises:
            ValueError: if the views differ in shape, or are not two.
        """
        together = self.joint or self.coupling is not Coupling.TRUNK
        with part(QUERY_FORWARD):
            rows = encoded_views(self.encoder, inputs, together=together)
        return Features((rows.transpose(0, 1),))

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """Projector and loss of the whole batch; projections are gathered over ranks.

        Args:
            features: of both views, [B, 2, E].
            at: the step.
            accuracy: whether to count, in the pass of the loss, how the positives rank among all
                other rows.
        """
        with part(QUERY_FORWARD):
            projections = self._project(by_view(features.online[0]))
        with part(LOSS):
            loss, hits = nt_xent_loss(
                projections, temperature=self.temperature, scale=self.loss_scale, accuracy=accuracy
            )
        return self._output(loss, projections, hits)

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same with nothing shared: each view passes the trunk alone where that makes no
        difference, and the logits of all ranks' rows are one matrix."""
        together = self.joint and self.coupling is Coupling.TRUNK
        projections = self._project(encoded_views(self.encoder.plain, inputs, together=together))
        loss, hits = nt_xent_reference(
            projections, temperature=self.temperature, scale=self.loss_scale
        )
        return self._output(loss, projections, hits if accuracy else None)

    def uninformed_loss(self, batch: int) -> float:
        """That of equal logits: `ln(2 * batch - 1)`, times the scale of the loss."""
        return self.loss_scale * math.log(2 * batch - 1)

    def _project(self, features: Tensor) -> Tensor:
        """[2, B, E] features -> [2, B, D] projections."""
        head: nn.Module = self.encoder.head
        rows = features.flatten(0, 1) if self.joint else features
        projected: Tensor = head(rows)
        return projected.view(*features.shape[:2], -1)

    def _output(self, loss: Tensor, projections: Tensor, hits: Tensor | None) -> Output:
        shown = projections.detach()
        watch: Mapping[str, Tensor] = {"queries": shown, "keys": shown}
        return Output(loss, watch if hits is None else {**watch, "accuracy": hits})


def nt_xent_loss(
    projections: Tensor, *, temperature: float, scale: float = 1.0, accuracy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The normalised temperature-scaled cross-entropy of SimCLR, over the rows of all ranks.

    With h = u(projections), s_ij = h_i . h_j / temperature, and the R = 2 * B * ranks rows of both
    views of all ranks: `scale * mean_i(logsumexp_{j != i}(s_ij) - s_i,other view of i)`, the mean
    over this rank's 2 * B rows. Each row is compared with all R - 1 other rows.

    Args:
        projections: [2, B, D] of both views, raw, any floating dtype; B equal on all ranks.
        temperature: > 0.
        scale: factor of the mean: 1 as in the paper, 2 as in the official code.
        accuracy: whether to rank the positives.

    Returns:
        The loss, a scalar of at least float32. Its gradient is that of the SUM of all ranks' losses
        in this rank's projections, so a trainer that averages gradients over ranks gets exactly
        that of the global mean. And [2]: shares of rows whose positive ranks first, and among the
        first five; None unless asked for.

    Numerics: at least float32, also under autocast. The positive stays out of the sums, so that
        a small loss keeps its digits.
    Memory and cost: 12 * B * R * D FLOPs, a tile of logits at a time. All of it in the forward,
        which keeps the gradient, [2, B, D].
    Distributed: gathers the projections and two numbers a row. The backward communicates nothing:
        S is symmetric, so the gradient in h_j needs the sums of all rows, not their gradients.
    """
    loss, hits = _NTXent.apply(projections, temperature, scale, accuracy)  # type: ignore[no-untyped-call]
    return loss, hits if accuracy else None


class _Sums(NamedTuple):
    """What a row's softmax needs, for each row."""

    total: Tensor
    """Log of the sum over all other rows."""
    loss: Tensor
    """`total` minus the positive's logit."""


class _NTXent(torch.autograd.Function):
    """`nt_xent_loss`. With p_ij the softmax of row i, and all R rows,

    d (sum of all ranks' losses) / d h_j
        = scale / (2 * B * temperature) * (sum_i (p_ij + p_ji) h_i - 2 h_positive(j)).
    """

    @staticmethod
    def forward(
        ctx: Any, projections: Tensor, temperature: float, scale: float, accuracy: bool
    ) -> tuple[Tensor, Tensor]:
        with torch.autocast(projections.device.type, enabled=False):
            rows = _Rows(projections, temperature)
            blocks = [rows.sums(block, accuracy) for block in rows.blocks()]
            own = _Sums(*(torch.cat(parts) for parts in zip(*(b[0] for b in blocks), strict=True)))
            loss = own.loss.mean() * scale
            if ctx.needs_input_grad[0]:
                every = _Sums(*gather_keys(torch.stack(own, dim=1)).unbind(1))
                unit = torch.cat([rows.gradient(block, own, every) for block in rows.blocks()])
                raw = rows.through_norm(unit.mul_(scale / (len(unit) * temperature)))
                ctx.save_for_backward(raw.view(projections.shape).to(projections.dtype))
        ranks = torch.cat([block[1] for block in blocks])
        hits = torch.stack([(ranks < first).to(loss.dtype).mean() for first in (1, 5)])
        ctx.mark_non_differentiable(hits)
        return loss, hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor, dhits: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * dloss, None, None, None


class _Rows:
    """The rows of all ranks as unit vectors, and a block of this rank's rows at a time against
    them.

    Rows are in the order rank, view, image. A block is a range of this rank's rows.
    """

    def __init__(self, projections: Tensor, temperature: float) -> None:
        raw = projections.detach().flatten(0, 1)
        own, self._images = len(raw), projections.shape[1]
        self._first = group_rank() * own
        self._temperature = temperature

        wide = gather_keys(raw).to(torch.promote_types(raw.dtype, torch.float32))
        norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
        self._all = wide / norm.clamp_min(FLOOR)
        self._own = self._all[self._first : self._first + own]
        self._norm = norm[self._first : self._first + own]
        # The other view of the same image.
        self._positive = torch.arange(own, device=raw.device).roll(self._images)

    def blocks(self) -> list[slice]:
        """This rank's rows in parts of at most a tile of logits."""
        size = max(1, (TILE_CPU if self._all.is_cpu else TILE) // len(self._all))
        own = len(self._own)
        return [slice(start, min(start + size, own)) for start in range(0, own, size)]

    def sums(self, block: slice, accuracy: bool) -> tuple[_Sums, Tensor]:
        """The sums of a block's rows, and the rank of each positive; 0 if ranks are not wanted."""
        positive = (self._own[block] * self._own[self._positive[block]]).sum(1) / self._temperature
        logits = self._negatives(block)
        ranks = torch.zeros_like(positive, dtype=torch.int64)
        if accuracy:
            bar = positive - TIE * torch.finfo(positive.dtype).eps / self._temperature
            ranks = (~(logits < bar[:, None])).sum(1)
        loss = torch.logaddexp(logits.logsumexp(1) - positive, torch.zeros_like(positive))
        return _Sums(positive + loss, loss), ranks

    def gradient(self, block: slice, own: _Sums, every: _Sums) -> Tensor:
        """`sum_i (p_ij + p_ji) h_i - 2 h_positive(j)` of a block's rows j."""
        logits = self._negatives(block)
        weights = (logits - own.total[block, None]).exp_()
        weights += logits.sub_(every.total).exp_()
        gradient = weights @ self._all

        # The positives' part: (p - 1) of both rows, without cancellation.
        positive = self._positive[block]
        missing = torch.expm1(-own.loss[block]) + torch.expm1(-own.loss[positive])
        found: Tensor = gradient.addcmul_(missing[:, None], self._own[positive])
        return found

    def through_norm(self, gradient: Tensor) -> Tensor:
        """The gradient of the raw rows from that of the unit rows, in place; rows below `FLOOR`
        were divided by it."""
        along = (gradient * self._own).sum(1, keepdim=True) * (self._norm >= FLOOR)
        return gradient.addcmul_(along, self._own, value=-1).div_(self._norm.clamp_min(FLOOR))

    def _negatives(self, block: slice) -> Tensor:
        """Logits of a block's rows against all rows; -inf at the row itself and its positive."""
        logits: Tensor = (self._own[block] / self._temperature) @ self._all.T
        first, last = self._first + block.start, self._first + block.stop
        logits[:, first:last].diagonal().fill_(-math.inf)
        return logits.scatter_(1, (self._first + self._positive[block])[:, None], -math.inf)


def nt_xent_reference(
    projections: Tensor, *, temperature: float, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`nt_xent_loss` and its accuracy from the definition, by autograd.

    Every rank computes the losses of all rows. Gradients flow into its own; they count once for
    each rank, as the trainer averages.
    """
    _, B, D = projections.shape
    rank, ranks = group_rank(), group_size()
    parts = list(gather_keys(projections.flatten(0, 1)).view(ranks, 2 * B, D).unbind())
    parts[rank] = projections.flatten(0, 1)
    rows = torch.cat(parts)
    unit = normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1, eps=FLOOR)
    logits = (unit @ unit.T / temperature).fill_diagonal_(-math.inf)

    # Row (rank, view, image): its positive is the other view.
    index = torch.arange(len(rows), device=rows.device).view(ranks, 2, B)
    positive = index.flip(1).flatten()
    at_positive = logits[index.flatten(), positive]
    losses = scale * (logits.logsumexp(1) - at_positive)
    own = losses.view(ranks, 2 * B)[rank].mean().detach()
    every = losses.mean() * ranks

    bar = at_positive - TIE * torch.finfo(logits.dtype).eps / temperature
    order = ((logits >= bar[:, None]).sum(1) - 1).view(ranks, 2 * B)[rank]
    hits = torch.stack([(order < first).to(unit.dtype).mean() for first in (1, 5)])
    return own + (every - every.detach()), hits.detach()
