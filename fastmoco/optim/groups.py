"""Groups of parameters with a learning rate, a weight decay or a trust ratio of their own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """How learning rate and weight decay of some parameters differ from the config's.

    Parameters with equal `ParameterGroup`s are one group of the optimizer.

    Raises:
        ValueError: for a factor that is negative or not finite.
    """

    lr_scale: float = 1.0
    """Factor on the learning rate."""
    constant_lr: bool = False
    """Whether the learning rate is the peak one in every step, also in the warm-up."""
    weight_decay_scale: float = 1.0
    """Factor on the weight decay; 0: no decay."""
    adapt: bool | None = None
    """LARS: whether decay and trust ratio apply; None: to tensors of two or more dimensions. Other
    optimizers ignore it."""

    def __post_init__(self) -> None:
        for name in ("lr_scale", "weight_decay_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                rule = "must be finite and not negative"
                raise ValueError(f"ParameterGroup: {name}={value}: {rule}")


WHOLE = ParameterGroup()
"""The group of parameters that follow the config."""

GroupOf = Callable[[str, nn.Parameter], ParameterGroup]
"""The group of a parameter, from its name and itself. It must give the same on every rank."""


def whole_group(name: str, parameter: nn.Parameter) -> ParameterGroup:
    """All parameters in one group."""
    return WHOLE


def decaying_matrices(name: str, parameter: nn.Parameter) -> ParameterGroup:
    """Biases and tensors of one dimension do not decay; class tokens, position tables and other
    tensors do, as in the official codes of DINO, MAE and MoBY."""
    plain = parameter.ndim <= 1 or name.endswith(".bias")
    return ParameterGroup(weight_decay_scale=0.0 if plain else 1.0)


def split_groups(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    group_of: GroupOf,
) -> None:
    """Split the one group of a new optimizer. Where all parameters are in `WHOLE`, do nothing.

    The groups are in the order of their first parameters. Each has the numbers of the group that
    was split, but its own weight decay, `lr_scale` and `constant_lr` for `set_learning_rates`, and
    `weight_decay_scale` for `set_weight_decays`.

    Args:
        optimizer: any torch optimizer without state whose groups have a `weight_decay`.
        named_parameters: of the whole objective; frozen ones are ignored.
        group_of: the group of each.
    """
    members: dict[ParameterGroup, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            members.setdefault(group_of(name, parameter), []).append((name, parameter))
    if members.keys() == {WHOLE}:
        return

    # The optimizers of apex take no names, and torch refuses a mix of groups with and without.
    (whole,) = optimizer.param_groups
    named = "param_names" in whole
    shared = {key: value for key, value in whole.items() if key not in ("params", "param_names")}
    optimizer.param_groups.clear()
    for group, own in members.items():
        numbers: dict[str, Any] = {
            "weight_decay": whole["weight_decay"] * group.weight_decay_scale,
            "weight_decay_scale": group.weight_decay_scale,
            "lr_scale": group.lr_scale,
            "constant_lr": group.constant_lr,
        }
        if "adapt" in whole:
            numbers["adapt"] = group.adapt
        params = own if named else [parameter for _, parameter in own]
        optimizer.add_param_group({"params": params, **shared, **numbers})


def set_learning_rates(
    param_groups: Iterable[dict[str, Any]],
    scheduled: float,
    *,
    peak: float,
) -> None:
    """Set the learning rate of each group for one step.

    Args:
        param_groups: of an optimizer, split or not.
        scheduled: the learning rate that the schedule has for the step.
        peak: the highest learning rate of the schedule.
    """
    for group in param_groups:
        rate = peak if group.get("constant_lr", False) else scheduled
        group["lr"] = rate * group.get("lr_scale", 1.0)


def set_weight_decays(param_groups: Iterable[dict[str, Any]], scheduled: float) -> None:
    """Set the weight decay of each group for one step.

    Args:
        param_groups: of an optimizer, split or not.
        scheduled: the weight decay that the schedule has for the step.
    """
    for group in param_groups:
        group["weight_decay"] = scheduled * group.get("weight_decay_scale", 1.0)
