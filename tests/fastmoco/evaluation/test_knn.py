import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmoco.evaluation.knn import knn_accuracy
from fastmoco.evaluation.reference import plain_knn_accuracy


def brute_force(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: int,
    temperature: float,
    center: bool,
) -> float:
    """The definition, one query at a time in float64."""
    table, asked = bank.double().numpy(), queries.double().numpy()
    if center:
        mean = table.mean(axis=0)
        table, asked = table - mean, asked - mean
    right = 0
    for row, wanted in zip(asked, query_labels.tolist(), strict=True):
        similar = [
            float(row @ other) / (np.linalg.norm(row) * np.linalg.norm(other)) for other in table
        ]
        nearest = sorted(range(len(similar)), key=lambda i: -similar[i])[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            label = int(bank_labels[i])
            votes[label] = votes.get(label, 0.0) + math.exp(similar[i] / temperature)
        right += max(sorted(votes), key=lambda label: votes[label]) == wanted
    return right / len(asked)


def blobs(
    count: int, *, seed: int, noise: float = 2.5, classes: int = 5, dim: int = 16
) -> tuple[Tensor, Tensor]:
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(99)) + 0.7
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=rng)
    return centres[labels] + noise * torch.randn(count, dim, generator=rng), labels


# one neighbour; the default; more than a chunk's worth of ties impossible; more neighbours than the
# bank has rows
@pytest.mark.parametrize("k", [1, 20, 57, 500])
@pytest.mark.parametrize("temperature", [0.07, 1.0, 0.001])
@pytest.mark.parametrize("center", [False, True])
def test_equals_brute_force(k: int, temperature: float, center: bool) -> None:
    bank, queries = blobs(203, seed=0), blobs(101, seed=1)
    expected = brute_force(*bank, *queries, k, temperature, center) if temperature > 0.01 else None
    actual = knn_accuracy(
        *bank, *queries, k=k, temperature=temperature, center=center, limit_bytes=4096
    )
    if expected is None:  # exp overflows in the plain form; the nearest neighbour alone decides
        expected = brute_force(*bank, *queries, 1, 1.0, center)
    assert actual == expected
    assert 0.3 < actual < 0.99, "a trivial case proves nothing"


def test_centring_changes_the_answer_here() -> None:
    bank, queries = blobs(203, seed=0), blobs(101, seed=1)
    assert knn_accuracy(*bank, *queries, center=True) != knn_accuracy(*bank, *queries)


@pytest.mark.parametrize("chunk", [300, 5000, 100_000])
def test_chunks_do_not_matter(chunk: int) -> None:
    bank, queries = blobs(300, seed=0), blobs(101, seed=1)
    assert knn_accuracy(*bank, *queries, limit_bytes=chunk) == knn_accuracy(*bank, *queries)


def test_near_votes_count_more() -> None:
    bank = torch.tensor([[1.0, 0.05], [0.8, 0.6], [0.8, -0.6]])
    labels = torch.tensor([0, 1, 1])
    query, wanted = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert knn_accuracy(bank, labels, query, wanted, k=3, temperature=0.07) == 1.0
    assert knn_accuracy(bank, labels, query, wanted, k=3, temperature=10.0) == 0.0


def test_length_of_a_feature_does_not_matter_and_bf16_is_compared_in_float32() -> None:
    bank, queries = blobs(300, seed=0), blobs(101, seed=1)
    expected = knn_accuracy(*bank, *queries)
    scaled = bank[0] * torch.rand(300, 1, generator=torch.Generator().manual_seed(3)).add(0.1)
    assert knn_accuracy(scaled, bank[1], *queries) == expected
    rounded = bank[0].bfloat16(), queries[0].bfloat16()
    assert knn_accuracy(rounded[0], bank[1], rounded[1], queries[1]) == knn_accuracy(
        rounded[0].float(), bank[1], rounded[1].float(), queries[1]
    )


def test_a_set_against_itself_with_one_neighbour_is_perfect_and_chance_is_chance() -> None:
    features, labels = blobs(200, seed=0)
    assert knn_accuracy(features, labels, features, labels, k=1) == 1.0
    noise = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    guesses = torch.arange(2000) % 4
    assert knn_accuracy(
        noise[:1000], guesses[:1000], noise[1000:], guesses[1000:]
    ) == pytest.approx(0.25, abs=0.05)


def test_a_query_class_that_the_bank_lacks_is_wrong_not_an_error() -> None:
    assert (
        knn_accuracy(
            torch.ones(3, 2),
            torch.zeros(3, dtype=torch.int64),
            torch.ones(2, 2),
            torch.tensor([0, 9]),
        )
        == 0.5
    )


LABELS = torch.zeros(3, dtype=torch.int64)
ROWS = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("arguments", "options", "match"),
    [
        ((ROWS, LABELS, torch.ones(3, 4), LABELS), {}, r"bank \(3, 2\), queries \(3, 4\)"),
        ((ROWS, LABELS[:2], ROWS, LABELS), {}, r"bank: 3 rows with labels of shape \(2,\)"),
        ((ROWS, LABELS, ROWS, LABELS - 1), {}, "queries: 3 of 3 rows have no label"),
        ((ROWS[:0], LABELS[:0], ROWS, LABELS), {}, "bank: has no rows"),
        ((ROWS, LABELS, ROWS[:0], LABELS[:0]), {}, "queries: has no rows"),
        ((ROWS * math.nan, LABELS, ROWS, LABELS), {}, "bank: features are not finite"),
        ((ROWS, LABELS, ROWS, LABELS), {"k": 0}, "k=0"),
        ((ROWS, LABELS, ROWS, LABELS), {"temperature": 0.0}, "temperature=0.0"),
    ],
)
def test_what_does_not_fit_is_named(
    arguments: tuple[Tensor, ...], options: dict[str, float], match: str
) -> None:
    with pytest.raises(ValueError, match=match):
        knn_accuracy(*arguments, **options)  # type: ignore[arg-type]


def test_memory_follows_the_labels_that_exist_not_the_largest() -> None:
    """With a vote for each number up to the label this would take 2 TB."""
    generator = torch.Generator().manual_seed(3)
    bank, queries = torch.randn(64, 8, generator=generator), torch.randn(32, 8, generator=generator)
    few = torch.randint(0, 5, (64,), generator=generator)
    wanted = torch.randint(0, 5, (32,), generator=generator)
    names = torch.tensor([0, 7, 16_777_215, 2**40, 2**62])
    for count in (knn_accuracy, plain_knn_accuracy):
        found = count(bank, names[few], queries, names[wanted], k=7, temperature=0.07)
        assert found == count(bank, few, queries, wanted, k=7, temperature=0.07)
        assert 0 < found < 1
