"""Features of a set with the names of its files: nearest images, and images that are like no
other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmoco.distributed.gather import gather_rows
from fastmoco.evaluation.embed import LabelledRows
from fastmoco.evaluation.knn import Progress, shared_neighbours
from fastmoco.evaluation.monitor import evenly
from fastmoco.evaluation.rows import MemoryRows


@dataclass(frozen=True, kw_only=True)
class ImageNames:
    """The images of a set that decode, in the order of the set.

    Attributes:
        labels: [n] int64; -1 where an image has none.
        sample_ids: [n] int64: numbers in the set.
        paths: of the original files (`ShardSet.paths_of`); on the first rank alone.
        classes: class names by label; empty where no manifest contains them.
        digest: identity of the set.
        step: of the run whose encoder it is.
        pattern: of the shards that were read.
    """

    labels: Tensor
    sample_ids: NDArray[np.int64]
    paths: list[str]
    classes: tuple[str, ...]
    digest: str
    step: int
    pattern: str = ""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True)
class Embeddings(ImageNames):
    """Features of the images of a set, divided among the ranks.

    Attributes:
        features: [p, E] float32, on the CPU, as the encoder gives them: not of unit length. This
            rank's part of the images; parts are in rank order.
        first: the image of the first of them.
    """

    features: Tensor
    first: int = 0

    def spread(self, count: int) -> Embeddings:
        """So many images, spread evenly; all for 0, or if there are no more."""
        rows = evenly(len(self), count)
        mine = (rows >= self.first) & (rows < self.first + len(self.features))
        return replace(
            self,
            features=self.features[rows[mine] - self.first],
            first=int((rows < self.first).sum()),
            labels=self.labels[rows],
            sample_ids=self.sample_ids[rows],
            paths=[self.paths[row] for row in rows.tolist()] if self.paths else [],
        )


def neighbours(
    bank: Embeddings,
    queries: Embeddings,
    *,
    k: int,
    device: torch.device,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """The images of a bank that are most similar to each query; none is its own neighbour.

    Args:
        bank: features to search.
        queries: of the same encoder; may be those of the bank, or of a part of its set.
        k: neighbours of each query.
        device: where the products are computed, and the ranks communicate.
        progress: of the search, on this rank.

    Returns:
        Cosines [m, k'] float32, falling, and indices [m, k'] int64 of images of the bank, with k'
        the smaller of k and the images that may be neighbours. For all queries, on all ranks.

    Raises:
        ValueError: if k is below 1, a set is empty, the bank has no other image, or features are
            not finite.

    Numerics: exact search in float32. The last bit of a cosine may depend on the number of ranks.
    Distributed: collective, as `shared_neighbours`; then the neighbours are gathered.
    """
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")
    same = bank.digest == queries.digest
    if same and len(bank) < 2:
        raise ValueError("the set has one image, which has no neighbour")
    similar, index = shared_neighbours(
        _unlabelled(bank), _unlabelled(queries), device=device, k=k + same, progress=progress
    )
    if not same:
        return gather_rows(similar, device), gather_rows(index, device)

    # The image itself moves to the end of its row, which is then left out. Where it is not among
    # them, k + 1 others are as similar, and the last of these is left out.
    numbers = torch.from_numpy(bank.sample_ids)
    mine = queries.sample_ids[queries.first : queries.first + len(queries.features)]
    own = numbers[index] == torch.from_numpy(mine)[:, None]
    order = own.to(torch.uint8).sort(dim=1, stable=True).indices[:, : index.shape[1] - 1]
    found = similar.gather(1, order), index.gather(1, order)
    return gather_rows(found[0], device), gather_rows(found[1], device)


@dataclass(frozen=True, kw_only=True)
class Outliers:
    """Images that are like no other, the most unlike first.

    Attributes:
        rows: [n] int64: of the embeddings.
        similarity: [n] float32: mean cosine with their k nearest images.
        nearest: [n] int64: row of the most similar image.
    """

    rows: Tensor
    similarity: Tensor
    nearest: Tensor


def outliers(
    found: Embeddings, *, k: int, device: torch.device, progress: Progress | None = None
) -> Outliers:
    """All images of a set by their mean cosine with their k nearest images, lowest first; the same
    on all ranks.

    Raises:
        ValueError: as of `neighbours`.
    """
    similar, index = neighbours(found, found, k=k, device=device, progress=progress)
    mean = similar.mean(dim=1)
    order = mean.sort(stable=True).indices
    return Outliers(rows=order, similarity=mean[order], nearest=index[order, 0])


def _unlabelled(found: Embeddings) -> LabelledRows:
    """Rows for a search that needs no labels."""
    return LabelledRows(MemoryRows(found.features), torch.zeros(len(found.features)).long())
