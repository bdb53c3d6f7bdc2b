"""An encoder from a file of weights of any format."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastmoco.checkpoint import CheckpointError
from fastmoco.config.model import Pooling, Positions
from fastmoco.models.encoder_file import (
    CUSTOM,
    IN_HEADER,
    NAMED,
    Description,
    EncoderDescription,
    NamedDescription,
    SwinDescription,
    Trunk,
    build_with,
)
from fastmoco.models.swin import window_of
from fastmoco.models.vit import ARCHITECTURES
from fastmoco.models.weights.fitting import fit_encoder
from fastmoco.models.weights.foreign import (
    EncoderWeights,
    Normalised,
    Which,
    find_encoder,
    fixed_positions,
    require_heads,
)
from fastmoco.models.weights.names import OF_DINO, reads_by_class_attention
from fastmoco.models.weights.reading import read_weights

FIRST_TABLE = "layers.0.blocks.0.attn.relative_position_bias_table"
EPS_OF_ESVIT = 1e-6
"""What the layer norms of EsViT's Swin add to the variance."""


class ForeignEncoder(NamedTuple):
    """An encoder from a file of weights."""

    encoder: Trunk
    """In eval mode; maps [B, 3, H, W] images to [B, E] features."""
    description: Description
    """Its sizes, and how images are resized, cropped and normalised."""
    weights: EncoderWeights
    """The file: its format, its other networks, notes."""


def load_foreign(
    path: Path,
    which: Which | None = None,
    *,
    heads: int | None = None,
    normalised: Normalised | None = None,
    device: torch.device | str = "cpu",
) -> ForeignEncoder:
    """Load an encoder from a file of weights of another package or of fastmoco (docs/weights.md).

    Args:
        path: a file, or a folder of Hugging Face.
        which: as of `find_encoder`.
        heads: attention heads of a ViT, for a file that does not show them.
        normalised: how its images were normalised, in place of what it states.
        device: of the encoder.

    Raises:
        CheckpointError: naming the file, what is wrong and the cure.
    """
    weights = find_encoder(read_weights(path), which, heads=heads, normalised=normalised)
    description = describe(weights)
    with torch.device("meta"):
        try:
            target = description.build().state_dict()
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(f"{weights.source}: {error}") from error
    fit = fit_encoder(target, weights, positions="stored", heads=description.heads)
    tensors = {name: fit.tensors.get(name, weights.trunk.get(name)) for name in target}
    filled = {
        name: torch.zeros((), dtype=torch.int64) if tensor is None else _whole(tensor)
        for name, tensor in tensors.items()
    }
    encoder = build_with(weights.source, description, filled)
    return ForeignEncoder(encoder.to(device).eval(), description, weights)


def describe(weights: EncoderWeights) -> Description:
    """The description of the encoder of a file.

    Raises:
        CheckpointError: if a ViT's file does not show its number of heads or has no positions, or
            another trunk is none of ours.
    """
    for kind in NAMED:
        if weights.family == kind.family:
            return _describe_named(weights, kind)
    sizes, heads = weights.sizes(), require_heads(weights)
    trunk = weights.trunk
    positions: Positions = "none"
    if sizes.grid is not None:
        positions = fixed_positions(trunk["pos_embed"], sizes.grid) or "learned"
    elif weights.image.size <= 1:
        raise CheckpointError(
            f"{weights.source} has no positions, so the size of its images is unknown; export it "
            "with fastmoco, whose files state it"
        )
    own = (sizes.width, sizes.depth, heads, sizes.stem)
    names = [
        name
        for name, known in ARCHITECTURES.items()
        if (known.width, known.depth, known.heads, known.stem) == own and sizes.mlp_ratio == 4
    ]
    return EncoderDescription(
        architecture=names[0] if names else CUSTOM,
        width=sizes.width,
        depth=sizes.depth,
        heads=heads,
        mlp_ratio=sizes.mlp_ratio,
        stem=sizes.stem,
        patch_size=sizes.patch_size,
        image=weights.image,
        patch_embed_frozen=False,
        pooling=_pooling(trunk, _header(weights)),
        positions=positions,
        mlp_norm="batch" if "blocks.0.norm2.running_mean" in trunk else "layer",
    )


def _header(weights: EncoderWeights) -> Mapping[str, str]:
    """What a file of fastmoco says beside its tensors."""
    found: Mapping[str, str] = weights.facts.get("header", {})
    return found


def _pooling(trunk: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> Pooling:
    """The pooling that needs these tensors; of two that need the same, the one of the header."""
    if reads_by_class_attention(trunk):
        return "class_attention"
    if "cls_token" in trunk:
        return "mean_norm" if header.get("pooling") == IN_HEADER["mean_norm"] else "class"
    return "norm_mean" if "norm.weight" in trunk else "mean"


def _describe_named(weights: EncoderWeights, kind: type[NamedDescription]) -> NamedDescription:
    """The architecture whose tensors have these names and shapes."""
    own = {name: tensor.shape for name, tensor in weights.trunk.items() if not _counts(name)}
    more: dict[str, Any] = {}
    if kind is SwinDescription:
        more["window"] = _window(weights)
        if eps := _header(weights).get("norm_eps"):
            try:
                more["norm_eps"] = float(eps)
            except ValueError as error:
                raise CheckpointError(
                    f"{weights.source}: norm_eps={eps!r} in its header is no number"
                ) from error
        elif weights.format == OF_DINO:
            more["norm_eps"] = EPS_OF_ESVIT
    for name in kind.known:
        description = kind(architecture=name, image=weights.image, **more)
        try:
            with torch.device("meta"):
                target = description.build().state_dict()
        except ValueError:
            continue  # no encoder of this size takes such images
        if own == {key: tensor.shape for key, tensor in target.items() if not _counts(key)}:
            return description
    raise CheckpointError(
        f"{weights.source} ({weights.format}) is none of {', '.join(kind.known)}, which fastmoco "
        "has"
    )


def _window(weights: EncoderWeights) -> int:
    """The window of a Swin, by the first bias table, whose map is the largest.

    Raises:
        CheckpointError: if it has no such shape.
    """
    rows = weights.trunk[FIRST_TABLE].shape[0] if weights.trunk[FIRST_TABLE].ndim else 0
    side = math.isqrt(rows)
    if side**2 != rows or side % 2 == 0:
        raise CheckpointError(f"{weights.source}: {FIRST_TABLE} of {rows} rows is of no window")
    return window_of(weights.trunk[FIRST_TABLE])


def _counts(name: str) -> bool:
    """Whether a tensor is the number of batches of a norm, which older files lack."""
    return name.endswith("num_batches_tracked")


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """In float32 what is stored in fewer bits."""
    narrow = tensor.is_floating_point() and tensor.element_size() < 4
    return tensor.float() if narrow else tensor
