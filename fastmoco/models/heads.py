"""Projectors and predictors of several methods: linear layers with batch norms between them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import nn

from fastmoco.distributed.sync_batch_norm import BatchNorm
from fastmoco.models.encoder import Family


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadForm:
    """The layers of a head: (linear, norm, ReLU) * (layers - 1), linear, optionally a last norm
    without bias."""

    layers: int
    """Linear layers."""
    bias: bool = False
    """Whether the linear layers before a norm have a bias."""
    last_bias: bool = False
    """Whether the last linear layer has one."""
    last_norm: bool = True
    """Whether a batch norm without bias ends the head."""
    last_norm_weight: bool = False
    """Whether that norm has a weight."""
    norm: bool = True
    """Whether there are batch norms at all; False: neither between the layers nor at the end."""


FORMS = {
    # Chen, Xie, He 2021, for ViT. The BYOL baseline on ViT of SDSSL (Jang et al. 2023) has the same
    # without the last norm.
    "moco_v3_projector": HeadForm(layers=3),
    "moco_v3_predictor": HeadForm(layers=2),
    # The same paper, for ResNet.
    "moco_v3_resnet_projector": HeadForm(layers=2),
    "moco_v3_resnet_predictor": HeadForm(layers=2, last_norm=False),
    # Grill et al. 2020, both for projector and predictor.
    "byol": HeadForm(layers=2, bias=True, last_norm=False),
    # Chen, Kornblith, Swersky, Norouzi, Hinton 2020 (SimCLR v2); 2 layers in the first paper.
    "simclr": HeadForm(layers=3, last_norm_weight=True),
    # Chen, He 2021; the last bias of the projector has no effect before a norm, and is frozen.
    "simsiam_projector": HeadForm(layers=3, last_bias=True),
    "simsiam_predictor": HeadForm(layers=2, last_bias=True, last_norm=False),
    # Caron et al. 2020.
    "swav_projector": HeadForm(layers=2, bias=True, last_bias=True, last_norm=False),
}
"""Forms by name."""


def build_head(in_dim: int, hidden_dim: int, out_dim: int, form: HeadForm) -> nn.Sequential:
    """Build a head.

    Its norms compute statistics per view, over all ranks, for inputs [B, in_dim] of one view and
    [V, B, in_dim] of V views. If several views are in one flat batch, statistics are joint.

    Args:
        in_dim: width of the input.
        hidden_dim: width between the layers.
        out_dim: width of the output.
        form: its layers.

    Returns:
        A module [B, in_dim] -> [B, out_dim], or [V, B, in_dim] -> [V, B, out_dim] for V views;
        torch's default initialisation.

    Raises:
        ValueError: if a number is below 1.
    """
    numbers = {
        "in_dim": in_dim,
        "hidden_dim": hidden_dim,
        "out_dim": out_dim,
        "layers": form.layers,
    }
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}={value}: a head needs at least 1")
    widths = [in_dim] + [hidden_dim] * (form.layers - 1)
    modules: list[nn.Module] = []
    for before, after in pairwise(widths):
        norms = [BatchNorm(after)] if form.norm else []
        modules.extend([nn.Linear(before, after, bias=form.bias), *norms, nn.ReLU(inplace=True)])
    modules.append(nn.Linear(widths[-1], out_dim, bias=form.last_bias))
    if form.norm and form.last_norm:
        modules.append(BatchNorm(out_dim, affine=form.last_norm_weight, bias=False))
    return nn.Sequential(*modules)


def moco_v3_forms(family: Family) -> tuple[HeadForm, HeadForm]:
    """Projector and predictor of MoCo v3 on a trunk of this kind."""
    if family == "resnet":
        return FORMS["moco_v3_resnet_projector"], FORMS["moco_v3_resnet_predictor"]
    return FORMS["moco_v3_projector"], FORMS["moco_v3_predictor"]


def projector(in_dim: int, hidden_dim: int, out_dim: int, layers: int = 3) -> nn.Sequential:
    """Build the projector of MoCo v3, for both encoders; 3 layers for vision transformers."""
    return build_head(in_dim, hidden_dim, out_dim, HeadForm(layers=layers))


def predictor(in_dim: int, hidden_dim: int, out_dim: int, layers: int = 2) -> nn.Sequential:
    """Build the predictor of MoCo v3, which only the query side has, after its projector."""
    return build_head(in_dim, hidden_dim, out_dim, HeadForm(layers=layers))
