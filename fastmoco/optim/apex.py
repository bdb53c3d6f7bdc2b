"""AdamW and LAMB of NVIDIA apex, imported only when asked for, and refused where they would be missing or wrong."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from fastmoco.optim.adamw import trainable_parameters

DEVICES = ("cuda",)
"""Where apex has kernels."""
CURE = "Take it from NVIDIA's PyTorch container, or build github.com/NVIDIA/apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"
OTHERWISE = "or leave optim.fused-backend at auto, which needs no apex for adamw and lars; lamb has no other source"


def build_apex(
    name: Literal["adamw", "lamb"],
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float],
    eps: float,
) -> torch.optim.Optimizer:
    """apex's FusedAdam in its AdamW mode, or its FusedLAMB, over all trainable parameters in one group.

    LAMB's clipping of the global gradient norm, which apex has on by default, is off: the trainer decides on clipping.

    Args:
        name: which of the two.
        named_parameters: as ``module.named_parameters()`` gives them; float32, on CUDA, whole on every rank.
        lr: learning rate until the trainer sets the schedule's.
        weight_decay: decoupled decay per unit of learning rate.
        betas: averaging of gradient and squared gradient.
        eps: added to the root of the squared gradient.

    Raises:
        ValueError: if apex is not there or is another project's, or if the parameters are sharded or on another device;
            in a few lines that say why and what to do.
    """
    named = trainable_parameters(named_parameters)
    _require_whole(named)
    _require_apex()
    _require_device(named)
    # apex takes parameters without names; the group gets them back for messages and checkpoints.
    parameters = [parameter for _, parameter in named]
    classes = importlib.import_module("apex.optimizers")
    shared = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adam_w_mode": True}
    optimizer: torch.optim.Optimizer
    if name == "adamw":
        optimizer = classes.FusedAdam(parameters, **shared)
    else:
        optimizer = classes.FusedLAMB(parameters, max_grad_norm=math.inf, **shared)
    for group in optimizer.param_groups:
        group["step"] = 0  # apex counts steps by group, and not before its first: checkpoints want it from the start
    return optimizer


def _require_whole(named: list[tuple[str, nn.Parameter]]) -> None:
    """Refuse shards: LAMB would be silently wrong on them, Adam would fail."""
    for name, parameter in named:
        if hasattr(parameter, "placements"):
            raise ValueError(
                f"fused_backend='apex': {name} is sharded (FSDP2), and apex knows no DTensor.\n"
                "  Handed local shards, its trust ratios would be those of single shards: other step lengths on every rank,\n"
                "  and no error.\n"
                "  Train with DDP or on one process, or leave optim.fused-backend at auto, whose optimizers know shards."
            )


def _require_apex() -> None:
    """Refuse a missing apex, another project of that name, and one built without its kernels. Imports none of them."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        raise ValueError(
            "fused_backend='apex': NVIDIA apex is not installed, and no package index has it: 'apex' there is unrelated.\n"
            f"  {CURE};\n"
            f"  {OTHERWISE}."
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers").exists() or (folder / "optimizers.py").exists() for folder in folders):
        raise ValueError(
            f"fused_backend='apex': the apex in {', '.join(map(str, folders)) or spec.origin} is another project of that\n"
            "  name (the package index has one for the web framework Pyramid): it has no apex.optimizers.\n"
            f"  pip uninstall apex. {CURE};\n"
            f"  {OTHERWISE}."
        )
    if importlib.util.find_spec("amp_C") is None:
        raise ValueError(
            "fused_backend='apex': this apex was built without its CUDA kernels (there is no module amp_C), and its\n"
            "  optimizers refuse to start.\n"
            f"  {CURE};\n"
            f"  {OTHERWISE}."
        )


def _require_device(named: list[tuple[str, nn.Parameter]]) -> None:
    """Refuse what apex's kernels cannot read."""
    for name, parameter in named:
        if parameter.device.type not in DEVICES or parameter.dtype != torch.float32:
            raise ValueError(
                f"fused_backend='apex': {name} is {parameter.dtype} on {parameter.device}; apex's kernels update float32 "
                f"weights on {' or '.join(DEVICES)}.\n"
                f"  Train in bf16 or fp32 on a GPU,\n"
                f"  {OTHERWISE}."
            )
