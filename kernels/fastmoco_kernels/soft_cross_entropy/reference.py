"""Soft-target cross-entropy from the definition: the reference of the tests.

Legend: V views of the student, Q views with targets (the first Q of the V), B images, K outputs of
the head, D width of its rows; R rows and S targets of an image, E width of the targets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmoco_kernels.backends import accumulation_dtype


def probabilities(
    targets_QBK: Tensor,
    centre_K: Tensor | None,
    temperature: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """[Q, B, K] in `dtype`: the targets themselves, or the softmax of a teacher's logits.

    Args:
        targets_QBK: probabilities where `temperature` is None, else logits.
        centre_K: subtracted from the logits.
        temperature: divides the difference.
        dtype: of the result.
    """
    targets = targets_QBK.to(dtype)
    if temperature is None:
        return targets
    if centre_K is not None:
        targets = targets - centre_K.to(dtype)
    shares = torch.softmax(targets / temperature, dim=-1)
    # On a CPU torch's softmax adds one after the other: over 65536 outputs it is off by 1e-5.
    return shares.div_(shares.sum(-1, keepdim=True))


def soft_cross_entropy_reference(
    logits_VBK: Tensor,
    targets_QBK: Tensor,
    *,
    temperature: float,
    centre: Tensor | None = None,
    target_temperature: float | None = None,
) -> Tensor:
    """Mean over pairs (q, v != q) and images of `sum_k -T_q log softmax(logits_v / temperature)`.

    Keeps several tensors of the size of the logits, in float32 or wider. Differentiable any number
    of times in the logits.
    """
    with torch.autocast(logits_VBK.device.type, enabled=False):
        dtype = accumulation_dtype(logits_VBK)
        log_shares = torch.log_softmax(logits_VBK.to(dtype) / temperature, dim=-1)
        targets = probabilities(targets_QBK.detach(), centre, target_temperature, dtype)
        terms = [
            _products(target, log_shares[v]).sum(-1).mean().neg()
            for q, target in enumerate(targets)
            for v in range(len(log_shares))
            if v != q
        ]
        return torch.stack(terms).mean()


def _products(target_BK: Tensor, log_shares_BK: Tensor) -> Tensor:
    """Their products, where nothing times -inf is nothing; NaN stays."""
    nothing = (target_BK == 0) & (log_shares_BK == -math.inf)
    return torch.where(nothing, 0.0, target_BK * log_shares_BK.masked_fill(nothing, 0.0))


def soft_cross_entropy_rows_reference(
    rows_VBD: Tensor,
    weight_KD: Tensor,
    targets_QBK: Tensor,
    *,
    temperature: float,
    centre: Tensor | None = None,
    target_temperature: float | None = None,
) -> Tensor:
    """The same with `logits = rows weight^T`, multiplied in float32 or wider."""
    with torch.autocast(rows_VBD.device.type, enabled=False):
        dtype = accumulation_dtype(rows_VBD)
        return soft_cross_entropy_reference(
            rows_VBD.to(dtype) @ weight_KD.to(dtype).T,
            targets_QBK,
            temperature=temperature,
            centre=centre,
            target_temperature=target_temperature,
        )


def soft_cross_entropy_pairs_reference(
    rows_BRD: Tensor,
    weight_KD: Tensor,
    target_rows_BSE: Tensor,
    target_weight_KE: Tensor,
    pairs_BRS: Tensor,
    *,
    temperature: float,
    centre: Tensor | None,
    target_temperature: float,
) -> Tensor:
    """Sum over images and pairs of `pairs_rs sum_k -T_sk log softmax(rows_r weight^T /
    temperature)_k`. Keeps all scores of rows and targets several times."""
    with torch.autocast(rows_BRD.device.type, enabled=False):
        dtype = accumulation_dtype(rows_BRD)
        scores = rows_BRD.to(dtype) @ weight_KD.to(dtype).T
        log_shares = torch.log_softmax(scores / temperature, dim=-1)
        teacher = target_rows_BSE.to(dtype) @ target_weight_KE.to(dtype).T
        targets = probabilities(teacher, centre, target_temperature, dtype)
        return -((pairs_BRS.to(dtype) @ targets) * log_shares).sum()
