"""Optimizer state as tensors by parameter name, and its restoration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastmoco.checkpoint.errors import CheckpointError


def flatten_optimizer(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]]
) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `optimizer.<name>.exp_avg`,
    `...exp_avg_sq`, `...step`.

    Hyperparameters (lr, betas, weight decay) are excluded: they belong to the
    config and the schedule.

    Raises:
        CheckpointError: if the optimizer holds a parameter that `named_parameters` lacks, or state
            that is not a tensor.
    """
    names = {id(parameter): name for name, parameter in named_parameters}
    flat: dict[str, Tensor] = {}
    for group, parameter in _parameters(optimizer):
        name = names.get(id(parameter))
        if name is None:
            raise CheckpointError(
                f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that has no "
                "name; "
                "pass the named_parameters() of the module it was built from"
            )
        state = dict(optimizer.state.get(parameter, {}))
        if (
            state and "step" in group
        ):  # apex counts once per group; any other AdamW wants it per parameter
            state.setdefault("step", torch.tensor(float(group["step"])))
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"optimizer state {key!r} of {name} is {type(value).__name__}, not a tensor"
                )
            flat[f"optimizer.{name}.{key}"] = value.detach()
    return flat


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Restore the state of `flatten_optimizer`, so that the next step is bit-identical.

    Args:
        optimizer: newly built over the same parameters; its hyperparameters do not change.
        named_parameters: as for `flatten_optimizer`.
        tensors: entries other than `optimizer.*` are ignored; values are copied
            to the device of each parameter.

    Raises:
        CheckpointError: naming state without a parameter, the two shapes that differ, or a state of
            another dtype.
    """
    saved: dict[str, dict[str, Tensor]] = {}
    for entry, tensor in tensors.items():
        if entry.startswith("optimizer."):
            name, _, key = entry.removeprefix("optimizer.").rpartition(".")
            saved.setdefault(name, {})[key] = tensor

    # Every state needs a parameter. A parameter without a state has had no gradient yet: it was
    # frozen up to the save.
    held = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in named_parameters if id(p) in held}
    if unknown := saved.keys() - named.keys():
        raise CheckpointError(
            f"the optimizer state does not fit the model: without parameter {sorted(unknown)[:5]}"
        )

    kinds = {frozenset(entries) for entries in saved.values()}
    if len(kinds) > 1:
        least = min(saved, key=lambda name: len(saved[name]))
        most = max(saved.values(), key=len)
        raise CheckpointError(
            f"the optimizer state of {least} lacks {sorted(most.keys() - saved[least].keys())}, which "
            "others have"
        )

    # Copy to the devices on which the optimizer expects its state.
    restored: dict[Tensor, dict[str, Tensor]] = {}
    for name, entries in saved.items():
        parameter = named[name]
        state = restored.setdefault(parameter, {})
        for key, tensor in entries.items():
            if key != "step" and tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"optimizer.{name}.{key} has shape {tuple(tensor.shape)}, the parameter has "
                    f"{tuple(parameter.shape)}"
                )
            if key == "step":
                _require_count(f"optimizer.{name}.{key}", tensor)
            elif not tensor.is_floating_point():
                raise CheckpointError(
                    f"optimizer.{name}.{key} is {tensor.dtype}, which no state of an optimizer is"
                )
            group = held[id(parameter)]
            if key == "step" and "step" in group:
                group["step"] = int(tensor)
                continue
            # torch keeps the step count on the host, unless the update itself
            # reads it on the device.
            on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
            state[key] = tensor.to("cpu" if on_host else parameter.device, copy=True)
    optimizer.state.clear()
    optimizer.state.update(restored)


def _require_count(name: str, tensor: Tensor) -> None:
    """Refuse a number of steps that no run has done."""
    value = float(tensor) if tensor.numel() == 1 and not tensor.is_complex() else -1.0
    if not (0 <= value < 2**53 and value == int(value)):
        raise CheckpointError(f"{name} of shape {tuple(tensor.shape)} is no number of steps")


def _parameters(optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], Tensor]]:
    """Every parameter with its group."""
    return [(group, parameter) for group in optimizer.param_groups for parameter in group["params"]]
