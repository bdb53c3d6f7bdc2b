"""Files of FCMAE's official code, whose encoder is made of sparse layers: the same tensors as those of a
dense ConvNeXt V2, with other names and shapes.

Legend: K side of a convolution, C and C' channels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fastmoco.checkpoint import CheckpointError

SIGN = re.compile(r"(.*\.)?stages\.\d+\.\d+\.dwconv\.kernel")
ENCODER = "encoder."
BESIDE = ("decoder.", "pred.", "proj.", "mask_token")
"""How names of what is no part of the encoder begin."""


def is_sparse(names: Mapping[str, Tensor]) -> bool:
    """Whether some tensor is the kernel of a sparse convolution."""
    return any(SIGN.fullmatch(name) for name in names)


def dense(tensors: Mapping[str, Tensor], source: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The encoder by the names and shapes of a dense one, and what else there is.

    A kernel is [K^2, C, C'], or [K^2, C] of a depthwise convolution; in its first dimension the row
    varies fastest. Biases and the factors of `GRN` have a dimension of 1 in front. There is no final
    norm: it is that of the start, 1 and 0.

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
            raise CheckpointError(f"{source}: has two tensors that are {ours}, one of them {name}")
        found[ours] = tensor

    # Fine-tuning begins with a norm that changes nothing.
    last = [name for name in found if name.endswith(".pwconv2.bias")]
    if last and "norm.weight" not in found:
        width = len(found[max(last, key=_place)])
        found |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    return found, beside


def _convolution(kernel: Tensor, named: str) -> Tensor:
    """[K^2, C, C'] -> [C', C, K, K], and [K^2, C] -> [C, 1, K, K]."""
    side = math.isqrt(len(kernel)) if kernel.ndim else 0
    if kernel.ndim not in (2, 3) or side**2 != len(kernel):
        raise CheckpointError(
            f"{named} of shape {tuple(kernel.shape)} is no kernel [K^2, C, C'] or [K^2, C]"
        )
    columns_rows = kernel.reshape(side, side, *kernel.shape[1:])
    if kernel.ndim == 2:
        return columns_rows.permute(2, 1, 0)[:, None].contiguous()
    return columns_rows.permute(3, 2, 1, 0).contiguous()


def _place(name: str) -> tuple[int, ...]:
    """Stage and block of a name."""
    return tuple(int(number) for number in re.findall(r"\d+", name)[:2])
