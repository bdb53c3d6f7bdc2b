"""Cached features of a set and of its augmented copies, as the training of classifiers reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoco.evaluation.embed import LabelledRows
from fastmoco.evaluation.feature_cache import FeatureCache
from fastmoco.evaluation.rows import MemoryRows
from fastmoco.training import setup

NORM_EPS = 1e-6
"""Floor of a variance."""


class FeatureTable:
    """Cached features of a set, and of its augmented copies, for training.

    Features that fit into half of the free memory of the device are kept there; of others one copy
    is in the memory of the host at a time.

    Args:
        plain: of the images without augmentation.
        copies: of the same set; epoch e shows copy e modulo their number.
        device: of the computation.

    Attributes:
        labels: [n] int64.
        key: identity of all features.
    """

    def __init__(
        self, plain: FeatureCache, copies: Sequence[FeatureCache], device: torch.device
    ) -> None:
        self._copies = list(copies)
        self._plain, self.labels, self._ids = _loaded(plain)
        if not len(self.labels):
            raise ValueError("no image of the set decodes")
        total = self._plain.nbytes * (1 + len(copies))
        free = setup.half_of_free_memory(device)
        self._keep_all = free is None or total <= free
        self._device = device if self._keep_all else torch.device("cpu")
        self._plain = self._plain.to(self._device)
        self._loaded: dict[int, Tensor] = {}
        self._norm: tuple[Tensor, Tensor] | None = None  # variance and mean
        self.key = "+".join(cache.path.name for cache in (plain, *copies))

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor, epoch: int | None = None) -> Tensor:
        """Features [B, E] of images [B], as an epoch shows them; None: without augmentation."""
        table = self._plain if epoch is None or not self._copies else self._copy(epoch)
        found = table[index.to(table.device)]
        if self._norm is not None:
            variance, mean = self._norm
            found = (found - mean) / (variance + NORM_EPS).sqrt()
        return found

    def normalise(self, like: FeatureTable) -> None:
        """Show features by the mean and the variance of another table's, or of this one's, without
        augmentation: what a batch norm without weight and bias comes to."""
        moments = torch.var_mean(like._plain, dim=0)
        self._norm = moments[0].to(self._device), moments[1].to(self._device)
        self.key += "+normalised"

    def part(self, chosen: Tensor) -> TablePart:
        """Some of the images; bool [n]."""
        return TablePart(self, chosen.nonzero()[:, 0])

    def _copy(self, epoch: int) -> Tensor:
        number = epoch % len(self._copies)
        if number not in self._loaded:
            if not self._keep_all:
                self._loaded.clear()
            features, _, ids = _loaded(self._copies[number])
            if not torch.equal(ids, self._ids):  # an image that failed once shows itself plain
                both = self._plain.cpu().clone()
                known = torch.isin(ids, self._ids)
                both[torch.searchsorted(self._ids, ids[known])] = features[known]
                features = both
            self._loaded[number] = features.to(self._device)
        return self._loaded[number]


class TablePart:
    """Some of the images of a table."""

    def __init__(self, table: FeatureTable, index: Tensor) -> None:
        self._table = table
        self._index = index
        self.labels = table.labels[index]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor, epoch: int | None = None) -> Tensor:
        """As of the table."""
        return self._table.rows(self._index[index], epoch)


def _loaded(cache: FeatureCache) -> tuple[Tensor, Tensor, Tensor]:
    """Features [n, E], labels [n] and numbers in the set [n] of the images that decode."""
    found: LabelledRows = cache.rows()
    assert isinstance(found.rows, MemoryRows)  # noqa: S101 - a type: kept in memory, as asked
    assert found.sample_ids is not None  # noqa: S101 - a type: a cache keeps them
    return found.rows.tensor, found.labels, found.sample_ids
