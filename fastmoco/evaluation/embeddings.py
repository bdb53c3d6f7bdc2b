"""Features of a set with the names of its files: written for other programs, nearest images, and
images that are like no other."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmoco.evaluation.embed import LabelledRows
from fastmoco.evaluation.knn import shared_neighbours
from fastmoco.evaluation.rows import MemoryRows
from fastmoco_pipelines.files import whole_file
from fastmoco_pipelines.formats.index_json import path_to_json

SUFFIXES = (".npz", ".safetensors")
MOST_METADATA = 90_000_000
"""Bytes; safetensors reads no header of more than 100 million."""


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """Features of the images of a set that decode, in the order of the set.

    Attributes:
        features: [n, E] float32, on the CPU, as the encoder gives them: not of unit length.
        labels: [n] int64; -1 where an image has none.
        sample_ids: [n] int64: numbers in the set.
        paths: of the original files (`ShardSet.paths_of`).
        classes: class names by label; empty where no manifest contains them.
        digest: identity of the set.
        step: of the run whose encoder it is.
        pattern: of the shards that were read.
    """

    features: Tensor
    labels: Tensor
    sample_ids: NDArray[np.int64]
    paths: list[str]
    classes: tuple[str, ...]
    digest: str
    step: int
    pattern: str = ""

    def __len__(self) -> int:
        return len(self.paths)

    def spread(self, count: int) -> Embeddings:
        """So many rows, spread evenly; all for 0, or if there are no more."""
        count = min(count or len(self), len(self))
        rows = np.arange(count, dtype=np.int64) * len(self) // count
        return replace(
            self,
            features=self.features[rows],
            labels=self.labels[rows],
            sample_ids=self.sample_ids[rows],
            paths=[self.paths[row] for row in rows.tolist()],
        )


def require_target(out: Path) -> None:
    """Refuse a file of a form that `write_embeddings` does not know, or that exists.

    Raises:
        ValueError: naming the file and the cure.
    """
    if out.suffix not in SUFFIXES:
        raise ValueError(f"out={str(out)!r}: must end in {' or '.join(SUFFIXES)}")
    if out.exists():
        raise ValueError(f"out={str(out)!r}: exists; choose another file")


def write_embeddings(found: Embeddings, out: Path) -> Path:
    """Write features and names into one file, whole or not at all.

    `.npz` has the arrays `features`, `labels`, `samples`, `paths`, `classes` (both of text, which
    `numpy.load` reads without pickle) and `step`. `.safetensors` has the first three as tensors;
    its metadata is `step`, and `paths` and `classes` as JSON. Bytes of a path that are not UTF-8
    are surrogates in the array, as in Python's names of files, and an object {"bytes": BASE64} in
    the JSON.

    Raises:
        ValueError: as of `require_target`; or if a set has too many names for `.safetensors`.
        OSError: if the file cannot be written.
    """
    require_target(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".npz":
        with whole_file(out) as fresh, open(fresh, "xb") as file:
            np.savez(
                file,
                features=found.features.numpy(),
                labels=found.labels.numpy(),
                samples=found.sample_ids,
                paths=np.array(found.paths, dtype=np.str_),
                classes=np.array(found.classes, dtype=np.str_),
                step=np.int64(found.step),
            )
        return out

    from safetensors.torch import save_file

    paths = json.dumps([path_to_json(path) for path in found.paths])
    if len(paths) > MOST_METADATA:
        raise ValueError(
            f"out={str(out)!r}: the names of {len(found)} files do not fit into the header of "
            "safetensors: choose a file that ends in .npz"
        )
    tensors = {
        "features": found.features.contiguous(),
        "labels": found.labels,
        "samples": torch.from_numpy(found.sample_ids),
    }
    metadata = {
        "step": str(found.step),
        "paths": paths,
        "classes": json.dumps([path_to_json(name) for name in found.classes]),
    }
    with whole_file(out) as fresh:
        save_file(tensors, fresh, metadata)
    return out


def neighbours(
    bank: Embeddings, queries: Embeddings, *, k: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The images of a bank that are most similar to each query; none is its own neighbour.

    Args:
        bank: features to search.
        queries: of the same encoder; may be those of the bank, or of a part of its set.
        k: neighbours of each query.
        device: where the products are computed.

    Returns:
        Cosines [m, k'] float32, falling, and indices [m, k'] int64 of rows of the bank, with k' the
        smaller of k and the rows that may be neighbours.

    Raises:
        ValueError: if k is below 1, a set is empty, the bank has no other image, or features are
            not finite.

    Numerics: exact search in float32.
    """
    if k < 1:
        raise ValueError(f"k={k}: must be at least 1")
    same = bank.digest == queries.digest
    if same and len(bank) < 2:
        raise ValueError("the set has one image, which has no neighbour")
    similar, index = shared_neighbours(
        _unlabelled(bank), _unlabelled(queries), device=device, k=k + same
    )
    if not same:
        return similar, index

    # The image itself moves to the end of its row, which is then left out. Where it is not among
    # them, k + 1 others are as similar, and the last of these is left out.
    numbers = torch.from_numpy(bank.sample_ids)
    own = numbers[index] == torch.from_numpy(queries.sample_ids)[:, None]
    order = own.to(torch.uint8).sort(dim=1, stable=True).indices[:, : index.shape[1] - 1]
    return similar.gather(1, order), index.gather(1, order)


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


def outliers(found: Embeddings, *, k: int, device: torch.device) -> Outliers:
    """All images of a set by their mean cosine with their k nearest images, lowest first.

    Raises:
        ValueError: as of `neighbours`.
    """
    similar, index = neighbours(found, found, k=k, device=device)
    mean = similar.mean(dim=1)
    order = mean.sort(stable=True).indices
    return Outliers(rows=order, similarity=mean[order], nearest=index[order, 0])


def _unlabelled(found: Embeddings) -> LabelledRows:
    """Rows for a search that needs no labels."""
    return LabelledRows(MemoryRows(found.features), torch.zeros(len(found), dtype=torch.int64))
