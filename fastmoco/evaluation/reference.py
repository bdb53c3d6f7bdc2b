"""Weighted kNN by its definition, the whole table of similarities, sorted; and a linear classifier
by torch's own layer and optimizer.

The references for `knn` and `linear`: one process, all similarities at once, one pair at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from fastmoco.evaluation.linear import LinearSettings, Pair


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

    Memory: m * n similarities, m votes for each label that the bank has.
    """
    similar, index = plain_neighbours(bank, queries, k=k, center=center)
    weights = ((similar - similar[:, :1]) / temperature).exp()
    known, numbers = torch.unique(bank_labels, return_inverse=True)  # rising
    votes = weights.new_zeros(len(queries), len(known))
    votes.scatter_add_(1, numbers[index], weights)
    right = (known[votes.argmax(dim=1)] == query_labels).sum()
    return int(right) / len(queries)


def plain_linear(
    features: Tensor, labels: Tensor, classes: int, pair: Pair, settings: LinearSettings
) -> nn.Linear:
    """The classifier of one pair by a layer, a loss and an optimizer of torch, in float64.

    The reference for `linear.train_linear`.

    Args:
        features: [n, E].
        labels: [n] int64.
        classes: C.
        pair: learning rate for 256 images, and weight decay.
        settings: of the training.
    """
    layer = nn.Linear(features.shape[1], classes).double()
    with torch.no_grad():
        layer.weight.copy_(settings.initial_weight(classes, features.shape[1]))
        layer.bias.zero_()
    optimizer = torch.optim.SGD(
        layer.parameters(), lr=0.0, momentum=0.9, weight_decay=pair.weight_decay
    )
    for epoch in range(settings.epochs):
        optimizer.param_groups[0]["lr"] = settings.rate(pair.lr, epoch)
        for index in torch.split(settings.order(len(labels), epoch), settings.batch_size):
            optimizer.zero_grad()
            loss: Any = cross_entropy(layer(features[index].double()), labels[index])
            loss.backward()
            optimizer.step()
    return layer
