"""Put the weights of a file into an encoder: which tensor goes where, and what does not fit.

All or nothing: a tensor of the trunk without a place, or a place without a tensor, is an error that
names it. What is left out on purpose (heads, classifiers, positions that the encoder does not have)
is in the table that `Fit.lines` gives.

Positions of another grid are resampled bicubically (with antialiasing, corners not aligned, in
float32), the class token's row is kept. The fixed sine-cosine table is never resampled: each grid
has its own, and the file's table is compared with the one of its grid.

Tables of relative positions of a Swin with another window are resampled by `resampled_bias`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmoco.checkpoint import CheckpointError
from fastmoco.config.model import NAMES as TRUNK_NAMES
from fastmoco.models.encoder import trunk_of
from fastmoco.models.positions import FIXED_POSITIONS
from fastmoco.models.swin import BIAS_TABLE, resampled_bias, window_of
from fastmoco.models.vit import ARCHITECTURES
from fastmoco.models.weights.foreign import (
    EncoderWeights,
    ViTSizes,
    fixed_positions,
    heads_differ,
    require_heads,
    vit_sizes,
)
from fastmoco.models.weights.names import (
    CLASS_ATTENTION,
    class_rows,
    find_format,
    reads_by_class_attention,
    some,
)

Positions = Literal["sincos", "sincos_columns", "learned", "none", "stored"]
"""Positions of the encoder that is filled: of a config; or "stored", which takes those of the
file."""

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
"""Types of the weights of a file. Any other one is a quantised weight, whose scale is elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How the weights of a file fill an encoder.

    Attributes:
        tensors: for the encoder, by its names.
        matched: names taken as they are.
        resampled: names of positions of another grid, and what was done.
        left: names that keep their start values.
        unused: names of the file that are not used, and what they are.
        notes: further sentences for the user.
    """

    tensors: dict[str, Tensor]
    matched: list[str] = field(default_factory=list)
    resampled: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    unused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def counts(self) -> dict[str, int]:
        """Number of tensors by what was done with them."""
        return {
            "matched": len(self.matched),
            "resampled": len(self.resampled),
            "left at start": len(self.left),
            "not used": len(self.unused),
        }

    def lines(self) -> list[str]:
        """A table for the log: what was done, with how many tensors, and the first names."""
        kinds: dict[str, list[str]] = {}
        for name, what in self.unused.items():
            kinds.setdefault(what, []).append(name)
        unused = [f"{what} ({some(names, 2)})" for what, names in kinds.items()]
        names = {
            "matched": some(self.matched),
            "resampled": some([f"{name} {what}" for name, what in self.resampled.items()]),
            "left at start": some(self.left),
            "not used": some(unused, 6),
        }
        return [
            f"{what:>13} {count:>4}  {names[what]}".rstrip()
            for what, count in self.counts().items()
        ]


def fit_encoder(
    target: Mapping[str, Tensor],
    weights: EncoderWeights,
    *,
    positions: Positions,
    heads: int | None = None,
) -> Fit:
    """Find the tensors that fill an encoder.

    Args:
        target: its state dict with head; tensors may be on the meta device.
        weights: of a file.
        positions: of the encoder.
        heads: its attention heads; None for a trunk without.

    Raises:
        CheckpointError: naming the file, what did not match, and the cure.
    """
    trunk = trunk_of(target)
    fit = Fit(tensors={}, unused=dict(weights.beside))
    fit.left.extend(name for name in target if name not in trunk)
    _require_heads(weights, heads, fit)
    wrong = []

    # Places of the encoder, in its order.
    for name, place in trunk.items():
        if name == "pos_embed":
            _fit_positions(place, trunk, weights, positions, fit)
            continue
        tensor = weights.trunk.get(name)
        if tensor is None and name.endswith("num_batches_tracked"):
            fit.left.append(name)  # older files lack it, and no feature depends on it
        elif tensor is None:
            wrong.append(f"{name} is missing in the file")
        elif name.endswith(BIAS_TABLE) and _is_of_another_window(tensor, place):
            window = window_of(place)
            fit.tensors[name] = resampled_bias(tensor, window)
            fit.resampled[name] = f"(window {window_of(tensor)} to {window}, bicubic)"
        elif tensor.shape != place.shape:
            wrong.append(
                f"{name} has shape {tuple(tensor.shape)} in the file, {tuple(place.shape)} here"
            )
        else:
            fit.tensors[name] = tensor
            fit.matched.append(name)

    # Tensors of the file that have no place.
    for name in weights.trunk:
        if name in trunk:
            continue
        if name in ("pos_embed", "cls_token"):
            fit.unused[name] = "positions" if name == "pos_embed" else "class token"
        elif name.startswith(CLASS_ATTENTION) and "cls_token" not in trunk:
            fit.unused[name] = "class attention"
        else:
            wrong.append(f"{name} has no place here")
    if wrong:
        raise CheckpointError(
            f"{weights.source} ({weights.format}) does not fit: {some(wrong)}. "
            f"{_cure(trunk, weights)}"
        )
    for name, tensor in weights.trunk.items():
        if tensor.dtype not in FLOATS and not name.endswith("num_batches_tracked"):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{weights.source}: {name} is of type {kind}, which is none of a weight here: save "
                "the weights again in float32, not quantised"
            )
    for name, tensor in fit.tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(
                f"{weights.source}: {name} is not finite; take another checkpoint"
            )
    return fit


def resample_positions(positions: Tensor, grid: int, new: int, *, prefix: int) -> Tensor:
    """Positions of a square grid for one of another size; see the docstring of the module.

    Args:
        positions: [1, prefix + grid * grid, E].
        grid: tokens per side.
        new: tokens per side of the result.
        prefix: rows of other tokens in front, which are kept.

    Returns:
        [1, prefix + new * new, E] float32.
    """
    first, rows = positions[:, :prefix].float(), positions[:, prefix:].float()
    picture = rows.reshape(1, grid, grid, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(
        picture, size=(new, new), mode="bicubic", align_corners=False, antialias=True
    )
    return torch.cat([first, resized.permute(0, 2, 3, 1).reshape(1, new * new, -1)], dim=1)


def _is_of_another_window(found: Tensor, place: Tensor) -> bool:
    """Whether a bias table is of the same heads and another window."""
    same = found.dim() == 2 and found.shape[1] == place.shape[1]
    side = math.isqrt(found.shape[0]) if same else 0
    return same and side % 2 == 1 and side**2 == found.shape[0] != place.shape[0]


def _fit_positions(
    place: Tensor,
    trunk: Mapping[str, Tensor],
    weights: EncoderWeights,
    kind: Positions,
    fit: Fit,
) -> None:
    source, found = weights.source, weights.trunk.get("pos_embed")
    if found is None and weights.family != "vit":
        return  # reported with the other tensors
    if found is None:
        raise CheckpointError(
            f"{source} has no positions; give --model.positions none, or another file"
        )
    sizes = weights.sizes()
    grid, prefix = sizes.grid or 0, class_rows(weights.trunk)
    own_prefix = class_rows(trunk)
    own = math.isqrt(place.shape[1] - own_prefix)

    # A fixed table stays, and the file must have been trained with the same one.
    if kind in FIXED_POSITIONS:
        theirs = fixed_positions(found, grid)
        if theirs != kind:
            method = "MAE" if kind == "sincos_columns" else "MoCo v3"
            raise CheckpointError(
                f"{source}: its positions are not the fixed sine-cosine table of {method}, which "
                f"model.positions={kind} keeps; give --model.positions {theirs or 'learned'} to "
                "take them"
            )
        if grid == own:
            fit.matched.append("pos_embed")
        else:
            fit.resampled["pos_embed"] = (
                f"(fixed sine-cosine, computed for {own} x {own} instead of {grid} x {grid})"
            )
        return
    if place.shape[2] != found.shape[2]:
        return  # the width differs, which is reported with the other tensors
    if prefix and not own_prefix:
        found, prefix = found[:, 1:], 0
    if grid == own and found.shape == place.shape:
        fit.matched.append("pos_embed")
    else:
        found = resample_positions(found, grid, own, prefix=prefix)
        fit.resampled["pos_embed"] = f"({grid} x {grid} to {own} x {own}, bicubic)"
    fit.tensors["pos_embed"] = found


def _require_heads(weights: EncoderWeights, heads: int | None, fit: Fit) -> None:
    if weights.family != "vit" or heads is None:
        return
    if weights.heads is None and heads_differ(weights):
        require_heads(weights)
    if weights.heads is None:
        fit.notes.append(f"{heads} attention heads, as the run has; the file does not show them")
    elif weights.heads != heads:
        raise CheckpointError(
            f"{weights.source} ({weights.format}) is of {weights.heads} attention heads, and the "
            f"encoder of this run has {heads}: the shapes are equal, the features would not be. "
            "Choose another --model.architecture or another file"
        )


def _cure(trunk: Mapping[str, Tensor], weights: EncoderWeights) -> str:
    """What to do about an encoder of another kind or size."""
    known = find_format(trunk)
    of_run = weights.family if known is None else known[0].family
    if of_run != weights.family:
        return (
            f"The file is a {TRUNK_NAMES[weights.family]}, the encoder of the run a "
            f"{TRUNK_NAMES[of_run]}: choose another --model.architecture"
        )
    if of_run == "resnet":
        return "The file is another ResNet: choose --model.architecture resnet18, 34 or 50"
    if of_run != "vit":
        return f"The file is another {TRUNK_NAMES[of_run]}: choose its --model.architecture"
    theirs, ours = weights.sizes(), vit_sizes(trunk, "the run")
    if (theirs.width, theirs.depth, theirs.stem) != (ours.width, ours.depth, ours.stem):
        names = [
            name
            for name, size in ARCHITECTURES.items()
            if (size.width, size.depth, size.stem) == (theirs.width, theirs.depth, theirs.stem)
        ]
        choose = f"--model.architecture {names[0]}" if names else "another --model.architecture"
        return f"The file is {_size(theirs)}, the run's encoder {_size(ours)}: give {choose}"
    if theirs.patch_size != ours.patch_size:
        return (
            f"The file has patches of {theirs.patch_size} pixels, the run of {ours.patch_size}: "
            f"give --model.patch-size {theirs.patch_size}"
        )
    if ("cls_token" in trunk) and reads_by_class_attention(weights.trunk):
        return "Its class token reads the others by class attention: give --model.pooling class_attention"
    if ("cls_token" in trunk) and "cls_token" not in weights.trunk:
        pooling = "norm_mean" if "norm.weight" in weights.trunk else "mean"
        return f"The file has no class token: give --model.pooling {pooling}"
    if reads_by_class_attention(trunk) and not reads_by_class_attention(weights.trunk):
        return "The file has no class attention: give --model.pooling class"
    if "norm.weight" in weights.trunk and "norm.weight" not in trunk:
        return (
            "model.pooling=mean has no final norm, which the file has: "
            "give --model.pooling norm_mean"
        )
    return "Give a file of this architecture, or the options that the file was trained with"


def _size(sizes: ViTSizes) -> str:
    stem = " with a convolutional stem" if sizes.stem == "conv" else ""
    return f"a ViT of width {sizes.width} and {sizes.depth} blocks{stem}"
