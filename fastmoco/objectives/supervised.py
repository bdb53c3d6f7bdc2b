"""Supervised learning: cross entropy of a linear layer on the encoder's feature.

The whole encoder trains (a baseline, fine-tuning), or the linear layer alone on a frozen one (a
linear probe).

Mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) mix neighbours: rows 2i and 2i + 1 of a batch
are partners of each other. The order of the images is random, so neighbours are, too. A step has
one share and one box, drawn from (seed, step) alone. So a step in chunks of whole pairs is the
whole step, and every number of ranks whose batches are even takes the same one. The last image of
an odd batch has no partner and stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from fastmoco.config import Config
from fastmoco.distributed.sync_batch_norm import BatchNorm
from fastmoco.models.convnextv2 import ConvNeXtV2
from fastmoco.models.encoder import family_of
from fastmoco.models.swin import BIAS_TABLE
from fastmoco.objectives.interface import (
    Coupling,
    Features,
    Inputs,
    Objective,
    Output,
    ParameterGroup,
    Progress,
)
from fastmoco.recipes.supervised import SupervisedConfig
from fastmoco_pipelines.loading.step_parts import AUGMENT, LOSS, QUERY_FORWARD, part

MIX_TAG = 0x6D6978
""""mix": second word of the Philox key, so that no other use of the seed shares a stream with
it."""


NORM_EPS = 1e-6
"""Floor of the variance in the norm of a feature."""


class Box(NamedTuple):
    """Rows and columns of an image that come from its partner."""

    top: int
    bottom: int
    left: int
    right: int


class Mix(NamedTuple):
    """How the images of a step are mixed."""

    share: float
    """Of the image itself, in the target, and for mixup in the pixels."""
    box: Box | None
    """Of cutmix; None: mixup."""


class Supervised(Objective):
    """An encoder with a linear layer as its head, and the cross entropy with soft targets.

    Args:
        build_encoder: called once; its encoder must have a free `head`.
        classes: classes of the labels.
        train_from: "head" freezes the encoder, which is then in eval mode.
        label_smoothing: share of a target that is spread evenly over all classes.
        mixup: parameter of the Beta distribution of mixup; 0: none.
        cutmix: that of cutmix; 0: none.
        layer_decay: factor of the learning rate from one layer to the one before it.
        layer_decay_by: layers of a ConvNeXt V2, see `ConvNeXtV2.layers`.
        head_std: deviation of the head's start values: 0.02 as DeiT, 0.01 for a linear probe as
            MoCo, 2e-5 for fine-tuning as MAE. The bias starts at 0.
        feature_norm: whether a batch norm without weight and bias, of all ranks, comes before the
            linear layer, as in MAE's linear probe (there of each process alone).
        seed: of the mixing.

    Attributes:
        encoder: `encoder.head` is the linear layer, after its norm if there is one.
        needs_labels: always.

    Raises:
        ValueError: if there are fewer than 2 classes, or rates decay by the layers of an encoder
            that is neither a ViT nor a ConvNeXt V2.
    """

    view_count = 1
    needs_labels = True

    def __init__(
        self,
        build_encoder: Callable[[], Any],
        *,
        classes: int,
        train_from: Literal["everything", "head"] = "everything",
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        layer_decay: float = 1.0,
        layer_decay_by: Literal["block", "group"] = "block",
        head_std: float = 0.02,
        feature_norm: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if classes < 2:
            raise ValueError(
                f"objective.classes={classes}: must be the number of classes of the training set; "
                "give --objective.classes N"
            )
        self.encoder = build_encoder()
        self.classes = classes
        self.label_smoothing = label_smoothing
        self.mixup, self.cutmix = mixup, cutmix
        self.layer_decay = layer_decay
        self.seed = seed
        self.probes = train_from == "head"
        self.images_together = 2 if mixup or cutmix else 1

        # A frozen trunk normalises by its running statistics, so it couples nothing.
        coupled = self.encoder.coupling is Coupling.TRUNK and not self.probes
        heads = Coupling.HEADS if feature_norm else Coupling.NONE
        self.coupling = Coupling.TRUNK if coupled else heads
        self.coupling_reason = self.encoder.coupling_reason if coupled else ""
        self.trunk_trains = not self.probes
        if self.probes:
            self.encoder.requires_grad_(False)
        linear = nn.Linear(self.encoder.embed_dim, classes)
        nn.init.normal_(linear.weight, std=head_std)
        nn.init.zeros_(linear.bias)
        self.encoder.head = linear
        if feature_norm:
            norm = BatchNorm(self.encoder.embed_dim, eps=NORM_EPS, affine=False)
            self.encoder.head = nn.Sequential(norm, linear)
        self._layers = _layers(self.encoder, layer_decay_by)
        family = family_of(self.encoder)
        if layer_decay != 1 and family not in ("vit", "convnextv2"):
            raise ValueError(
                f"objective.layer_decay={layer_decay}: layers are the blocks of a ViT or a ConvNeXt "
                "V2, and this encoder is none; take --objective.layer-decay 1"
            )
        if layer_decay_by != "block" and family != "convnextv2":
            raise ValueError(
                f"objective.layer_decay_by={layer_decay_by!r}: is for the stages of a ConvNeXt V2; "
                "take --objective.layer-decay-by block"
            )
        self.train()

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> Supervised:
        """The objective of a config.

        Raises:
            ValueError: if an option has no effect, because the encoder is frozen.
        """
        own = config.objective
        assert isinstance(own, SupervisedConfig)  # noqa: S101 - a type: each class is built from its own config
        model, none = config.model, {"drop_path": 0, "keep_tokens": "1", "patch_schedule": ""}
        for name, value in none.items():
            if own.train_from == "head" and getattr(model, name) != value:
                option = f"--model.{name.replace('_', '-')} {value}" if value != "" else "none"
                raise ValueError(
                    f"model.{name}={getattr(model, name)}: has no effect on a frozen encoder, "
                    f"which is in eval mode; take {option}, or --objective.train-from everything"
                )
        return cls(
            build_encoder,
            classes=own.classes,
            train_from=own.train_from,
            label_smoothing=own.label_smoothing,
            mixup=own.mixup,
            cutmix=own.cutmix,
            layer_decay=own.layer_decay,
            layer_decay_by=own.layer_decay_by,
            head_std=own.head_std,
            feature_norm=own.feature_norm,
            seed=config.seed,
        )

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.probes:
            self.encoder.eval()
            self.encoder.head.train(mode)
        return self

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """The encoder's features [b, E] of the mixed images, and their soft targets [b, classes].

        Raises:
            ValueError: if labels are missing, or there is not one view.
        """
        (view,), labels = inputs.views, _labels(inputs)
        mix = self.mix_of(at, view.shape[-1])
        if mix is not None:
            with part(AUGMENT):
                view = mixed(view, mix)
        with part(QUERY_FORWARD), torch.no_grad() if self.probes else nullcontext():
            online = self.encoder(view, *self._paths(inputs))
        if not target:
            return Features((online,))
        wide = torch.promote_types(online.dtype, torch.float32)
        return Features((online,), (self.targets(labels, mix, wide),))

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """The mean of -sum_c t_c log p_c, and how often the class with the largest target is first,
        and among the first five."""
        (targets,) = features.target
        with part(QUERY_FORWARD):
            logits = self.encoder.head(features.online[0]).to(targets.dtype)
        with part(LOSS):
            loss = -(targets * log_softmax(logits, dim=1)).sum(dim=1).mean()
        return Output(loss, self._watch(logits, targets) if accuracy else {})

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same image by image, every block on every token, and by torch's cross entropy with
        the label of each of the two images that are mixed."""
        (view,), labels = inputs.views, _labels(inputs)
        images, others, shares = [], [], []
        mix = self.mix_of(at, view.shape[-1])
        for row in range(len(view)):
            other = row + 1 if row % 2 == 0 else row - 1
            alone = mix is None or other == len(view)
            image = view[row].clone()
            if mix is not None and not alone and mix.box is None:
                image = mix.share * image + (1 - mix.share) * view[other]
            elif mix is not None and mix.box is not None and not alone:
                top, bottom, left, right = mix.box
                image[:, top:bottom, left:right] = view[other, :, top:bottom, left:right]
            images.append(image)
            others.append(labels[row if alone else other])
            shares.append(1.0 if alone or mix is None else mix.share)
        with torch.no_grad() if self.probes else nullcontext():
            rows = self.encoder.plain(torch.stack(images), *self._paths(inputs))
        logits = self.encoder.head(rows)
        share = torch.tensor(shares, dtype=logits.dtype, device=logits.device)
        own, partner = (
            cross_entropy(logits, classes, reduction="none", label_smoothing=self.label_smoothing)
            for classes in (labels, torch.stack(others))
        )
        loss = (share * own + (1 - share) * partner).mean()
        targets = self.targets(labels, mix, logits.dtype)
        return Output(loss, self._watch(logits, targets) if accuracy else {})

    def targets(self, labels: Tensor, mix: Mix | None, dtype: torch.dtype) -> Tensor:
        """Soft targets [b, classes] of images; each row adds up to 1."""
        classes = torch.arange(self.classes, device=labels.device)
        own = (labels[:, None] == classes).to(dtype)
        if mix is not None:
            own = torch.lerp(own[_partners(labels)], own, mix.share)
        return own * (1 - self.label_smoothing) + self.label_smoothing / self.classes

    def mix_of(self, at: Progress, side: int) -> Mix | None:
        """How the images of a step are mixed; None where they are not, as in evaluation.

        Args:
            at: the step.
            side: pixels per side of an image.
        """
        if not (self.training and (self.mixup or self.cutmix)):
            return None
        key = np.array([self.seed, MIX_TAG], dtype=np.uint64)
        counter = np.array([0, 0, at.step, 0], dtype=np.uint64)
        random = np.random.Generator(np.random.Philox(key=key, counter=counter))
        cuts = not self.mixup or (bool(self.cutmix) and random.random() < 0.5)
        alpha = self.cutmix if cuts else self.mixup
        share = float(random.beta(alpha, alpha))
        if not cuts:
            return Mix(share, None)

        # A box around any pixel, cut at the borders; its area decides.
        half = int(side * math.sqrt(1 - share)) // 2
        row, column = random.integers(side, size=2).tolist()
        top, left = max(0, row - half), max(0, column - half)
        bottom, right = min(side, row + half), min(side, column + half)
        area = (bottom - top) * (right - left)
        return Mix(1 - area / side**2, Box(top, bottom, left, right))

    def classifier(self) -> nn.Module:
        """Encoder and head as one module: images [B, 3, H, W] -> logits [B, classes]."""
        return Classifier(self.encoder)

    def parameter_group(self, name: str, parameter: nn.Parameter) -> ParameterGroup:
        """Layer decay as BEiT, MAE and ConvNeXt V2 define it; no weight decay of tensors of one dimension, of
        the class token, of positions, those of a Swin too, and of `GRN`, as the methods' fine-tuning
        has it."""
        depth = max(self._layers.values(), default=0)
        own = name.removeprefix("encoder.")
        layer = depth + 1 if "." in own else 0
        for module, number in self._layers.items():
            if own.startswith(module):
                layer = number
        token_or_position = own in ("cls_token", "pos_embed") or own.endswith(BIAS_TABLE)
        plain = parameter.ndim <= 1 or token_or_position or ".grn." in own
        return ParameterGroup(
            lr_scale=self.layer_decay ** (depth + 1 - layer),
            weight_decay_scale=0.0 if plain else 1.0,
        )

    def uninformed_loss(self, batch: int) -> float:
        """That of equal logits: ln(classes), whatever the targets."""
        return math.log(self.classes)

    def choices(self, at: Progress) -> Hashable:
        """The step, from which follows how images are mixed."""
        return at.step if self.mixup or self.cutmix else None

    def _paths(self, inputs: Inputs) -> tuple[Tensor | None, ...]:
        """Factors of stochastic depth and tokens that stay; none of a frozen encoder, which is in
        eval mode."""
        return () if self.probes else inputs.paths_of(0)

    def _watch(self, logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Training accuracy, of the image with the larger share."""
        logits = logits.detach()
        first = logits.topk(min(5, self.classes), dim=1).indices == targets.argmax(1, keepdim=True)
        shares = first.to(targets.dtype)
        return {"train_top1": shares[:, 0].mean(), "train_top5": shares.sum(1).mean()}


class Classifier(nn.Module):
    """Encoder and head as one module."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, 3, H, W]."""
        logits: Tensor = self.encoder.head(self.encoder(images))
        return logits


def mixed(view: Tensor, mix: Mix) -> Tensor:
    """Images [b, 3, H, W], each mixed with its neighbour."""
    others = view[_partners(view)]
    if mix.box is None:
        return torch.lerp(others, view, mix.share)
    top, bottom, left, right = mix.box
    view = view.clone()
    view[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return view


def _partners(rows: Tensor) -> Tensor:
    """[b]: the row that each row is mixed with; the last of an odd number is its own."""
    return (torch.arange(len(rows), device=rows.device) ^ 1).clamp(max=len(rows) - 1)


def _layers(encoder: Any, by: Literal["block", "group"]) -> dict[str, int]:
    """Layer of the modules of stem and blocks, by the beginning of their parameters' names."""
    if isinstance(encoder, ConvNeXtV2):
        return encoder.layers(by)
    parts = encoder.parts()
    names = {module: f"{name}." for name, module in encoder.named_modules()}
    found = {names[module]: 0 for module in parts.stem.values()}
    return found | {names[block]: i + 1 for i, block in enumerate(parts.blocks)}


def _labels(inputs: Inputs) -> Tensor:
    if inputs.labels is None:
        raise ValueError(
            "labels=None: supervised training needs the label of each image; "
            "a loader delivers them if LoaderSpec.classes is set"
        )
    return inputs.labels
