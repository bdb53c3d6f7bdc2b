"""MoCo v1 (He, Fan, Wu, Xie, Girshick 2020) and v2 (Chen, Fan, Girshick, He 2020): tell the key of
an image's other view from a queue of keys of earlier batches."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.distributed.gather import gather_keys
from fastmoco.distributed.mesh import group_rank, group_size
from fastmoco.distributed.shuffle import Shuffle, copy_of_first_rank_
from fastmoco.distributed.sync_batch_norm import local_statistics
from fastmoco.models.encoder import Coupling
from fastmoco.models.heads import FORMS, build_head
from fastmoco.objectives.interface import Features, Inputs, Output, Progress
from fastmoco.objectives.key_queue import KeepsKeys, queued_reference, require_whole_batches
from fastmoco.objectives.momentum import Average
from fastmoco.objectives.view_pairs import plain_projection, two_views
from fastmoco.recipes.moco import MoCoConfig
from fastmoco_kernels import queued_info_nce_loss
from fastmoco_pipelines.loading.step_parts import KEY_FORWARD, LOSS, QUERY_FORWARD, part

HEADS = {"linear": FORMS["moco_v1"], "mlp": FORMS["moco_v2"]}


class MoCo(KeepsKeys):
    """An encoder that sees the first view, its momentum encoder that sees the second one, and the
    InfoNCE loss against a queue.

    The queue has the keys of the last batches, of all ranks in their order, and is equal on all of
    them. Keys enter it at the end of a step, so they are never negatives of their own step. It
    starts with random directions. The average moves as in MoCo v3: at the end of a step with the
    momentum of the next one, which is the official order, because the momentum is constant.

    Batch norms of the trunk take the statistics of small groups of neighbouring images, never of
    the global batch: an image whose statistics are shared with its positive can be told by them.
    For the same reason the momentum encoder sees the images of all ranks in a random order. The
    groups are those of the global batch, so any number of ranks that divides `batch_norm_groups`
    has the same losses and weights. Only rank 0's running averages are kept: at the start of a
    step the others take them over. A trunk without batch norms needs none of this, and as nothing else couples
    images, chunks of a batch add up.

    Args:
        build_encoder: called twice; its encoders must have equal shapes, and a free `head`.
        projection_dim: width D of queries and keys.
        hidden_dim: hidden width of an "mlp" head.
        head: "linear" as in v1, or "mlp", two layers, as in v2.
        temperature: > 0, divides the cosines.
        ema_momentum: constant momentum of the average.
        queue: its length K, a multiple of the global batch.
        batch_norm_groups: groups of images of the global batch, a multiple of the number of ranks;
            0: one group per rank.
        seed: of the random order.

    Attributes:
        encoder: the query side; `encoder.head` is its projector.
        momentum_encoder: its average, without gradient.
        queue: [K, D] keys at unit length, float32 or wider.
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
        projection_dim: int = 128,
        hidden_dim: int = 2048,
        head: Literal["linear", "mlp"] = "mlp",
        temperature: float = 0.2,
        ema_momentum: float = 0.999,
        queue: int = 65536,
        batch_norm_groups: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: must be positive")
        self.temperature = temperature
        self.batch_norm_groups = batch_norm_groups
        self.seed = seed
        self.encoder, self.momentum_encoder = build_encoder(), build_encoder()
        for encoder in (self.encoder, self.momentum_encoder):
            encoder.head = build_head(encoder.embed_dim, hidden_dim, projection_dim, HEADS[head])
        self.average = Average(
            self.encoder, self.momentum_encoder, start=ema_momentum, schedule="constant"
        )
        self.coupling: Coupling = self.encoder.coupling
        self.coupling_reason = self.encoder.coupling_reason
        self.make_queue(queue, projection_dim)
        averages = ("running_mean", "running_var")
        if self._groups_images:
            names = (name for name, _ in self.named_buffers() if name.endswith(averages))
            self.per_rank = frozenset(names)

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> MoCo:
        """The objective of a config.

        Raises:
            ValueError: if the queue is no multiple of the global batch, or the batch norms' groups
                do not divide it.
        """
        own = config.objective
        assert isinstance(own, MoCoConfig)  # noqa: S101 - a type: each class is built from its own config
        require_whole_batches(own.queue, config.global_batch_size)
        objective = cls(
            build_encoder,
            projection_dim=config.model.projection_dim,
            hidden_dim=config.model.hidden_dim,
            head=own.head,
            temperature=own.temperature,
            ema_momentum=own.ema_momentum,
            queue=own.queue,
            batch_norm_groups=own.batch_norm_groups,
            seed=config.seed,
        )
        if objective._groups_images:
            groups = objective._groups_here() * group_size()
            if config.global_batch_size % groups:
                raise ValueError(
                    f"objective.batch_norm_groups={own.batch_norm_groups}: {groups} equal groups "
                    f"of images do not divide global_batch_size={config.global_batch_size}; take "
                    "a divisor of it"
                )
            if config.global_batch_size < 2 * groups:
                raise ValueError(
                    f"objective.batch_norm_groups={own.batch_norm_groups}: each of {groups} groups "
                    f"needs 2 images of global_batch_size={config.global_batch_size}; take "
                    f"{max(1, config.global_batch_size // 2)} groups at most, or a larger batch"
                )
        return objective

    def before_step(self, at: Progress) -> None:
        """Batch norms continue with the running averages of rank 0."""
        super().before_step(at)
        if self.per_rank:
            named = dict(self.named_buffers())
            copy_of_first_rank_([named[name] for name in sorted(self.per_rank)])

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """The first view through the encoder, the second one through the momentum encoder: [b, E]
        each.

        Raises:
            ValueError: if the views differ in shape, or are not two.
        """
        view1, view2 = two_views(inputs)
        with part(QUERY_FORWARD), self._statistics():
            online = self.encoder(view1, *inputs.paths_of(0))
        if not target:
            return Features((online,))
        with torch.no_grad(), part(KEY_FORWARD), self._statistics():
            if not self._shuffles():
                return Features((online,), (self.momentum_encoder(view2),))
            order = self.permutation(len(view2) * group_size(), at)
            shuffle = Shuffle(order, view2.device)
            shuffled = self.momentum_encoder(shuffle.there(view2))
            return Features((online,), (shuffle.back(shuffled),))

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """Heads, and the loss against the queue, of any images."""
        with torch.no_grad(), part(KEY_FORWARD):
            keys = self.momentum_encoder.head(features.target[0])
        with part(QUERY_FORWARD):
            queries = self.encoder.head(features.online[0])
        with part(LOSS):
            found = queued_info_nce_loss(
                queries, keys, self.queue, temperature=self.temperature, accuracy=accuracy
            )
        watch = self._watch(queries, keys)
        if (shares := found.shares) is not None:
            watch["accuracy"] = shares
        return Output(found.loss, watch)

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same written out: images of all ranks are gathered to be shuffled, and the loss is
        `CE([u(q) u(k), u(q) queue^T] / temperature, 0)` of whole logits."""
        view1, view2 = two_views(inputs)
        images, rank = len(view2), group_rank()
        own = slice(rank * images, (rank + 1) * images)
        with self._statistics():
            q = plain_projection(self.encoder, view1, *inputs.paths_of(0))

            # Keys, computed in another order and put back.
            with torch.no_grad():
                order = torch.arange(images * group_size(), device=view2.device)
                if self._shuffles():
                    drawn = self.permutation(len(order), at)
                    order = torch.from_numpy(drawn).to(view2.device)
                shuffled = gather_keys(view2)[order][own]
                k = gather_keys(plain_projection(self.momentum_encoder, shuffled))
                k = k[order.argsort()][own]

        loss, shares = queued_reference(q, k, self.queue, self.temperature)
        watch = self._watch(q, k)
        if accuracy:
            watch["accuracy"] = shares
        return Output(loss, watch)

    def permutation(self, images: int, at: Progress) -> np.ndarray:
        """The order in which the momentum encoder sees the images of all ranks in a step: [images]
        int64, a function of the seed and the step. A test may replace it."""
        name = hashlib.sha256(f"shuffle {self.seed} {at.step}".encode()).digest()
        draws = np.random.Philox(key=int.from_bytes(name[:16], "little")).random_raw(images)
        return np.argsort(draws, kind="stable")

    def averages(self) -> Mapping[nn.Parameter, Tensor]:
        """Weights of encoder and projector -> those of the momentum encoder."""
        return self.average.averages()

    def ema_momentum(self, at: Progress) -> float | None:
        """That of the next step; None at the end of the last step, as official runs average before
        a step's keys."""
        return self.average.next_value(at)

    def schedules(self, at: Progress) -> Mapping[str, float]:
        """The momentum that made this step's keys."""
        return {"ema_momentum": self.average.value(at.step, at)}

    def uninformed_loss(self, batch: int) -> float:
        """That of equal logits: ln(K + 1). While the queue is random, the loss of the first steps
        is lower: two views of one image are nearer to each other than to random directions."""
        return math.log(len(self.queue) + 1)

    def _watch(self, queries: Tensor, keys: Tensor) -> dict[str, Tensor]:
        """What telemetry sees; the keys are also kept for the queue."""
        self.push(keys)
        return {
            "queries": queries.detach()[None],
            "keys": keys.detach()[None],
            "queue_fill": self.queue_fill,
        }

    @property
    def _groups_images(self) -> bool:
        """Whether the trunk has batch norms, whose statistics are those of groups."""
        return self.coupling is Coupling.TRUNK

    def _groups_here(self) -> int:
        """Groups of this rank's images.

        Raises:
            ValueError: if a group would have images of several ranks.
        """
        ranks = group_size()
        groups = self.batch_norm_groups or ranks
        if groups % ranks:
            above = -(-groups // ranks) * ranks
            raise ValueError(
                f"objective.batch_norm_groups={groups}: is no multiple of the {ranks} processes, "
                "and batch norms of this objective exchange nothing between processes; take "
                f"{above}, or 0 for one group per process"
            )
        return groups // ranks

    def _shuffles(self) -> bool:
        """Whether there are groups, of which an image could be in another one."""
        return self._groups_images and self._groups_here() * group_size() > 1

    def _statistics(self) -> AbstractContextManager[None]:
        """How the batch norms of a trunk take their statistics."""
        return local_statistics(self._groups_here()) if self._groups_images else nullcontext()
