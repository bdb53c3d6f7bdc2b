"""Files of FCMAE's code: a ConvNeXt V2 without a final norm, of dense layers as it is published, or of
the sparse ones of a pre-training, which have other names and shapes.

Legend: K side of a convolution, C and C' channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fastmoco.checkpoint import CheckpointError

ENCODER = "encoder."
SIGN = re.compile(r"(encoder\.)?stages\.[0-9]{1,4}\.[0-9]{1,4}\.dwconv\.(kernel|weight)")
LAST = re.compile(r"stages\.([0-9]{1,4})\.([0-9]{1,4})\.pwconv2\.bias")
BESIDE = ("decoder.", "pred.", "proj.", "mask_token")
"""How names of what is no part of the encoder begin."""


def is_of_fcmae(names: Mapping[str, Tensor]) -> bool:
    """Whether these are a ConvNeXt V2 with sparse kernels, behind `encoder.`, or without a norm."""
    blocks = [name for name in names if SIGN.fullmatch(name)]
    odd = any(name.endswith("kernel") or name.startswith(ENCODER) for name in blocks)
    return bool(blocks) and (odd or "norm.weight" not in names)


def dense(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The encoder by the names and shapes of a published one, and what else there is.

    A kernel is [K^2, C, C'], or [K^2, C] of a depthwise convolution; in its first dimension the row
    varies fastest. Biases and the factors of `GRN` have a dimension of 1 in front.

    Args:
        tensors: of the file.
        source: the file, as errors name it.

    Returns:
        The tensors of the encoder, and the names of all others with what they are.

    Raises:
        CheckpointError: if a kernel is of no square, or two tensors have one name.
    """
    found: dict[str, Tensor] = {}
    beside: dict[str, str] = {}
    for name, tensor in tensors.items():
        own = name.removeprefix(ENCODER)
        if own == name and name.startswith(BESIDE):
            beside[name] = "decoder"
            continue
        ours = own.replace(".ln.", ".").replace(".linear.", ".")
        if ours.endswith(".kernel"):
            ours = ours.removesuffix("kernel") + "weight"
            tensor = _convolution(tensor, f"{source}: {name}")
        elif ours.endswith((".grn.gamma", ".grn.beta")):
            tensor = tensor.reshape(1, 1, 1, -1)
        elif ours.endswith(".bias"):
            tensor = tensor.reshape(-1)
        if ours in found:
            raise CheckpointError(
                f"{source}: has two tensors that are {ours}, one of them {name}; save one encoder"
            )
        found[ours] = tensor
    return found, beside


def start_norm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The final norm that an encoder without one begins with, 1 and 0; empty if it has one, or no
    block that shows its width."""
    blocks = [match for name in tensors if (match := LAST.fullmatch(name))]
    if "norm.weight" in tensors or not blocks:
        return {}
    last = max(blocks, key=lambda match: (int(match[1]), int(match[2])))
    width = tensors[last[0]].numel()
    return {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}


def _convolution(kernel: Tensor, named: str) -> Tensor:
    """[K^2, C, C'] -> [C', C, K, K], and [K^2, C] -> [C, 1, K, K]."""
    side = math.isqrt(len(kernel)) if kernel.ndim else 0
    if kernel.ndim not in (2, 3) or side**2 != len(kernel):
        raise CheckpointError(
            f"{named} of shape {tuple(kernel.shape)} is no kernel [K^2, C, C'] or [K^2, C]; copy or "
            "save the file again"
        )
    columns_rows = kernel.reshape(side, side, *kernel.shape[1:])
    if kernel.ndim == 2:
        return columns_rows.permute(2, 1, 0)[:, None].contiguous()
    return columns_rows.permute(3, 2, 1, 0).contiguous()
