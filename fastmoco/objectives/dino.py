"""DINO (Caron et al. 2021): predict the momentum encoder's distribution of a large crop from all
other crops."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.distributed.agree import total
from fastmoco.distributed.mesh import group_size
from fastmoco.distributed.sync_batch_norm import BatchNorm
from fastmoco.models.blocks import xavier_
from fastmoco.models.encoder import with_heads
from fastmoco.models.vit import VisionTransformer
from fastmoco.objectives.interface import (
    Features,
    Inputs,
    Objective,
    Output,
    ParameterGroup,
    Progress,
)
from fastmoco.objectives.momentum import Momentum
from fastmoco.objectives.view_pairs import by_size, by_view
from fastmoco.optim.groups import decaying_matrices
from fastmoco.recipes.dino import DINOConfig, InitialWeights
from fastmoco_kernels import soft_cross_entropy_of_rows
from fastmoco_pipelines.loading.step_parts import KEY_FORWARD, LOSS, QUERY_FORWARD, part

LARGE = 2
"""The first views of an image, those of full size: the momentum encoder sees them alone."""
INITIAL_STD = 0.02
"""Deviation of the initial weights of linear layers, class token and positions. The official code
cuts that normal distribution at 2, which is nowhere."""


class DINO(Objective):
    """An encoder with a head, and its momentum encoder with another, which sees the two large crops
    and is the one that is evaluated.

    The encoder's outputs of each crop predict the momentum encoder's of the other large crops:
    `softmax((t - centre) / teacher_temperature)`. The centre is a moving average of the raw outputs
    t, over all ranks. Only the centre couples images, and a step reads that of the steps before:
    so micro-batches have losses that add up where the trunk couples no images either.

    Args:
        build_encoder: called twice; its encoders must have equal shapes, and a free `head`.
        projection_dim: width D before the last layer.
        hidden_dim: hidden width of the head.
        prototypes: outputs K of the last layer.
        temperature: > 0, divides the encoder's outputs.
        teacher_temperature: > 0, divides the momentum encoder's, after its warm-up.
        teacher_temperature_start: the same in epoch 0.
        teacher_warmup_epochs: whole epochs from the first temperature to the last.
        center_momentum: weight of the old centre in its average.
        head_norm: whether batch norms are in the head, over all crops of all ranks; then heads and
            loss need the whole batch.
        train_last_norm: whether the lengths of the last layer's rows are trained; else they are 1.
        freeze_last_layer_epochs: first epochs without an update of the last layer.
        initial_weights: "dino": normal with deviation 0.02, in a ViT (`initialise_`) and in the
            head; "xavier": the ViT as it is, the head by the widths of its layers.
        ema_momentum: momentum of the average at step 0.
        ema_schedule: "cosine" rises to 1 at the end of the run, "constant" stays.

    Attributes:
        encoder: the student; `encoder.head` is its head.
        momentum_encoder: its average, without gradient: the teacher.
        center: [1, K], written after each step.
    """

    evaluated = DINOConfig.evaluated
    least_large = LARGE
    center: Tensor

    def __init__(
        self,
        build_encoder: Callable[[], Any],
        *,
        projection_dim: int = 256,
        hidden_dim: int = 2048,
        prototypes: int = 65536,
        temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        teacher_temperature_start: float = 0.04,
        teacher_warmup_epochs: int = 0,
        center_momentum: float = 0.9,
        head_norm: bool = False,
        train_last_norm: bool = False,
        freeze_last_layer_epochs: float = 1.0,
        initial_weights: InitialWeights = "dino",
        ema_momentum: float = 0.996,
        ema_schedule: Literal["cosine", "constant"] = "cosine",
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self._teacher_temperatures = teacher_temperature_start, teacher_temperature
        self._teacher_warmup_epochs = teacher_warmup_epochs
        self._center_momentum = center_momentum
        self._freeze_epochs = freeze_last_layer_epochs
        self._ema: dict[str, Any] = {"start": ema_momentum, "schedule": ema_schedule}
        self.encoder, self.momentum_encoder = build_encoder(), build_encoder()
        self._build_head = partial(
            DINOHead,
            self.encoder.embed_dim,
            hidden_dim,
            projection_dim,
            prototypes,
            norm=head_norm,
            train_norm=train_last_norm,
            initial_weights=initial_weights,
        )
        for encoder in (self.encoder, self.momentum_encoder):
            encoder.head = self._build_head()
            if initial_weights == "dino" and isinstance(encoder, VisionTransformer):
                initialise_(encoder)
        self.momentum = Momentum(self.encoder, self.momentum_encoder, **self._ema)
        self.coupling = with_heads(self.encoder) if head_norm else self.encoder.coupling
        self.coupling_reason = self.encoder.coupling_reason
        self.register_buffer("center", torch.zeros(1, prototypes))
        self._centring = Centring(center_momentum)

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> DINO:
        """The objective of a config."""
        own = config.objective
        assert isinstance(own, DINOConfig)  # noqa: S101 - a type: each class is built from its own config
        return cls(build_encoder, **options_of(config, own))

    def before_step(self, at: Progress) -> None:
        """Forget the sums of a forward that no step has followed."""
        self._centring.forget()

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """All crops through the encoder, [b, V, E], and the large ones through the momentum
        encoder, [b, 2, E]. Neighbours of one size pass as one batch.

        Raises:
            ValueError: if there are fewer than two crops.
        """
        with part(QUERY_FORWARD):
            online = by_size(inputs, self.encoder, least=LARGE)
        if not target:
            return Features((online,))
        with torch.no_grad(), part(KEY_FORWARD):
            return Features((online,), (by_size(large(inputs), self.momentum_encoder),))

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """Heads and loss of the batch or of a chunk of it.

        Args:
            features: class features of all crops, [b, V, E], and of the large ones, [b, 2, E].
            at: the step.
            accuracy: whether to measure entropy of the targets and divergence from them.
        """
        with torch.no_grad(), part(KEY_FORWARD):
            target = self.momentum_encoder.head(by_view(features.target[0]))
            teacher = scores(target.unit, target.weight)
            self._add(teacher)
        with part(QUERY_FORWARD):
            online = self.encoder.head(by_view(features.online[0]))
        with part(LOSS):
            loss = soft_cross_entropy_of_rows(
                online.unit,
                online.weight,
                teacher,
                temperature=self.temperature,
                centre=self.center.to(teacher.dtype),
                target_temperature=self.teacher_temperature(at),
            )
        targets = self.targets(teacher, at) if accuracy else None
        return Output(loss, self._watch(loss, targets, online.projected, target.projected))

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same written out: each pair of a large crop and another crop has its own term."""
        with torch.no_grad():
            target_rows = by_size(large(inputs), self.momentum_encoder.plain)
        rows = by_size(inputs, self.encoder.plain, least=LARGE)
        return self._plain_views(rows, target_rows, at, accuracy)

    def _plain_views(
        self, rows: Tensor, target_rows: Tensor, at: Progress, accuracy: bool
    ) -> Output:
        """Reference of heads and loss, of features [b, V, E] and [b, 2, E]."""
        with torch.no_grad():
            target = self.momentum_encoder.head(target_rows.transpose(0, 1))
            teacher = target.unit @ target.weight.T
            targets = self.targets(teacher, at)
            self._add(teacher)
        online = self.encoder.head(rows.transpose(0, 1))
        terms = [
            -(own * (unit @ online.weight.T / self.temperature).log_softmax(1)).sum(1).mean()
            for q, own in enumerate(targets)
            for v, unit in enumerate(online.unit)
            if v != q
        ]
        loss = torch.stack(terms).mean()
        shown = targets if accuracy else None
        return Output(loss, self._watch(loss, shown, online.projected, target.projected))

    def teacher_temperature(self, at: Progress) -> float:
        """That of a whole epoch: it changes between epochs alone."""
        start, final = self._teacher_temperatures
        epoch, warmup = at.step // at.steps_per_epoch, self._teacher_warmup_epochs
        if epoch >= warmup:
            return final
        return start + (final - start) * epoch / max(1, warmup - 1)

    def targets(self, teacher: Tensor, at: Progress) -> Tensor:
        """Softmax of the centred outputs of the momentum encoder [..., K], at least float32."""
        wide = torch.promote_types(teacher.dtype, torch.float32)
        centred = teacher.to(wide) - self.center.to(wide)
        return centred.div_(self.teacher_temperature(at)).softmax(dim=-1)

    @torch.no_grad()
    def after_step(self, skipped: Tensor | None, at: Progress) -> None:
        """Move the centre towards the mean of the raw outputs, over all chunks and ranks."""
        self._centring.move_(self.center, skipped)

    def averages(self) -> Mapping[nn.Parameter, Tensor]:
        """Weights of encoder and head -> those of the momentum encoder."""
        return self.momentum.averages()

    def ema_momentum(self, at: Progress) -> float:
        """That of the step which ends, m(t): after the last step, too."""
        return self.momentum.value(at.step, at)

    def schedules(self, at: Progress) -> Mapping[str, float]:
        """The momentum of the move that ends this step, and the temperature of the targets."""
        return {
            "ema_momentum": self.ema_momentum(at),
            "teacher_temperature": self.teacher_temperature(at),
        }

    def frozen(self, at: Progress) -> frozenset[str]:
        """The last layer, in the first epochs."""
        if at.epoch >= self._freeze_epochs:
            return frozenset()
        prefix = "encoder.head.last_layer."
        return frozenset(
            prefix + name for name, _ in self.encoder.head.last_layer.named_parameters()
        )

    def parameter_group(self, name: str, parameter: nn.Parameter) -> ParameterGroup:
        """Biases and tensors of one dimension do not decay; class token and positions do."""
        return decaying_matrices(name, parameter)

    def uninformed_loss(self, batch: int) -> float:
        """That of targets and predictions that are alike for all images: ln K."""
        return math.log(self.center.shape[1])

    def _add(self, teacher: Tensor) -> None:
        """Add raw outputs [2, b, K] to the sums of this step."""
        wide = torch.promote_types(teacher.dtype, torch.float32)
        self._centring.add(teacher.sum((0, 1), dtype=wide)[None], teacher.shape[:2].numel())

    @torch.no_grad()
    def _watch(
        self, loss: Tensor, targets: Tensor | None, queries: Tensor, keys: Tensor
    ) -> dict[str, Tensor]:
        """What shows a collapse, which the loss does not.

        `target_entropy` is ln K where targets do not depend on the image, and 0 where one output
        takes all. `target_divergence` is the mean Kullback-Leibler divergence of the predictions
        from the targets: the loss without that entropy. Both cost a pass over the targets.
        """
        watch = {"queries": queries.detach(), "keys": keys}
        watch["center_norm"] = torch.linalg.vector_norm(self.center)
        if targets is not None:
            watch["target_entropy"] = torch.special.entr(targets).sum(-1).mean()
            watch["target_divergence"] = loss.detach() - watch["target_entropy"]
        return watch


def options_of(config: Config, own: DINOConfig) -> dict[str, Any]:
    """The arguments of `DINO`, without its encoder."""
    return {
        "initial_weights": own.initial_weights,
        "projection_dim": config.model.projection_dim,
        "hidden_dim": config.model.hidden_dim,
        "prototypes": own.prototypes,
        "temperature": own.temperature,
        "teacher_temperature": own.teacher_temperature,
        "teacher_temperature_start": own.teacher_temperature_start,
        "teacher_warmup_epochs": own.teacher_warmup_epochs,
        "center_momentum": own.center_momentum,
        "head_norm": own.head_norm,
        "train_last_norm": own.train_last_norm,
        "freeze_last_layer_epochs": own.freeze_last_layer_epochs,
        "ema_momentum": own.ema_momentum,
        "ema_schedule": own.ema_schedule,
    }


class Centring:
    """How a centre follows the mean of the raw outputs of a momentum encoder's head, over all chunks
    and ranks of a step.

    Args:
        momentum: weight of the old centre.
    """

    def __init__(self, momentum: float) -> None:
        self._momentum = momentum
        self.forget()

    def forget(self) -> None:
        """Forget what has been added."""
        self._sums: Tensor | None = None
        self._rows = 0

    def add(self, sums: Tensor, rows: int) -> None:
        """Add outputs of this step.

        Args:
            sums: [1, K], of the outputs.
            rows: how many they are.
        """
        self._sums = sums if self._sums is None else self._sums + sums
        self._rows += rows

    def move_(self, center: Tensor, skipped: Tensor | None) -> None:
        """Move a centre [1, K] to the mean of this step, unless that is skipped, and forget."""
        sums, rows = self._sums, self._rows
        self.forget()
        if sums is None:
            return
        mean = (total(sums) / (rows * group_size())).to(center.dtype)
        moved = self._momentum * center + (1 - self._momentum) * mean
        if skipped is not None:
            moved = torch.where(skipped > 0, center, moved)
        center.copy_(moved)


class HeadRows(NamedTuple):
    """What a head makes of its rows; the outputs are `scores(unit, weight)`, for the loss never
    whole."""

    unit: Tensor
    """[..., D] rows of unit length, at least float32."""
    weight: Tensor
    """[K, D] of the last layer, at least float32."""
    projected: Tensor
    """[..., D] the same rows before they have unit length."""


class DINOHead(nn.Module):
    """Three linear layers with GELU, unit length, and a weight-normalised last layer.

    Its outputs are divided by 0.04 and exponentiated: in bf16 their error would be 10 % and more.
    So the last layer is in float32 also where the run is in bf16.

    Attributes:
        gathers_wide: sharded training gathers the weights in their own dtype, also in a run in
            bf16.
    """

    gathers_wide = True

    def __init__(
        self,
        width: int,
        hidden: int,
        projection: int,
        outputs: int,
        *,
        norm: bool = False,
        train_norm: bool = False,
        initial_weights: InitialWeights = "dino",
    ) -> None:
        super().__init__()
        norms = [[BatchNorm(hidden)] if norm else [] for _ in range(2)]
        self.mlp = nn.Sequential(
            nn.Linear(width, hidden),
            *norms[0],
            nn.GELU(),
            nn.Linear(hidden, hidden),
            *norms[1],
            nn.GELU(),
            nn.Linear(hidden, projection),
        )
        self.mlp.apply(_normal_ if initial_weights == "dino" else xavier_)
        self.last_layer = WeightNormalised(projection, outputs, train_norm=train_norm)

    def forward(self, rows: Tensor) -> HeadRows:
        """Rows [..., E] -> unit rows, and the weight that they are multiplied with."""
        # Flat, so that batch norms have the statistics of all rows together.
        projected = self.mlp(rows.flatten(0, -2)).unflatten(0, rows.shape[:-1])
        wide = torch.promote_types(projected.dtype, torch.float32)
        unit = F.normalize(projected.to(wide), dim=-1, eps=1e-12)
        return HeadRows(unit, self.last_layer().to(wide), projected)


class WeightNormalised(nn.Module):
    """The weight of a linear layer by length and direction of its rows: W = g v / |v|.

    Args:
        width: D.
        outputs: K.
        train_norm: whether the lengths g train; else they stay 1.

    Attributes:
        weight_g: [K, 1] lengths.
        weight_v: [K, D] directions, of any length.
    """

    def __init__(self, width: int, outputs: int, *, train_norm: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(outputs, 1), requires_grad=train_norm)
        self.weight_v = nn.Parameter(torch.empty(outputs, width))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self) -> Tensor:
        """[K, D]."""
        lengths = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        weight: Tensor = self.weight_g / lengths * self.weight_v
        return weight


def scores(unit: Tensor, weight: Tensor) -> Tensor:
    """Outputs [..., K] of unit rows, multiplied in their own dtype, whatever autocast says."""
    with torch.autocast(unit.device.type, enabled=False):
        return F.linear(unit, weight)


@torch.no_grad()
def initialise_(encoder: VisionTransformer) -> None:
    """The initial weights of DINO's ViT: normal with deviation 0.02 and biases 0 in linear layers,
    class token and learned positions; the patch projection as torch starts a convolution."""
    encoder.blocks.apply(_normal_)
    for token in (encoder.cls_token, encoder.pos_embed):
        if token is not None and token.requires_grad:
            nn.init.normal_(token, std=INITIAL_STD)
    for module in encoder.patch_embed.modules():
        if isinstance(module, nn.Conv2d):
            module.reset_parameters()


def _normal_(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=INITIAL_STD)
        nn.init.zeros_(module.bias)


def large(inputs: Inputs) -> Inputs:
    """The large crops alone, for the momentum encoder, which has no stochastic depth.

    Raises:
        ValueError: if they differ in size.
    """
    first, *others = (tuple(view.shape) for view in inputs.views[:LARGE])
    if any(shape != first for shape in others):
        raise ValueError(
            f"views: large crops of shapes {first} and {others[0]}; must be of one size"
        )
    return Inputs(inputs.views[:LARGE])
