"""Launches of the soft cross-entropy: three kernels, whose only tile is how much of a row is read
at a time.

`benchmarks/aot` compiles every tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmoco_kernels.backends import device_guard
from fastmoco_kernels.soft_cross_entropy.blocks import Targets, count_of_pairs, images_of_block
from fastmoco_kernels.soft_cross_entropy.triton_kernels import (
    soft_cross_entropy_gradient_kernel,
    soft_cross_entropy_target_kernel,
    soft_cross_entropy_value_kernel,
)

LOG2_E = 1.4426950408889634
# A logit over the temperature is rounded once, to the same number in every kernel: a fused multiply-add
# in one of them would leave the rounding of 5e4, 0.1 %, in the share of a logit of 5e4.
OPTIONS = {"enable_fp_fusion": False}


class Tile(NamedTuple):
    """One configuration of a kernel."""

    block: int
    warps: int


def tile_of(K: int, Q: int) -> Tile:
    """Eight numbers a thread, and no wider than a row. Four for many targets, or they spill."""
    numbers = 8 if Q <= 2 else 4
    block = min(numbers * 256, max(32, 1 << (K - 1).bit_length()))
    return Tile(block, max(1, min(8, block // (32 * numbers))))


def forward(logits: Tensor, targets: Targets, temperature: float) -> tuple[Tensor, Tensor]:
    """The loss, and [(2 V + Q) B] statistics for `backward`."""
    V, B, _ = logits.shape
    targets, logits = _ready(targets), logits.contiguous()
    with device_guard(logits):
        loss, statistics = _value(logits, targets, temperature)
    return loss.sum() / (count_of_pairs(V, len(targets.values)) * B), statistics


def backward(
    incoming: Tensor,
    logits: Tensor,
    targets: Targets,
    statistics: Tensor,
    temperature: float,
    gradient: Tensor,
) -> Tensor:
    """Fill `gradient`, [V, B, K] and contiguous, with that of the logits."""
    V, B, _ = logits.shape
    targets, logits = _ready(targets), logits.contiguous()
    factor = 1 / (count_of_pairs(V, len(targets.values)) * B)
    with device_guard(logits):
        _gradient(logits, targets, statistics, temperature, gradient, factor, incoming)
    return gradient


def of_rows(
    rows: Tensor,
    weight: Tensor,
    targets: Targets,
    *,
    temperature: float,
    row_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `blocks.of_rows`: products by torch, in the dtype of the rows, and kernels in between."""
    V, B, D = rows.shape
    K, device = len(weight), rows.device
    narrow = weight.to(rows.dtype)
    drows = rows.new_empty((V, B, D) if row_gradient else (0,), dtype=torch.float32)
    shape = (K, D) if weight_gradient else (0,)
    dweight = torch.zeros(shape, dtype=torch.float32, device=device)
    pairs = count_of_pairs(V, len(targets.values))
    total = torch.zeros((), dtype=torch.float32, device=device)

    size = min(B, images_of_block(device, V * K * rows.dtype.itemsize, multiplied=True))
    block = torch.empty((V * size, K), dtype=rows.dtype, device=device)
    for first in range(0, B, size):
        images = slice(first, first + size)
        x = rows[:, images].reshape(-1, D)
        logits = torch.mm(x, narrow.T, out=block[: len(x)])
        views, own = logits.view(V, -1, K), _ready(targets.of(images))
        with device_guard(rows):
            loss, statistics = _value(views, own, temperature)
            total += loss.sum()
            if not (row_gradient or weight_gradient):
                continue
            # Not divided by the number of images yet: narrow numbers would lose digits.
            _gradient(views, own, statistics, temperature, views, 1.0)
        if row_gradient:
            drows[:, images] = (logits @ narrow).view(V, -1, D)
        if weight_gradient:
            dweight += logits.T @ x
    return total / (pairs * B), drows.div_(pairs * B), dweight.div_(pairs * B)


def _ready(targets: Targets) -> Targets:
    centre = targets.centre
    return targets._replace(
        values=targets.values.contiguous(),
        centre=None if centre is None else centre.contiguous(),
    )


def _value(logits: Tensor, targets: Targets, temperature: float) -> tuple[Tensor, Tensor]:
    """[V B] losses, and the statistics."""
    V, B, K = logits.shape
    Q = len(targets.values)
    tile = tile_of(K, Q)
    statistics = torch.empty((2 * V + Q) * B, dtype=torch.float32, device=logits.device)
    lse, mass, target_lse = torch.split(statistics, [V * B, V * B, Q * B])
    loss = torch.empty(V * B, dtype=torch.float32, device=logits.device)
    arguments, constants = _of_targets(targets, logits)
    if targets.temperature is not None:
        soft_cross_entropy_target_kernel[(Q * B,)](
            *arguments,
            target_lse,
            K,
            LOG2_E / targets.temperature,
            CENTRED=constants["CENTRED"],
            BLOCK=tile.block,
            num_warps=tile.warps,
            **OPTIONS,
        )
    soft_cross_entropy_value_kernel[(V * B,)](
        logits,
        *arguments,
        target_lse,
        lse,
        mass,
        loss,
        B,
        K,
        LOG2_E / temperature,
        LOG2_E / (targets.temperature or 1.0),
        **constants,
        BLOCK=tile.block,
        num_warps=tile.warps,
        **OPTIONS,
    )
    return loss, statistics


def _gradient(
    logits: Tensor,
    targets: Targets,
    statistics: Tensor,
    temperature: float,
    gradient: Tensor,
    factor: float,
    incoming: Tensor | None = None,
) -> None:
    V, B, K = logits.shape
    Q = len(targets.values)
    tile = tile_of(K, Q)
    lse, mass, target_lse = torch.split(statistics, [V * B, V * B, Q * B])
    arguments, constants = _of_targets(targets, logits)
    soft_cross_entropy_gradient_kernel[(V * B, -(-K // tile.block))](
        logits,
        *arguments,
        target_lse,
        lse,
        mass,
        lse if incoming is None else incoming,
        gradient,
        B,
        K,
        LOG2_E / temperature,
        LOG2_E / (targets.temperature or 1.0),
        factor / temperature,
        **constants,
        INCOMING=incoming is not None,
        BLOCK=tile.block,
        num_warps=tile.warps,
        **OPTIONS,
    )


def _of_targets(targets: Targets, unused: Tensor) -> tuple[tuple[Tensor, Tensor], dict[str, Any]]:
    """Arguments that are about the targets; `unused` replaces a centre that is not there."""
    centre = unused if targets.centre is None else targets.centre
    return (targets.values, centre), {
        "SOFTMAX": targets.temperature is not None,
        "CENTRED": targets.centre is not None,
        "Q": len(targets.values),
    }
