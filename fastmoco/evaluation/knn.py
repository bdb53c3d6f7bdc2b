"""Weighted k-nearest-neighbour accuracy: scores frozen features without training."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    center: bool = False,
    chunk: int = 1024,
) -> float:
    """Share of queries that their k most similar bank rows classify correctly.

    A neighbour with cosine similarity s votes with weight exp(s / temperature). The class with the
    largest sum wins; on a tie, the smaller label. Source: Wu et al. 2018 (instance discrimination),
    section 3.4, as DINO uses it.

    Args:
        bank: [n, D] features of labelled images, any floating dtype, any device.
        bank_labels: [n] int64, >= 0.
        queries: [m, D] features to classify, m >= 1.
        query_labels: [m] int64.
        k: neighbours that vote; all n if the bank is smaller.
        temperature: > 0; small values give the nearest neighbours most of the weight.
        center: subtract the bank's mean from both sets first. Helps features with a large common
            part, such as those of an untrained network or raw pixels. Report with which setting a
            figure was measured.
        chunk: queries that are compared at a time.

    Returns:
        Accuracy in [0, 1].

    Raises:
        ValueError: if shapes do not fit, labels are missing, or a number is out of range.

    Numerics: float32 throughout (float64 stays float64); exact search.
    Memory and cost: chunk * n similarities at a time, 2 * m * n * D FLOPs.
    Distributed: none; gather the features first.
    """
    _check(bank, bank_labels, queries, query_labels, k=k, temperature=temperature)
    dtype = torch.float64 if bank.dtype == torch.float64 else torch.float32
    bank_nD = bank.detach().to(dtype)
    queries_mD = queries.detach().to(bank.device, dtype)
    if center:
        mean_D = bank_nD.mean(dim=0)
        bank_nD, queries_mD = bank_nD - mean_D, queries_mD - mean_D
    bank_Dn = normalize(bank_nD, dim=1).T.contiguous()
    queries_mD = normalize(queries_mD, dim=1)
    labels = bank_labels.to(bank.device)
    wanted = query_labels.to(bank.device)
    classes = int(labels.max()) + 1
    k = min(k, len(labels))

    # A chunk of queries at a time, so that the similarities fit into memory.
    right = torch.zeros((), dtype=torch.int64, device=bank.device)
    for start in range(0, len(queries_mD), chunk):
        similar, index = (queries_mD[start : start + chunk] @ bank_Dn).topk(k, dim=1)
        # Relative to the nearest neighbour, so that exp never overflows; the common factor changes
        # no winner.
        weights = ((similar - similar[:, :1]) / temperature).exp()
        votes = torch.zeros(len(similar), classes, dtype=dtype, device=bank.device)
        votes.scatter_add_(1, labels[index], weights)
        right += (votes.argmax(dim=1) == wanted[start : start + chunk]).sum()
    return right.item() / len(queries_mD)


def _check(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int,
    temperature: float,
) -> None:
    if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
        raise ValueError(
            f"bank {tuple(bank.shape)}, queries {tuple(queries.shape)}: needs [n, D] and [m, D]"
        )
    for name, rows, labels in (("bank", bank, bank_labels), ("queries", queries, query_labels)):
        if not len(rows):
            raise ValueError(f"{name}: has no rows")
        if labels.shape != rows.shape[:1]:
            raise ValueError(f"{name}: {len(rows)} rows with labels of shape {tuple(labels.shape)}")
        if int(labels.min()) < 0:
            raise ValueError(
                f"{name}: {int((labels < 0).sum())} of {len(rows)} rows have no label; "
                f"kNN needs a labelled set"
            )
        if not bool(rows.isfinite().all()):
            raise ValueError(f"{name}: features are not finite; the encoder has diverged")
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be positive")
