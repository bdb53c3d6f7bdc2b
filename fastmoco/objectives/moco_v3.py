"""MoCo v3: which encoder sees which view, which head, which loss, and when the twin moves (Chen, Xie, He 2021)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastmoco.distributed.gather import start_gathering
from fastmoco.distributed.mesh import group_rank
from fastmoco.models.heads import predictor, projector
from fastmoco.models.vit import VisionTransformer
from fastmoco.objectives.interface import Progress
from fastmoco.optim import schedule
from fastmoco_kernels import ema_update_
from fastmoco_kernels.info_nce.op import symmetric_info_nce_loss


class MoCoV3Output(NamedTuple):
    """What one forward gives; B is the local batch, D the projection width."""

    loss: Tensor
    """Scalar, at least float32: the sum of both directions, a mean over the local batch."""
    q1: Tensor
    """[B, D] predictor output of view 1, not normalised."""
    q2: Tensor
    """[B, D] predictor output of view 2, not normalised."""
    k1: Tensor
    """[B, D] momentum encoder output of view 1, not normalised, without gradient."""
    k2: Tensor
    """[B, D] momentum encoder output of view 2, not normalised, without gradient."""
    accuracy: Tensor | None = None
    """[2] shares of queries whose positive ranks first, and among the first five, of all ranks' keys; where asked for."""


class MoCoV3(nn.Module):
    """An encoder with projector and predictor, its momentum twin, and the symmetric InfoNCE between them.

    One step: ``update_momentum_encoder(m)``, ``forward``, backward, optimizer. The update uses the encoder as the last
    optimizer step left it; whether it runs right after that step, before the query side's forward or behind it changes no
    number, because nothing in between moves a parameter. Both encoders run in training mode: the twin normalises by the
    statistics of its own batch and keeps its own running averages; only parameters are averaged.

    Fast path, equal to ``objectives.reference.plain_forward`` under a test: both views pass a trunk as one batch where
    the trunk couples no samples, heads see both views at once but keep their batch statistics apart, and patch tokens
    are computed once for both encoders while their stems are frozen and equal.

    Args:
        build_encoder: called twice; its encoders must have equal shapes, and a free ``head``.
        projection_dim: width D of queries and keys.
        hidden_dim: hidden width of projector and predictor.
        temperature: > 0, divides the cosines.
        ema_momentum: of the momentum encoder at step 0, in [0, 1].
        ema_schedule: how it goes on from there, as for `fastmoco.optim.schedule.ema_momentum`.
        epochs: over which; None: those of the run's steps.

    Attributes:
        encoder: the query side; ``encoder.head`` is its projector.
        momentum_encoder: the twin, without gradient.
        predictor: query side only.

    Raises:
        ValueError: if the temperature is not positive.
    """

    def __init__(
        self,
        build_encoder: Callable[[], VisionTransformer],
        *,
        projection_dim: int = 256,
        hidden_dim: int = 4096,
        temperature: float = 0.2,
        ema_momentum: float = 0.99,
        ema_schedule: Literal["cosine", "constant"] = "cosine",
        epochs: float | None = None,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be positive")
        self.temperature = temperature
        self._ema_start, self._ema_schedule, self._epochs = ema_momentum, ema_schedule, epochs
        self.encoder, self.momentum_encoder = build_encoder(), build_encoder()
        for encoder in (self.encoder, self.momentum_encoder):
            encoder.head = projector(encoder.embed_dim, hidden_dim, projection_dim)
        self.predictor = predictor(projection_dim, hidden_dim, projection_dim)
        self.momentum_encoder.requires_grad_(False)
        with torch.no_grad():
            for twin, own in zip(self.momentum_encoder.parameters(), self.encoder.parameters(), strict=True):
                twin.copy_(own)
        self._stems_compared: tuple[tuple[int, int], ...] = ()
        self._stems_equal = False

    def forward(self, view1: Tensor, view2: Tensor, *, accuracy: bool = False) -> MoCoV3Output:
        """Queries, keys and loss of one batch.

        Where there are several processes, batch norms see all of them, and keys are gathered in the order of ranks:
        the mean of the ranks' losses is the loss of the global batch.

        Args:
            view1: [B, 3, H, W] first view, the same B on every rank.
            view2: [B, 3, H, W] second view; row i shows the image of ``view1``'s row i.
            accuracy: whether to count, in the pass of the loss, how the positives rank among all keys.

        Returns:
            The loss, differentiable in the parameters of encoder and predictor, and the raw queries and keys.
        """
        queries, tokens = self.query_features(view1, view2)
        keys = self.key_features(view1, view2, tokens if self.shares_patch_tokens() else None)
        return self.compare(queries, keys, accuracy=accuracy)

    def query_features(self, view1: Tensor, view2: Tensor) -> tuple[Tensor, Tensor | None]:
        """The query side's trunk.

        Args:
            view1: [b, 3, H, W].
            view2: [b, 3, H, W].

        Returns:
            [2, b, E] class features of both views, and the [2b, L, E] patch tokens where the views went through together.

        Raises:
            ValueError: if the views differ in shape.
        """
        if view1.shape != view2.shape:
            raise ValueError(f"view1 shape={tuple(view1.shape)}, view2 shape={tuple(view2.shape)}: must be equal")
        return _features(self.encoder, (view1, view2), None)

    @torch.no_grad()
    def key_features(self, view1: Tensor, view2: Tensor, tokens: Tensor | None) -> Tensor:
        """The twin's trunk: [2, b, E] without gradient, from ``query_features``'s tokens where both encoders share them."""
        return _features(self.momentum_encoder, (view1, view2), tokens)[0]

    def compare(self, queries: Tensor, keys: Tensor, *, accuracy: bool = False) -> MoCoV3Output:
        """Heads and loss: all that couples the images of a batch, so the one part that must see the whole batch at once.

        Args:
            queries: [2, B, E] class features of both views by the encoder.
            keys: [2, B, E] those by its twin.
            accuracy: as for ``forward``.

        Returns:
            As ``forward``.
        """
        with torch.no_grad():
            k1, k2 = self.momentum_encoder.head(keys).unbind()
            finish_gathering = start_gathering(torch.cat([k1, k2], dim=1))
        q1, q2 = self.predictor(self.encoder.head(queries)).unbind()
        keys1, keys2 = finish_gathering().chunk(2, dim=1)
        offset = group_rank() * queries.shape[1]
        loss, top1, top5 = symmetric_info_nce_loss(
            q1, keys2, q2, keys1, temperature=self.temperature, positive_offset=offset, accuracy=accuracy
        )
        ranked = torch.stack([top1, top5]) if top1 is not None and top5 is not None else None
        return MoCoV3Output(loss, q1, q2, k1, k2, ranked)

    @property
    def couples_samples(self) -> str:
        """Why the trunk's features of an image depend on the other images of a batch; empty where they do not."""
        if self.encoder.couples_samples:
            return "its convolutional stem has batch norms, whose statistics are those of the whole batch"
        return ""

    def averages(self) -> Mapping[nn.Parameter, Tensor]:
        """The parameter of the momentum encoder for each of the encoder, frozen ones included."""
        return dict(zip(self.encoder.parameters(), self.momentum_encoder.parameters(), strict=True))

    def ema_momentum(self, at: Progress) -> float | None:
        """Momentum of the move that ends the step `at`, m(t + 1); None after the last step.

        Chen, Xie, He 2021 (Algorithm 1) average inside a step, before its forward, from the encoder as
        it is then. Nothing moves between the optimizer of one step and that point of the next, so step
        t may end with the average of step t + 1, at the momentum of that step: the same operands, the
        same bits, and one sweep over memory can do both. Step 0 needs none: it starts with equal
        encoders, which the average leaves alone.
        """
        following = at.step + 1
        if following >= at.total_steps:
            return None
        return schedule.ema_momentum(
            following,
            start=self._ema_start,
            epochs=at.total_steps / at.steps_per_epoch if self._epochs is None else self._epochs,
            steps_per_epoch=at.steps_per_epoch,
            schedule=self._ema_schedule,
        )

    def after_step(self, skipped: Tensor | None, at: Progress) -> None:
        """Nothing: MoCo v3 has no queue and no centre."""

    def frozen(self, at: Progress) -> frozenset[str]:
        """Nothing is frozen for a time."""
        return frozenset()

    @torch.no_grad()
    def update_momentum_encoder(self, ema_momentum: float | Tensor, *, done: Set[Tensor] = frozenset()) -> None:
        """Move the twin towards the encoder: ``twin <- m * twin + (1 - m) * encoder``, parameters only.

        Call it once between two optimizer steps. Frozen parameters that are equal in both encoders, as they
        are unless a checkpoint says otherwise, stay untouched.

        Args:
            ema_momentum: m in [0, 1]; a tensor of one element is read on the device, as `ema_update_` does.
            done: parameters of the encoder whose averages were moved already, by the optimizer's own sweep.

        Raises:
            ValueError: if m lies outside [0, 1].
        """
        frozen_too = not self.shares_patch_tokens()
        pairs = [
            (twin, own)
            for twin, own in zip(self.momentum_encoder.parameters(), self.encoder.parameters(), strict=True)
            if (own.requires_grad or frozen_too) and own not in done
        ]
        ema_update_([twin for twin, _ in pairs], [own for _, own in pairs], ema_momentum)

    def shares_patch_tokens(self) -> bool:
        """Whether both encoders must give the same patch tokens: their stems are frozen and equal, and so are positions.

        The comparison reads the device, so it runs only where one of the tensors has been replaced or written since.
        """
        if self.encoder.couples_samples:
            return False
        own, twin = (
            [encoder.pos_embed, *encoder.patch_embed.parameters()] for encoder in (self.encoder, self.momentum_encoder)
        )
        if any(p.requires_grad for p in own):
            return False
        now = tuple((p.data_ptr(), p._version) for p in own + twin)
        if now != self._stems_compared:
            self._stems_equal = all(torch.equal(a, b) for a, b in zip(own, twin, strict=True))
            self._stems_compared = now
        return self._stems_equal


def _features(
    encoder: VisionTransformer, views: tuple[Tensor, Tensor], tokens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """[2, B, E] features of both views, and the [2B, L, E] patch tokens where the views went through together."""
    if encoder.couples_samples:
        return torch.stack([encoder(view) for view in views]), None
    if tokens is None:
        tokens = encoder.patch_tokens(torch.cat(views))
    return encoder.encode(tokens).view(2, views[0].shape[0], -1), tokens
