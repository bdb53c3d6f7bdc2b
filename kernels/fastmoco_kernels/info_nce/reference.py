"""InfoNCE from the definition: the reference of the tests.

Legend: B local queries, N keys of all ranks, D projection dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from fastmoco_kernels.backends import accumulation_dtype


def info_nce_reference(
    q_BD: Tensor,
    keys_ND: Tensor,
    *,
    temperature: float | Tensor,
    positive_offset: int,
    scale: float | None = None,
    key_gradients: bool = False,
) -> Tensor:
    """`scale * mean_i(logsumexp_j(s_ij) - s_i,positive)`, `s = u(q) u(keys)^T / temperature`.

    Materialises the [B, N] logits. Differentiable, any number of times, in `q_BD`, in a temperature
    that is a tensor, and with `key_gradients` in `keys_ND`.
    """
    with torch.autocast(q_BD.device.type, enabled=False):
        logits_BN = _cosines(q_BD, keys_ND if key_gradients else keys_ND.detach()) / temperature
        loss = cross_entropy(logits_BN, _positives(q_BD, positive_offset))
        return loss * (2 * temperature if scale is None else scale)


def queued_info_nce_reference(
    q_BD: Tensor,
    k_BD: Tensor,
    queue_KD: Tensor,
    *,
    temperature: float | Tensor,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`scale * mean_i CE([u(q_i) u(k_i), u(q_i) queue^T] / temperature, 0)`, and the ranks.

    Materialises the [B, 1 + K] logits. Differentiable, any number of times, in `q_BD` and in a
    temperature that is a tensor.

    Returns:
        The loss, and [B] int64 the number of rows of the queue at least as similar as the positive.
    """
    with torch.autocast(q_BD.device.type, enabled=False):
        dtype = accumulation_dtype(q_BD)
        q_BD = normalize(q_BD.to(dtype), dim=1, eps=1e-12)
        k_BD = normalize(k_BD.detach().to(dtype), dim=1, eps=1e-12)
        own_B1 = (q_BD * k_BD).sum(1, keepdim=True)
        cosines_BK = q_BD @ queue_KD.detach().to(dtype).T
        logits = torch.cat([own_B1, cosines_BK], dim=1) / temperature
        positives = torch.zeros(len(q_BD), dtype=torch.int64, device=q_BD.device)
        bar_B1 = own_B1 - 64 * torch.finfo(dtype).eps
        return scale * cross_entropy(logits, positives), (cosines_BK >= bar_B1).sum(1)


def positive_ranks_reference(q_BD: Tensor, keys_ND: Tensor, *, positive_offset: int) -> Tensor:
    """[B] int64: number of negatives at least as similar as the positive; 0 if it ranks first.

    Ties are within 64 units in the last place: equal rows must tie in any order of summation.
    """
    with torch.no_grad(), torch.autocast(q_BD.device.type, enabled=False):
        cosines_BN = _cosines(q_BD, keys_ND)
        own_B1 = cosines_BN.gather(1, _positives(q_BD, positive_offset)[:, None])
        return (cosines_BN >= own_B1 - 64 * torch.finfo(cosines_BN.dtype).eps).sum(1) - 1


def _cosines(q_BD: Tensor, keys_ND: Tensor) -> Tensor:
    dtype = accumulation_dtype(q_BD)
    return (
        normalize(q_BD.to(dtype), dim=1, eps=1e-12)
        @ normalize(keys_ND.to(dtype), dim=1, eps=1e-12).T
    )


def _positives(q_BD: Tensor, positive_offset: int) -> Tensor:
    return torch.arange(q_BD.shape[0], device=q_BD.device) + positive_offset
