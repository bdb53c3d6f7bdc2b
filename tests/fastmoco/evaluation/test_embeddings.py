"""Features with the names of files: exact neighbours, and outliers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmoco.evaluation.embeddings import Embeddings, neighbours, outliers

CPU = torch.device("cpu")


def embeddings(count: int, *, seed: int = 0, digest: str = "a", first: int = 0) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    paths = [f"cat/{number}.jpg" for number in range(count)]
    return Embeddings(
        features=torch.randn(count, 5, generator=generator),
        labels=torch.arange(count) % 2,
        sample_ids=np.arange(first, first + 2 * count, 2),  # bad images are left out
        paths=paths,
        classes=("cat", "dog"),
        digest=digest,
        step=7,
    )


def plain(bank: Embeddings, queries: Embeddings, k: int) -> torch.Tensor:
    """Rows of the neighbours, from all cosines at once."""
    cosine = torch.nn.functional.cosine_similarity(
        queries.features[:, None].double(), bank.features[None].double(), dim=2
    )
    if bank.digest == queries.digest:
        numbers = torch.from_numpy(bank.sample_ids)[None]
        cosine[numbers == torch.from_numpy(queries.sample_ids)[:, None]] = -2
    return cosine.argsort(dim=1, descending=True, stable=True)[:, :k]


@pytest.mark.parametrize("other", ["the same set", "a part of it", "another set"])
@pytest.mark.parametrize("k", [1, 4, 100])
def test_neighbours_are_exact_and_no_image_is_its_own(other: str, k: int) -> None:
    bank = embeddings(30)
    queries = {
        "the same set": bank,
        "a part of it": bank.spread(7),
        "another set": embeddings(9, seed=1, digest="b"),
    }[other]
    similar, index = neighbours(bank, queries, k=k, device=CPU)
    columns = min(k, 30 if other == "another set" else 29)
    assert similar.shape == index.shape == (len(queries), columns)
    assert torch.equal(index, plain(bank, queries, columns))
    assert bool((similar[:, 1:] <= similar[:, :-1]).all())


def test_copies_of_an_image_are_neighbours_of_it() -> None:
    bank = embeddings(8)
    bank.features[:] = bank.features[0]
    similar, index = neighbours(bank, bank, k=3, device=CPU)
    assert index[6].tolist() == [0, 1, 2]
    assert index[1].tolist() == [0, 2, 3]
    assert similar.min() > 0.999


def test_the_image_that_is_like_no_other_comes_first() -> None:
    found = embeddings(20)
    found.features[:] = found.features[0] + 0.01 * found.features
    found.features[13] = -found.features[0]
    result = outliers(found, k=3, device=CPU)
    assert result.rows[0] == 13
    assert sorted(result.rows.tolist()) == list(range(20))
    similar, index = neighbours(found, found, k=3, device=CPU)
    assert torch.equal(result.similarity, similar.mean(1).sort().values)
    assert torch.equal(result.nearest, index[result.rows, 0])


def test_wrong_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="k=0: must be at least 1"):
        neighbours(embeddings(3), embeddings(3), k=0, device=CPU)
    with pytest.raises(ValueError, match="has one image"):
        neighbours(embeddings(1), embeddings(1), k=1, device=CPU)
