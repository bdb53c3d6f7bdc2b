"""Projectors and predictors of several methods: linear layers with norms between them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fastmoco.distributed.sync_batch_norm import BatchNorm
from fastmoco.models.blocks import LayerNorm
from fastmoco.models.encoder import Family


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadForm:
    """The layers of a head: (linear, norm, activation) * (layers - 1), linear, optionally a last norm
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
    """Whether there are norms at all; False: neither between the layers nor at the end."""
    layer_norm: bool = False
    """Whether the norms between the layers are layer norms, which couple no images; then none ends
    the head."""
    activation: Literal["relu", "gelu"] = "relu"
    """After each norm; `gelu` is the exact one."""
    eps: float = 1e-5
    """What the norms add to the variance."""


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
    # Liang et al. 2022, the class branch.
    "supmae": HeadForm(layers=2, bias=True, last_bias=True, last_norm=False),
    # Xie et al. 2021 (MoBY), both for projector and predictor.
    "moby": HeadForm(layers=2, bias=True, last_bias=True, last_norm=False),
    # Huang et al. 2023 (CMAE), both for projector and predictor.
    "cmae": HeadForm(layers=2, bias=True, last_norm=False, eps=1e-6),
    # He, Fan, Wu, Xie, Girshick 2020, and Chen, Fan, Girshick, He 2020: no batch norms.
    "moco_v1": HeadForm(layers=1, last_bias=True, norm=False),
    "moco_v2": HeadForm(layers=2, bias=True, last_bias=True, norm=False),
    # Wu et al. 2022 (ExtreMA).
    "extrema_projector": HeadForm(
        layers=3, bias=True, last_bias=True, layer_norm=True, activation="gelu"
    ),
    "extrema_predictor": HeadForm(
        layers=2, bias=True, last_bias=True, layer_norm=True, activation="gelu"
    ),
}
"""Forms by name."""


def build_head(in_dim: int, hidden_dim: int, out_dim: int, form: HeadForm) -> nn.Sequential:
    """Build a head.

    Its batch norms compute statistics per view, over all ranks, for inputs [B, in_dim] of one view
    and [V, B, in_dim] of V views. If several views are in one flat batch, statistics are joint.

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
        norm = LayerNorm(after, eps=form.eps) if form.layer_norm else BatchNorm(after, eps=form.eps)
        activation = nn.ReLU(inplace=True) if form.activation == "relu" else nn.GELU()
        norms = [norm] if form.norm else []
        modules.extend([nn.Linear(before, after, bias=form.bias), *norms, activation])
    modules.append(nn.Linear(widths[-1], out_dim, bias=form.last_bias))
    if form.norm and form.last_norm and not form.layer_norm:
        last = BatchNorm(out_dim, eps=form.eps, affine=form.last_norm_weight, bias=False)
        modules.append(last)
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


class StackedLinear(nn.Module):
    """Several linear layers of one shape, each on its own part of the channels, as one batched
    product.

    Args:
        count: of the layers.
        fan_in: input channels of each.
        fan_out: output channels of each.
        bias: whether they have biases.

    Attributes:
        weight: [count * fan_out, fan_in], one layer after the other; each starts as torch's.
        bias: [count * fan_out] or None.
    """

    bias: nn.Parameter | None

    def __init__(self, count: int, fan_in: int, fan_out: int, *, bias: bool) -> None:
        super().__init__()
        self.count = count
        bound = 1 / math.sqrt(fan_in)
        self.weight = nn.Parameter(torch.empty(count * fan_out, fan_in).uniform_(-bound, bound))
        self.bias = (
            nn.Parameter(torch.empty(count * fan_out).uniform_(-bound, bound)) if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """[..., count * fan_in] -> [..., count * fan_out]."""
        weights = self.weight.view(self.count, -1, self.weight.shape[1])
        rows = x.reshape(-1, self.count, weights.shape[2]).transpose(0, 1)
        out = torch.bmm(rows, weights.transpose(1, 2)).transpose(0, 1)
        out = out.reshape(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


class HeadStack(nn.Sequential):
    """Several heads of one form and size, each on its own part of the channels: all their products
    of a layer are one batched product, and all their statistics one message between ranks.

    Modules are numbered as those of `build_head`, and a tensor holds those of all heads, one after
    the other. `alone` is the reference.

    Args:
        count: of the heads.
        in_dim: input width of each.
        hidden_dim: hidden width of each.
        out_dim: output width of each.
        form: of each.

    Raises:
        ValueError: if a number is below 1, or the form has other norms or activations than batch
            norms and ReLU.
    """

    def __init__(
        self, count: int, in_dim: int, hidden_dim: int, out_dim: int, form: HeadForm
    ) -> None:
        if count < 1:
            raise ValueError(f"count={count}: a stack needs at least 1 head")
        if form.layer_norm or form.activation != "relu":
            raise ValueError(f"form={form}: heads of a stack have batch norms and ReLU")
        with torch.device("meta"):
            one = build_head(in_dim, hidden_dim, out_dim, form)
        super().__init__(*(_stacked(module, count) for module in one))
        self.count = count
        self._one = (in_dim, hidden_dim, out_dim, form)

    def alone(self, number: int, rows: Tensor) -> Tensor:
        """One of the heads by itself, as `build_head` makes it: [B, in] -> [B, out], or with a
        dimension of views before. Every head must be called equally often."""
        with torch.device("meta"):
            head = build_head(*self._one).train(self.training)
        state: dict[str, Tensor] = {}
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if tensor.ndim:
                state[name] = tensor.view(self.count, -1, *tensor.shape[1:])[number]
            else:  # the batches that all of them have seen
                state[name] = tensor.clone() if number else tensor
        out: Tensor = functional_call(head, state, (rows,))
        return out


def _stacked(module: nn.Module, count: int) -> nn.Module:
    """The module of several heads in place of that of one."""
    if isinstance(module, nn.Linear):
        return StackedLinear(
            count, module.in_features, module.out_features, bias=module.bias is not None
        )
    if isinstance(module, BatchNorm):
        return BatchNorm(
            count * module.num_features,
            eps=module.eps,
            affine=module.weight is not None,
            bias=module.bias is not None,
        )
    return nn.ReLU(inplace=True)
