"""What objectives that predict masked patches share: the masked view, targets, loss, telemetry.

Legend: B images, L patches (row by row), P = 3 p^2 numbers of a patch of p pixels per side.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastmoco.config import Config
from fastmoco.models.encoder import Coupling
from fastmoco.models.masks import PatchMasks
from fastmoco.models.vit import VisionTransformer
from fastmoco.objectives.interface import (
    Features,
    Inputs,
    Objective,
    Output,
    ParameterGroup,
    Progress,
)
from fastmoco.optim.groups import decaying_matrices
from fastmoco_pipelines.loading.step_parts import LOSS, part

FLOOR = 1e-6
"""Added to the variance of a patch."""


class MaskedObjective(Objective):
    """An objective that predicts what patches hide, with one number per image as its loss.

    Views stay in float32 in a run in bf16, because the targets are made of them.

    Attributes:
        masks: draws the patches that stay.
    """

    view_count: int = 1
    exact_views = True
    masks: PatchMasks

    def compare(self, features: Features, at: Progress, *, accuracy: bool = False) -> Output:
        """The mean over images."""
        with part(LOSS):
            loss = features.online[0].mean()
        figures, queries = features.target
        return Output(loss, watched(figures, queries))

    def parameter_group(self, name: str, parameter: nn.Parameter) -> ParameterGroup:
        """Biases and tensors of one dimension do not decay; tokens and matrices do."""
        return decaying_matrices(name, parameter)

    @property
    def _patches(self) -> int:
        """L."""
        return self.masks.grid**2

    def _kept(self, views: tuple[Tensor, ...], at: Progress) -> tuple[Tensor, ...]:
        """The patches of the first view that stay, also in evaluation mode."""
        return (self.masks(views[0], step=at.step),)


def require_own_masks(config: Config) -> None:
    """Refuse rules of tokens that have no effect beside an objective's own masks.

    Raises:
        ValueError: with the cure.
    """
    for name, value in (("keep_tokens", "1"), ("patch_schedule", "")):
        if getattr(config.model, name) != value:
            cure = f"leave out --model.{name.replace('_', '-')}"
            raise ValueError(
                f"model.{name}={getattr(config.model, name)!r}: {config.objective.kind} masks "
                f"patches of one size by its own ratio; {cure}, and see --objective.mask-ratio"
            )


def require_vit(encoder: Any, why: str) -> None:
    """Refuse an encoder that is no ViT, or whose images are coupled.

    Args:
        encoder: of an objective that masks patches.
        why: what the objective needs of tokens, as a clause.

    Raises:
        ValueError: with the cure.
    """
    if not isinstance(encoder, VisionTransformer):
        raise ValueError(
            f"model.architecture: must be a ViT, {why}; take --model.architecture vit_base"
        )
    if encoder.coupling is not Coupling.NONE:
        raise ValueError(
            f"model: {encoder.coupling_reason}, so patches that are masked or left out would change "
            "what evaluation sees; take linear patches, e.g. --model.architecture vit_base, and "
            "--model.mlp-norm layer"
        )


def require_pooling(encoder: VisionTransformer, poolings: tuple[str, ...], why: str) -> None:
    """Refuse a ViT whose feature is another one than an objective trains.

    Args:
        encoder: of an objective that masks patches.
        poolings: that fit, the usual one first.
        why: they alone, as a clause.

    Raises:
        ValueError: with the cure.
    """
    if encoder.pooling not in poolings:
        raise ValueError(
            f"model.pooling={encoder.pooling!r}: {why}; take --model.pooling {poolings[0]}"
        )


def require_size(encoder: VisionTransformer, view: Tensor) -> None:
    """Refuse a view that is not of the encoder's own size.

    Raises:
        ValueError: with both shapes.
    """
    size = encoder.image_size
    if view.shape[1:] != (3, size, size):
        raise ValueError(
            f"view shape={tuple(view.shape)}: must be [B, 3, {size}, {size}], because masks and "
            f"decoder are those of image_size={size}"
        )


def masked_view(
    inputs: Inputs, number: int = 0, *, views: int = 1, masks: int = 1
) -> tuple[Tensor, Tensor]:
    """A view, and the patches of it that the encoder sees [B, K].

    Args:
        inputs: views, the first of which have masks.
        number: of the view.
        views: that the objective takes.
        masks: that they have.

    Raises:
        ValueError: if there are not so many views, with their masks.
    """
    if (len(inputs.views), len(inputs.kept)) != (views, masks):
        raise ValueError(
            f"views: {len(inputs.views)}, with masks: {len(inputs.kept)}; this objective takes "
            f"{views}, of which the first {masks} has a mask that `Objective.inputs` draws"
        )
    return inputs.views[number], inputs.kept[number]


def pixel_targets(images: Tensor, side: int, *, normalised: bool) -> Tensor:
    """Pixels of the patches of images [B, 3, H, W], normalised if so: [B, L, P]."""
    patches = pixel_patches(images, side)
    return normalised_patches(patches) if normalised else patches


def pixel_patches(images: Tensor, side: int) -> Tensor:
    """The pixels of each patch, in the order row, column, channel (He et al. 2022, MAE).

    Args:
        images: [B, 3, H, W].
        side: p, which divides H and W.

    Returns:
        [B, L, P], at least float32.
    """
    B, C, H, W = images.shape
    grid = images.view(B, C, H // side, side, W // side, side).permute(0, 2, 4, 3, 5, 1)
    patches = grid.reshape(B, (H // side) * (W // side), side * side * C)
    return patches.to(torch.promote_types(images.dtype, torch.float32))


def normalised_patches(patches: Tensor) -> Tensor:
    """(t - mean) / sqrt(var + 1e-6) of each patch [..., P], with the unbiased variance."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + FLOOR).sqrt()


def masked_mean(values: Tensor, mask: Tensor, count: float) -> Tensor:
    """The sum of the values of masked patches over their number.

    The denominator is given, so that what ranks and chunks compute adds up to the whole batch. With
    equally many masked patches in each image it is their number, and the loss the mean of the
    result. Otherwise it is the mean number of an image of the global batch.

    Args:
        values: [B, L], of each patch.
        mask: [B, L] bool, True where masked.
        count: masked patches of an image.

    Returns:
        [B].
    """
    return (values * mask).sum(dim=1) / count


def absolute_errors(predictions: Tensor, targets: Tensor) -> Tensor:
    """The mean absolute difference of each patch: [B, L, P] twice -> [B, L], in the wider dtype."""
    wide = torch.promote_types(predictions.dtype, targets.dtype)
    return (predictions.to(wide) - targets.to(wide)).abs().mean(dim=-1)


def square_errors(predictions: Tensor, targets: Tensor) -> Tensor:
    """The mean squared difference of each patch: [B, L, P] twice -> [B, L], in the wider dtype."""
    wide = torch.promote_types(predictions.dtype, targets.dtype)
    return (predictions.to(wide) - targets.to(wide)).square().mean(dim=-1)


def masked_loss(
    predictions: Tensor, targets: Tensor, mask: Tensor, count: int, *, absolute: bool = False
) -> tuple[Tensor, Tensor]:
    """The loss of each image [B], and its figures [B, 2] without gradient (`figures_of`).

    Args:
        predictions: [B, L, P].
        targets: [B, L, P].
        mask: [B, L] bool, True where masked.
        count: masked patches of an image.
        absolute: whether errors are absolute ones, not squares.
    """
    errors = (absolute_errors if absolute else square_errors)(predictions, targets)
    loss = masked_mean(errors, mask, count)
    found = figures_of(predictions, targets, absolute=absolute)
    figures = [masked_mean(figure, mask, count) for figure in found]
    return loss, torch.stack(figures, dim=1)


def plain_masked_loss(
    predictions: Tensor, targets: Tensor, removed: Tensor, *, absolute: bool = False
) -> tuple[Tensor, Tensor]:
    """Reference of the mean of `masked_loss`: a sum over the batch by a count over the batch.
    `removed`: [B, L], 1 where masked and 0 elsewhere."""
    gaps = predictions - targets
    errors = (gaps.abs() if absolute else gaps**2).mean(dim=2)
    found = figures_of(predictions, targets, absolute=absolute)
    figures = [(f * removed).sum(1) / removed.sum(1) for f in found]
    return (errors * removed).sum() / removed.sum(), torch.stack(figures, dim=1)


@torch.no_grad()
def figures_of(
    predictions: Tensor, targets: Tensor, *, absolute: bool = False
) -> tuple[Tensor, Tensor]:
    """Two figures [B, L] of each patch that show a decoder that predicts no structure.

    The loss of predicting the mean of the patch, which a decoder that learns nothing else comes
    down to; and the deviation of the prediction within the patch, 0 for a flat one.
    """
    flat = (
        absolute_errors(targets.mean(dim=-1, keepdim=True), targets)
        if absolute
        else targets.var(dim=-1, correction=0)
    )
    return flat, predictions.to(targets.dtype).std(dim=-1, correction=0)


def watched(figures: Tensor, rows: Tensor, *, name: str = "features") -> dict[str, Tensor]:
    """What telemetry sees of figures [B, 2] and rows [B, E]: features that no loss reads, unless
    they are `queries`."""
    flat, spread = figures.mean(dim=0).unbind()
    return {name: rows[None], "patch_mean_loss": flat, "prediction_std": spread}
