"""What objectives that predict masked patches share: the masked view, targets, loss, telemetry.

Legend: B images, L patches (row by row), P = 3 p^2 numbers of a patch of p pixels per side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco.config import Config
from fastmoco.objectives.interface import Inputs

FLOOR = 1e-6
"""Added to the variance of a patch."""


def require_own_masks(config: Config) -> None:
    """Refuse other rules for tokens beside the masks of an objective.

    Raises:
        ValueError: naming the field.
    """
    for name, value in (("keep_tokens", "1"), ("patch_schedule", "")):
        if getattr(config.model, name) != value:
            cure = f"leave out --model.{name.replace('_', '-')}"
            raise ValueError(
                f"model.{name}={getattr(config.model, name)!r}: {config.objective.kind} masks "
                f"patches of one size by its own ratio; {cure}, and see --objective.mask-ratio"
            )


def masked_view(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The view, and the patches of it that the encoder sees [B, K].

    Raises:
        ValueError: if there is not one view, with its mask.
    """
    if len(inputs.views) != 1 or len(inputs.kept) != 1:
        raise ValueError(
            f"views: {len(inputs.views)}, with masks: {len(inputs.kept)}; this objective takes "
            "one view, whose mask `Objective.inputs` draws"
        )
    return inputs.views[0], inputs.kept[0]


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


def square_errors(predictions: Tensor, targets: Tensor) -> Tensor:
    """The mean squared difference of each patch: [B, L, P] twice -> [B, L], in the wider dtype."""
    wide = torch.promote_types(predictions.dtype, targets.dtype)
    return (predictions.to(wide) - targets.to(wide)).square().mean(dim=-1)


def masked_loss(
    predictions: Tensor, targets: Tensor, mask: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The loss of each image [B], and its figures [B, 2] without gradient (`figures_of`).

    Args:
        predictions: [B, L, P].
        targets: [B, L, P].
        mask: [B, L] bool, True where masked.
        count: masked patches of an image.
    """
    loss = masked_mean(square_errors(predictions, targets), mask, count)
    figures = [masked_mean(figure, mask, count) for figure in figures_of(predictions, targets)]
    return loss, torch.stack(figures, dim=1)


def plain_masked_loss(
    predictions: Tensor, targets: Tensor, removed: Tensor
) -> tuple[Tensor, Tensor]:
    """Reference of the mean of `masked_loss`: a sum over the batch by a count over the batch.
    `removed`: [B, L], 1 where masked and 0 elsewhere."""
    errors = ((predictions - targets) ** 2).mean(dim=2)
    figures = [(f * removed).sum(1) / removed.sum(1) for f in figures_of(predictions, targets)]
    return (errors * removed).sum() / removed.sum(), torch.stack(figures, dim=1)


@torch.no_grad()
def figures_of(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Two figures [B, L] of each patch that show a decoder that predicts no structure.

    The loss of predicting the mean of the patch, which a decoder that learns nothing else comes
    down to; and the deviation of the prediction within the patch, 0 for a flat one.
    """
    flat = targets.var(dim=-1, correction=0)
    return flat, predictions.to(targets.dtype).std(dim=-1, correction=0)


def watched(figures: Tensor, queries: Tensor) -> dict[str, Tensor]:
    """What telemetry sees of figures [B, 2] and features [B, E]."""
    flat, spread = figures.mean(dim=0).unbind()
    return {"queries": queries[None], "patch_mean_loss": flat, "prediction_std": spread}
