"""Projector and predictor of MoCo v3: linear layers without bias, each followed by batch norm."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from fastmoco.distributed.sync_batch_norm import BatchNorm


def _head(in_dim: int, hidden_dim: int, out_dim: int, layers: int) -> nn.Sequential:
    for name, value in (("in_dim", in_dim), ("hidden_dim", hidden_dim), ("out_dim", out_dim), ("layers", layers)):
        if value < 1:
            raise ValueError(f"{name}={value}: a head needs at least 1")
    widths = [in_dim] + [hidden_dim] * (layers - 1)
    modules: list[nn.Module] = []
    for before, after in pairwise(widths):
        modules.extend([nn.Linear(before, after, bias=False), BatchNorm(after), nn.ReLU(inplace=True)])
    modules.extend([nn.Linear(widths[-1], out_dim, bias=False), BatchNorm(out_dim, affine=False)])
    return nn.Sequential(*modules)


def projector(in_dim: int, hidden_dim: int, out_dim: int, layers: int = 3) -> nn.Sequential:
    """The head of both encoders: (linear, norm, ReLU) * (layers - 1), linear, norm without affine.

    Its norms see the batch of one view, over all ranks; give it one view, or several stacked.

    Args:
        in_dim: width of the feature.
        hidden_dim: width between the layers.
        out_dim: width of queries and keys.
        layers: number of linear layers; 3 for vision transformers (Chen, Xie, He 2021).

    Returns:
        A module [B, in_dim] -> [B, out_dim], or [V, B, in_dim] -> [V, B, out_dim] for V views;
        torch's default initialisation.

    Raises:
        ValueError: if a number is below 1.
    """
    return _head(in_dim, hidden_dim, out_dim, layers)


def predictor(in_dim: int, hidden_dim: int, out_dim: int, layers: int = 2) -> nn.Sequential:
    """The head of the query side alone, after the projector: built as ``projector`` is, with 2 layers."""
    return _head(in_dim, hidden_dim, out_dim, layers)
