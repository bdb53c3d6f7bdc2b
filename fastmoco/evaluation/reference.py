"""Weighted kNN by its definition: the whole table of similarities, sorted.

The reference for `knn`: one process, all similarities at once.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def plain_neighbours(
    bank: Tensor, queries: Tensor, *, k: int, center: bool = False
) -> tuple[Tensor, Tensor]:
    """The k most similar bank rows of each query; among equals, those of the smallest index.

    Args:
        bank: [n, D] features.
        queries: [m, D] features.
        k: neighbours; all n if the bank is smaller.
        center: subtract the bank's mean from both sets first.

    Returns:
        Cosine similarities [m, k], falling, and indices [m, k] int64 of the bank.

    Memory: m * n similarities and indices.
    """
    dtype = torch.float64 if bank.dtype == torch.float64 else torch.float32
    bank_nD, queries_mD = bank.to(dtype), queries.to(bank.device, dtype)
    if center:
        mean_D = bank_nD.mean(dim=0)
        bank_nD, queries_mD = bank_nD - mean_D, queries_mD - mean_D
    similar_mn = normalize(queries_mD, dim=1) @ normalize(bank_nD, dim=1).T
    similar, index = similar_mn.sort(dim=1, descending=True, stable=True)
    return similar[:, :k], index[:, :k]


def plain_knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    center: bool = False,
) -> float:
    """Share of the queries whose class has the largest sum of exp(similarity / temperature) among
    the k nearest; on a tie, the smaller label wins. Arguments as of `knn_accuracy`.

    Memory: m * n similarities, m * classes votes.
    """
    similar, index = plain_neighbours(bank, queries, k=k, center=center)
    weights = ((similar - similar[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(queries), int(bank_labels.max()) + 1)
    votes.scatter_add_(1, bank_labels[index], weights)
    right = (votes.argmax(dim=1) == query_labels).sum()
    return int(right) / len(queries)
