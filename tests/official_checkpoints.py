"""Checkpoints in the format of the official release, made of the names in its description alone:
nothing here asks fastmoco for a name. Values are random."""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

BATCH_NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
STATISTICS = BATCH_NORM[2:]
NETWORKS = ("base_encoder", "momentum_encoder")


@functools.cache
def official_checkpoint(kind: str, **sizes: int) -> dict[str, Any]:
    """`{"epoch", "arch", "state_dict"}` with both encoders and the predictor; not to be changed.

    Args:
        kind: "vit" or "resnet18".
        sizes: of a ViT.
    """
    torch.manual_seed(3)
    state: OrderedDict[str, Tensor] = OrderedDict()
    for network in NETWORKS:
        trunk = official_vit(**sizes) if kind == "vit" else official_resnet18()
        width = sizes.get("width", 384) if kind == "vit" else 512
        projector = _vit_projector(width) if kind == "vit" else _resnet_projector(width)
        for name, tensor in (trunk | projector).items():
            state[f"module.{network}.{name}"] = tensor
    for name, tensor in _predictor(last_norm=kind == "vit").items():
        state[f"module.predictor.{name}"] = tensor
    arch = "vit_small" if kind == "vit" else "resnet18"
    return {"epoch": 300, "arch": arch, "state_dict": state}


def official_vit(
    *,
    width: int = 64,
    depth: int = 2,
    grid: int = 4,
    patch: int = 2,
    positions: Tensor | None = None,
) -> dict[str, Tensor]:
    """The trunk of a ViT, with the table of the description unless `positions` are given."""
    found = {
        "cls_token": torch.randn(1, 1, width),
        "pos_embed": sincos_table(grid, width) if positions is None else positions,
        "patch_embed.proj.weight": torch.randn(width, 3, patch, patch),
        "patch_embed.proj.bias": torch.randn(width),
    }
    for i in range(depth):
        block = f"blocks.{i}"
        found |= _affine(f"{block}.norm1", width)
        found |= _linear(f"{block}.attn.qkv", width, 3 * width)
        found |= _linear(f"{block}.attn.proj", width, width)
        found |= _affine(f"{block}.norm2", width)
        found |= _linear(f"{block}.mlp.fc1", width, 4 * width)
        found |= _linear(f"{block}.mlp.fc2", 4 * width, width)
    return found | _affine("norm", width)


def sincos_table(grid: int, width: int) -> Tensor:
    """[1, 1 + grid * grid, width]: zeros for the class token, then sines and cosines of the row and
    of the column."""
    rows = [torch.zeros(width)]
    w = torch.tensor([10000 ** (-i / (width / 4)) for i in range(width // 4)])
    for r in range(grid):
        rows += [
            torch.cat([(r * w).sin(), (r * w).cos(), (c * w).sin(), (c * w).cos()])
            for c in range(grid)
        ]
    return torch.stack(rows)[None]


def official_resnet18() -> dict[str, Tensor]:
    """The trunk of torchvision's ResNet-18."""
    found = {"conv1.weight": torch.randn(64, 3, 7, 7) / 12} | _batch_norm("bn1", 64)
    before = 64
    for stage, width in enumerate((64, 128, 256, 512), start=1):
        for i in range(2):
            name = f"layer{stage}.{i}"
            for c, inner in ((1, before), (2, width)):
                scale = (9 * inner) ** -0.5
                found[f"{name}.conv{c}.weight"] = torch.randn(width, inner, 3, 3) * scale
                found |= _batch_norm(f"{name}.bn{c}", width)
            if before != width:
                found[f"{name}.downsample.0.weight"] = (
                    torch.randn(width, before, 1, 1) / before**0.5
                )
                found |= _batch_norm(f"{name}.downsample.1", width)
            before = width
    return found


def _vit_projector(width: int) -> dict[str, Tensor]:
    return (
        {"head.0.weight": torch.randn(32, width)}
        | _batch_norm("head.1", 32)
        | {"head.3.weight": torch.randn(32, 32)}
        | _batch_norm("head.4", 32)
        | {"head.6.weight": torch.randn(16, 32)}
        | _batch_norm("head.7", 16, STATISTICS)
    )


def _resnet_projector(width: int) -> dict[str, Tensor]:
    return (
        {"fc.0.weight": torch.randn(32, width)}
        | _batch_norm("fc.1", 32)
        | {"fc.3.weight": torch.randn(16, 32)}
        | _batch_norm("fc.4", 16, STATISTICS)
    )


def _predictor(*, last_norm: bool) -> dict[str, Tensor]:
    found = {"0.weight": torch.randn(32, 16)} | _batch_norm("1", 32)
    found["3.weight"] = torch.randn(16, 32)
    return found | (_batch_norm("4", 16, STATISTICS) if last_norm else {})


def _linear(name: str, width: int, out: int) -> dict[str, Tensor]:
    return {
        f"{name}.weight": torch.randn(out, width) * width**-0.5,
        f"{name}.bias": torch.randn(out) * 0.1,
    }


def _affine(name: str, width: int) -> dict[str, Tensor]:
    return {
        f"{name}.weight": 1 + torch.randn(width) * 0.1,
        f"{name}.bias": torch.randn(width) * 0.1,
    }


def _batch_norm(name: str, width: int, entries: tuple[str, ...] = BATCH_NORM) -> dict[str, Tensor]:
    values = {
        "weight": 1 + torch.randn(width) * 0.1,
        "bias": torch.randn(width) * 0.1,
        "running_mean": torch.randn(width) * 0.1,
        "running_var": 1 + torch.rand(width),
        "num_batches_tracked": torch.tensor(624),
    }
    return {f"{name}.{entry}": values[entry] for entry in entries}
