"""SupMAE (Liang et al. 2022): MAE, and a branch that learns classes from the patches that are seen.

The branch has a batch norm, so it sees the whole batch. Encoder and decoder go in chunks, of which
the loss of each image and the mean of its tokens stay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastmoco.config import Config
from fastmoco.models.blocks import xavier_
from fastmoco.models.encoder import Coupling
from fastmoco.models.heads import FORMS, build_head
from fastmoco.models.vit import VisionTransformer
from fastmoco.objectives.interface import Features, Inputs, Output, Progress
from fastmoco.objectives.mae import MAE, options_of
from fastmoco.objectives.masked import watched
from fastmoco.recipes.supmae import SupMAEConfig
from fastmoco_pipelines.loading.step_parts import LOSS, QUERY_FORWARD, part


class SupMAE(MAE):
    """MAE with a class branch: the mean of the patch tokens that the encoder saw, after its final
    norm and without the class token, through two linear layers with a batch norm between them.

    The loss is that of MAE and `class_weight` times the cross entropy of the logits over
    `class_temperature`.

    Args:
        build_encoder: as for `MAE`.
        classes: of the labels.
        hidden_dim: hidden width of the branch.
        class_weight: factor on the cross entropy.
        class_temperature: what logits are divided by.
        masked: further arguments of `MAE`.

    Attributes:
        class_head: the branch; its batch norm takes the statistics of all ranks.

    Raises:
        ValueError: as `MAE`, or if there are fewer than 2 classes.
    """

    needs_labels = True

    def __init__(
        self,
        build_encoder: Callable[[], Any],
        *,
        classes: int,
        hidden_dim: int = 3072,
        class_weight: float = 0.01,
        class_temperature: float = 10.0,
        **masked: Any,
    ) -> None:
        super().__init__(build_encoder, **masked)
        if classes < 2:
            raise ValueError(
                f"objective.classes={classes}: must be the number of classes of the training set; "
                "give --objective.classes N"
            )
        self.coupling = Coupling.HEADS
        self.classes = classes
        self.class_weight, self.class_temperature = class_weight, class_temperature
        width = self.encoder.embed_dim
        self.class_head = build_head(width, hidden_dim, classes, FORMS["supmae"]).apply(xavier_)

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> SupMAE:
        """The objective of a config.

        Raises:
            ValueError: if an option has no effect beside the masks.
        """
        own = config.objective
        assert isinstance(own, SupMAEConfig)  # noqa: S101 - a type: each class is built from its own config
        return cls(
            build_encoder,
            classes=own.classes,
            hidden_dim=config.model.hidden_dim,
            class_weight=own.class_weight,
            class_temperature=own.class_temperature,
            **options_of(config, own),
        )

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Online: the loss of MAE of each image [b], and the mean of its tokens [b, E]. Target: as
        `MAE`, and the labels [b].

        Raises:
            ValueError: if labels are missing.
        """
        labels = _labels(inputs)
        loss, latents, figures = self._passed(inputs)
        online = (loss, latents[:, 1:].mean(dim=1))
        if not target:
            return Features(online)
        return Features(online, (figures, latents[:, 0].detach().clone(), labels))

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """The mean loss of MAE over images, and the class branch on the whole batch."""
        (losses, pooled), (figures, queries, labels) = features.online, features.target
        with part(QUERY_FORWARD):
            logits = self.class_head(pooled)
        return self._output(losses.mean(), logits, labels, watched(figures, queries), accuracy)

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """As that of `MAE`, with the branch after it."""
        loss, latents, figures = self._plain(inputs)
        tokens = latents[:, 1:]
        logits = self.class_head(tokens.sum(dim=1) / tokens.shape[1])
        watch = watched(figures, latents[:, 0].detach())
        return self._output(loss, logits, _labels(inputs), watch, accuracy)

    def classifier(self) -> nn.Module:
        """Encoder and branch as one module, on all patches: images [B, 3, H, W] -> logits
        [B, classes]."""
        return Classifier(self.encoder, self.class_head)

    def _output(
        self,
        loss: Tensor,
        logits: Tensor,
        labels: Tensor,
        watch: dict[str, Tensor],
        accuracy: bool,
    ) -> Output:
        """The loss of both parts, and what telemetry sees."""
        with part(LOSS):
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            of_classes = cross_entropy(wide / self.class_temperature, labels)
            total = loss + self.class_weight * of_classes
        watch |= {"reconstruction_loss": loss.detach(), "class_loss": of_classes.detach()}
        if accuracy:
            best = wide.detach().topk(min(5, self.classes), dim=1).indices == labels[:, None]
            shares = best.to(wide.dtype)
            watch |= {"train_top1": shares[:, 0].mean(), "train_top5": shares.sum(1).mean()}
        return Output(total, watch)


class Classifier(nn.Module):
    """Encoder and class branch as one module."""

    def __init__(self, encoder: VisionTransformer, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, 3, H, W]."""
        logits: Tensor = self.head(self.encoder.latents(images)[:, 1:].mean(dim=1))
        return logits


def _labels(inputs: Inputs) -> Tensor:
    if inputs.labels is None:
        raise ValueError(
            "labels=None: SupMAE needs the label of each image; a loader delivers them if "
            "LoaderSpec.classes is set"
        )
    return inputs.labels
