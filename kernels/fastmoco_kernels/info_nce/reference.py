"""InfoNCE by the book: the oracle of the tests and, for now, the path every device takes.

Legend: B local queries, N keys of all ranks, D projection dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from fastmoco_kernels._runtime import accumulation_dtype


def info_nce_reference(q_BD: Tensor, keys_ND: Tensor, *, temperature: float, positive_offset: int) -> Tensor:
    """``2 * temperature * mean_i(logsumexp_j(s_ij) - s_i,positive)``, ``s = u(q) u(keys)^T / temperature``.

    Materialises the [B, N] logits. Differentiable in ``q_BD`` only.
    """
    dtype = accumulation_dtype(q_BD)
    with torch.autocast(q_BD.device.type, enabled=False):
        q_BD = normalize(q_BD.to(dtype), dim=1, eps=1e-12)
        keys_ND = normalize(keys_ND.detach().to(dtype), dim=1, eps=1e-12)
        logits_BN = q_BD @ keys_ND.T / temperature
        positives = torch.arange(q_BD.shape[0], device=q_BD.device) + positive_offset
        return cross_entropy(logits_BN, positives) * (2 * temperature)
