"""ExtreMA (Wu et al. 2022): from a small part of the patches of one view the encoder predicts what its
moving average makes of all patches of the other view. Several parts that share no patch are one
batch.

Nothing couples images: heads have layer norms, and the loss is a mean over images, so it may be
accumulated over chunks as it is.

Choices where the source says nothing: class attention has no stochastic depth; q, k and v
of the other blocks start as one Xavier matrix, as in MAE, and those of class attention each by
itself; the initial patch projection is that of MAE. The official code also names an InfoNCE loss,
which cannot run, and masks 196 patches alone; here the number of patches is that of the view.

Legend: B images, L patches, n masks of an image, K patches seen under each, E width of the encoder, D
of predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize

from fastmoco.config import Config
from fastmoco.models.blocks import xavier_
from fastmoco.models.class_attention import ClassBlock
from fastmoco.models.encoder import Coupling
from fastmoco.models.heads import FORMS, build_head
from fastmoco.models.masks import disjoint, kept_count, mask_noise
from fastmoco.objectives.interface import (
    Features,
    Inputs,
    Objective,
    Output,
    ParameterGroup,
    Progress,
)
from fastmoco.objectives.mae import initialise_
from fastmoco.objectives.masked import require_own_masks, require_vit
from fastmoco.objectives.momentum import Average
from fastmoco.objectives.view_pairs import by_view, plain_projection, two_views
from fastmoco.optim.groups import decaying_matrices
from fastmoco.recipes.extrema import ExtreMAConfig
from fastmoco_pipelines.loading.step_parts import KEY_FORWARD, LOSS, QUERY_FORWARD, part


class ExtreMA(Objective):
    """An encoder of masked patches with projector and predictor, and its momentum encoder.

    The encoder that trains sees the first view, n times, each time other K patches; the momentum
    encoder sees all patches of the second view, without stochastic depth. The feature of both is a
    class token behind two blocks of class attention. The average moves before the targets, by the
    weights from before the step.

    Args:
        build_encoder: called twice; makes a ViT with `pooling="class_attention"`.
        mask_ratio: share of the patches that a mask hides.
        masks: n; n * K is at most L.
        layer_scale: start value of the factors of the branches of class attention.
        projection_dim: D.
        hidden_dim: hidden width of projector and predictor.
        ema_momentum: momentum of the average at step 0.
        ema_schedule: "cosine" rises to 1 at the end of the run, "constant" stays.
        seed: of the masks.

    Attributes:
        encoder: the online side; `encoder.head` is its projector.
        momentum_encoder: its average, without gradient.
        predictor: online side only.

    Raises:
        ValueError: if the encoder is another one, or a mask would show none of the patches or all,
            or there are not patches enough for all masks.
    """

    evaluated = ExtreMAConfig.evaluated
    view_count = 2

    def __init__(
        self,
        build_encoder: Callable[[], Any],
        *,
        mask_ratio: float = 0.8,
        masks: int = 5,
        layer_scale: float = 0.1,
        projection_dim: int = 256,
        hidden_dim: int = 4096,
        ema_momentum: float = 0.996,
        ema_schedule: Literal["cosine", "constant"] = "cosine",
        seed: int = 0,
    ) -> None:
        super().__init__()
        encoder, momentum_encoder = build_encoder(), build_encoder()
        _require_encoder(encoder)
        self.encoder, self.momentum_encoder = encoder, momentum_encoder
        self.mask_ratio, self.masks, self.seed = mask_ratio, masks, seed
        self.passes = masks
        self.coupling = Coupling.NONE
        self.shown(encoder.image_size)

        # Heads, and the start of the weights.
        initialise_(encoder)
        for block in encoder.blocks_token:
            assert isinstance(block, ClassBlock)  # noqa: S101 - a type: all blocks are of this class
            nn.init.constant_(block.gamma_1, layer_scale)
            nn.init.constant_(block.gamma_2, layer_scale)
        for network in (encoder, momentum_encoder):
            network.head = build_head(
                encoder.embed_dim, hidden_dim, projection_dim, FORMS["extrema_projector"]
            ).apply(xavier_)
        self.predictor = build_head(
            projection_dim, hidden_dim, projection_dim, FORMS["extrema_predictor"]
        ).apply(xavier_)
        self.momentum = Average(
            encoder, momentum_encoder, start=ema_momentum, schedule=ema_schedule
        )

    @classmethod
    def build(cls, config: Config, build_encoder: Callable[[], Any]) -> ExtreMA:
        """The objective of a config.

        Raises:
            ValueError: if an option has no effect beside the masks.
        """
        own = config.objective
        assert isinstance(own, ExtreMAConfig)  # noqa: S101 - a type: each class is built from its own config
        require_own_masks(config)
        return cls(
            build_encoder,
            mask_ratio=own.mask_ratio,
            masks=own.masks,
            layer_scale=own.layer_scale,
            projection_dim=config.model.projection_dim,
            hidden_dim=config.model.hidden_dim,
            ema_momentum=own.ema_momentum,
            ema_schedule=own.ema_schedule,
            seed=config.seed,
        )

    def shown(self, side: int) -> tuple[int, int]:
        """Patches of a view of this many pixels per side, and how many of them each mask shows: L, K.

        Raises:
            ValueError: if K is 0 or L, or the masks need more than L.
        """
        patches = (side // self.encoder.patch_size) ** 2
        kept = kept_count(patches, self.mask_ratio)
        if self.masks * kept > patches:
            raise ValueError(
                f"objective.masks={self.masks}: masks of {kept} patches that share none need "
                f"{self.masks * kept}, and a view of {side} pixels has {patches}; take at most "
                f"{patches // kept}, or a larger --objective.mask-ratio"
            )
        return patches, kept

    def features(self, inputs: Inputs, at: Progress, *, target: bool = True) -> Features:
        """Online: the first view under each mask, [b, n, E]. Target: all of the second view, [b, E].

        The patches of the first view are embedded once.

        Raises:
            ValueError: if the views differ in shape, or are not two, or the masks are not n.
        """
        view1, view2 = two_views(inputs)
        _require_masks(inputs, self.masks)
        with part(QUERY_FORWARD):
            rows = self.encoder(view1, *inputs.paths_of(*range(self.masks)))
        online = (rows.view(self.masks, len(view1), -1).transpose(0, 1),)
        if not target:
            return Features(online)
        with torch.no_grad(), part(KEY_FORWARD):
            return Features(online, (self.momentum_encoder(view2),))

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """Heads and loss of the batch or of a chunk of it. There is no accuracy: nothing is compared
        with other images."""
        with torch.no_grad(), part(KEY_FORWARD):
            targets = self.momentum_encoder.head(features.target[0])
        with part(QUERY_FORWARD):
            predictions = self.predictor(self.encoder.head(by_view(features.online[0])))
        with part(LOSS):
            loss = cosine_loss(predictions, targets)
        return Output(loss, {"queries": predictions.detach(), "keys": targets[None]})

    def reference(self, inputs: Inputs, at: Progress, *, accuracy: bool = False) -> Output:
        """The same with nothing shared: one pass for each mask, whose loss is 2 - 2 cos."""
        view1, view2 = two_views(inputs)
        _require_masks(inputs, self.masks)
        predictions = [
            self.predictor(plain_projection(self.encoder, view1, *inputs.paths_of(number)))
            for number in range(self.masks)
        ]
        with torch.no_grad():
            targets = plain_projection(self.momentum_encoder, view2)
        losses = [(2 - 2 * cosine_similarity(rows, targets, dim=1)).mean() for rows in predictions]
        return Output(
            torch.stack(losses).mean(),
            {"queries": torch.stack(predictions).detach(), "keys": targets[None]},
        )

    def view_flops(self, number: int, side: int, keep: float = 1.0) -> float:
        """FLOPs of a step: forward and backward of the first view under each mask, and a forward of
        the momentum encoder on all patches of the other one."""
        if number:
            return float(self.encoder.forward_flops(side))
        return float(3 * self.masks * self.encoder.forward_flops(side, 1 - self.mask_ratio))

    def averages(self) -> Mapping[nn.Parameter, Tensor]:
        """Weights of encoder and projector -> those of the momentum encoder; a predictor needs
        none."""
        return self.momentum.averages()

    def ema_momentum(self, at: Progress) -> float | None:
        """That of the next step, m(t + 1): the method averages before the targets, with the weights
        from before the step. None at the end of the last step."""
        return self.momentum.next_value(at)

    def schedules(self, at: Progress) -> Mapping[str, float]:
        """The momentum that made this step's targets."""
        return {"ema_momentum": self.momentum.value(at.step, at)}

    def parameter_group(self, name: str, parameter: nn.Parameter) -> ParameterGroup:
        """Biases, tensors of one dimension, class token and positions do not decay."""
        if name in ("encoder.cls_token", "encoder.pos_embed"):
            return ParameterGroup(weight_decay_scale=0.0)
        return decaying_matrices(name, parameter)

    def uninformed_loss(self, batch: int) -> float:
        """That of predictions at right angles to their targets. 0 is no success either: then all
        images may have one feature (`feature_std`)."""
        return 2.0

    def _kept(self, views: tuple[Tensor, ...], at: Progress) -> tuple[Tensor, ...]:
        """The patches of the first view under each mask, also in evaluation mode."""
        view = views[0]
        patches, kept = self.shown(view.shape[-1])
        noise = mask_noise(self.seed, len(view), patches, step=at.step, device=view.device)
        return disjoint(noise, kept, self.masks).unbind()


def cosine_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean over masks and images of |u(q) - u(k)|^2 = 2 - 2 cos, where u(v) = v / max(|v|, 1e-12).

    The difference is taken before it is squared: 2 - 2 cos loses all digits where a prediction is
    almost on its target.

    Args:
        predictions: q, [n, B, D], any floating dtype.
        targets: k, [B, D].

    Returns:
        Scalar, at least float32.
    """
    wide = torch.promote_types(predictions.dtype, torch.float32)
    difference = normalize(predictions.to(wide), dim=-1) - normalize(targets.to(wide), dim=-1)
    return difference.square().sum(dim=-1).mean()


def _require_masks(inputs: Inputs, masks: int) -> None:
    """Refuse inputs without the masks.

    Raises:
        ValueError: naming how many there are.
    """
    if len(inputs.kept) != masks:
        raise ValueError(
            f"masks: {len(inputs.kept)}; this objective takes {masks}, which `Objective.inputs` draws"
        )


def _require_encoder(encoder: Any) -> None:
    """Refuse an encoder whose tokens cannot be left out, whose images are coupled, or without class
    attention.

    Raises:
        ValueError: with the cure.
    """
    require_vit(encoder, "whose patches can be left out")
    if encoder.pooling != "class_attention":
        raise ValueError(
            f"model.pooling={encoder.pooling!r}: the class token reads the patches behind the blocks; "
            "take --model.pooling class_attention"
        )
