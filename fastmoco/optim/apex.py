"""AdamW and LAMB of NVIDIA apex: imported only if selected, and refused if missing or unusable."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterable
from itertools import repeat
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fastmoco.optim.adamw import trainable_parameters

DEVICES = ("cuda",)
"""Devices for which apex has kernels."""
CURE = (
    "Use NVIDIA's PyTorch container, or build github.com/NVIDIA/apex with "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1"
)
OTHERWISE = (
    "or use optim.fused-backend auto, which needs no apex for adamw and lars; only apex has lamb"
)


def build_apex(
    name: Literal["adamw", "lamb"],
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """Build apex's FusedAdam in AdamW mode, or its FusedLAMB, over all parameters in one group.

    By default apex's LAMB clips the global gradient norm. This is off here, because the trainer
    clips. Its step overwrites the gradients with the update.

    Args:
        name: "adamw" for FusedAdam, "lamb" for FusedLAMB.
        named_parameters: as from `module.named_parameters()`; float32, on CUDA, not sharded.
        lr: initial learning rate; the trainer sets it in every step.
        weight_decay: decoupled decay per unit of learning rate.
        betas: decay rates of the averages of gradient and squared gradient.
        eps: added to the root of the averaged squared gradient.

    Raises:
        ValueError: if apex is missing or another project, or if the parameters are sharded or on
            another device; a few lines with the reason and the cure.
    """
    named = trainable_parameters(named_parameters)
    _require_whole(named)
    require_apex()
    _require_device(named)

    # apex takes parameters without names.
    parameters = [parameter for _, parameter in named]
    classes = importlib.import_module("apex.optimizers")
    shared = {
        "lr": lr,
        "betas": betas,
        "eps": eps,
        "weight_decay": weight_decay,
        "adam_w_mode": True,
    }
    optimizer: torch.optim.Optimizer
    if name == "adamw":
        optimizer = classes.FusedAdam(parameters, **shared)
        # A step pairs parameters and groups with master weights, which are all None here, and stops
        # at the shorter list. Without end, so that it also reaches groups that are added later.
        optimizer.param_groups_master = repeat({"params": repeat(None)})  # type: ignore[attr-defined]
    else:
        optimizer = classes.FusedLAMB(parameters, max_grad_norm=math.inf, **shared)
    for group in optimizer.param_groups:
        # apex counts steps per group, from its first step on. Checkpoints need the count before.
        group["step"] = 0
    return optimizer


def _require_whole(named: list[tuple[str, nn.Parameter]]) -> None:
    """Refuse sharded parameters: LAMB would be wrong without an error, Adam would fail."""
    for name, parameter in named:
        if hasattr(parameter, "placements"):
            raise ValueError(
                f"fused_backend='apex': {name} is sharded (FSDP2); apex does not support DTensor.\n"
                "  With local shards, its trust ratios would be those of single shards: the steps\n"
                "  would have other lengths on every rank, without an error.\n"
                "  Train with DDP or on one process, or use optim.fused-backend auto, whose\n"
                "  optimizers support shards."
            )


def require_apex() -> None:
    """Refuse a missing apex, another project of that name, and a build without kernels.

    Imports none of them.

    Raises:
        ValueError: a few lines with the reason and the cure.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None:
        raise ValueError(
            "fused_backend='apex': NVIDIA apex is not installed, and no package index has it: "
            "the apex there is unrelated.\n"
            f"  {CURE};\n"
            f"  {OTHERWISE}."
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any(
        (folder / "optimizers").exists() or (folder / "optimizers.py").exists()
        for folder in folders
    ):
        raise ValueError(
            f"fused_backend='apex': the apex in {', '.join(map(str, folders)) or spec.origin} "
            "is another project of that\n"
            "  name (such as that for the web framework Pyramid): it has no apex.optimizers.\n"
            f"  pip uninstall apex. {CURE};\n"
            f"  {OTHERWISE}."
        )
    if importlib.util.find_spec("amp_C") is None:
        raise ValueError(
            "fused_backend='apex': "
            "this apex was built without its CUDA kernels (there is no module amp_C),\n"
            "  so its optimizers cannot run.\n"
            f"  {CURE};\n"
            f"  {OTHERWISE}."
        )


def _require_device(named: list[tuple[str, nn.Parameter]]) -> None:
    """Refuse devices and dtypes that apex's kernels do not support."""
    for name, parameter in named:
        if parameter.device.type not in DEVICES or parameter.dtype != torch.float32:
            raise ValueError(
                f"fused_backend='apex': {name} is {parameter.dtype} on {parameter.device}; "
                f"apex's kernels update float32 weights on {' or '.join(DEVICES)}.\n"
                "  Train in bf16 or fp32 on a GPU,\n"
                f"  {OTHERWISE}."
            )
