"""The search over blocks of a bank: neighbours of the plain formula, whatever the blocks, and no
large temporary tensor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmoco.evaluation.knn import knn_accuracy
from fastmoco.evaluation.nearest import Nearest
from fastmoco.evaluation.reference import plain_knn_accuracy, plain_neighbours


def drawn(rows: int, width: int, seed: int) -> Tensor:
    """In float64, without ties."""
    draws = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(rows, width, generator=draws).double(), dim=1)


def signs(rows: int, width: int, seed: int) -> Tensor:
    """Similarities are exact in float32 where the width is 4, 16 or 64, and most tie."""
    draws = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 2, (rows, width), generator=draws) * 2.0 - 1.0) / width**0.5


def rising(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """A bank whose every row is nearer to every query than all rows before it."""
    cosine = torch.linspace(-0.9, 0.9, rows).double()
    bank = torch.zeros(rows, width).double()
    bank[:, 0], bank[:, 1] = cosine, (1 - cosine**2).sqrt()
    return torch.eye(width).double()[:1].repeat(9, 1), bank


def search(queries: Tensor, bank: Tensor, k: int, limit_bytes: int) -> Nearest:
    nearest = Nearest(queries, k, limit_bytes=limit_bytes)
    for start in range(0, len(bank), nearest.block_rows):
        nearest.offer(bank[start : start + nearest.block_rows], start)
    return nearest


SHAPES = [
    (1, 1, 4, 1),  # the smallest
    (33, 130, 16, 130),  # all rows are neighbours; the last block is not full
    (7, 1000, 16, 20),  # one block
    (9, 9000, 4, 20),  # several full blocks and a part of one
    (20, 700, 16, 300),  # more neighbours than groups in a block
]
"""Queries, bank rows, width, neighbours."""


@pytest.mark.parametrize("limit_bytes", [30_000, 300_000, 2**28])
@pytest.mark.parametrize(("queries", "rows", "width", "k"), SHAPES)
@pytest.mark.parametrize("kind", ["drawn", "tied", "equal", "rising"])
def test_the_neighbours_of_the_plain_formula(
    queries: int, rows: int, width: int, k: int, limit_bytes: int, kind: str
) -> None:
    if kind == "rising":
        asked, bank = rising(rows, width)
    elif kind == "equal":
        asked, bank = (signs(1, width, 0).repeat(count, 1) for count in (queries, rows))
    else:
        draw = drawn if kind == "drawn" else signs
        asked, bank = draw(queries, width, 1), draw(rows, width, 2)
    nearest = search(asked, bank, k, limit_bytes)
    similar, index = (asked @ bank.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(nearest.index, index[:, :k])
    torch.testing.assert_close(nearest.similar, similar[:, :k], rtol=0, atol=1e-14)


def test_one_row_and_one_query_at_a_time() -> None:
    asked, bank = signs(5, 4, 1), signs(40, 4, 2)
    nearest = search(asked, bank, 6, limit_bytes=1)
    assert nearest.block_rows == 1
    assert torch.equal(nearest.index, plain_neighbours(bank, asked, k=6)[1])


def test_fewer_rows_than_neighbours_are_marked() -> None:
    nearest = search(signs(2, 4, 1), signs(3, 4, 2), 5, 2**20)
    assert (nearest.index[:, 3:] == Nearest.MISSING).all()
    assert (nearest.similar[:, 3:] == -torch.inf).all()
    assert (nearest.index[:, :3] < 3).all()


class Largest(TorchDispatchMode):
    """The most bytes that any operator has allocated for one tensor."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.bytes = 0
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        del types
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._known:
                    self.bytes = max(self.bytes, storage.nbytes())
        return result


@pytest.mark.parametrize("k", [1, 20, 400])
@pytest.mark.parametrize("kind", ["drawn", "equal", "rising", "half", "many classes"])
def test_no_temporary_tensor_exceeds_the_limit(kind: str, k: int) -> None:
    limit = 400_000
    if kind == "rising":
        queries, bank = rising(8000, 16)
        queries = queries.repeat(30, 1)
    elif kind == "equal":
        queries, bank = torch.ones(300, 16), torch.ones(8000, 16)
    else:
        queries, bank = drawn(300, 16, 1).float(), drawn(8000, 16, 2).float()
    if kind == "half":
        queries, bank = queries.bfloat16(), bank.bfloat16()
    classes = 10**9 if kind == "many classes" else 7  # no table of queries and classes
    labels = torch.arange(len(bank)) * 7919 % classes
    wanted = torch.arange(len(queries)) * 7919 % classes
    assert bank.float().nbytes > limit
    with Largest(bank, queries, labels, wanted) as largest:
        accuracy = knn_accuracy(bank, labels, queries, wanted, k=k, limit_bytes=limit)
    assert 0 < largest.bytes <= limit
    if kind != "many classes" and kind != "half":
        assert accuracy == plain_knn_accuracy(bank, labels, queries, wanted, k=k)


def test_the_caller_s_features_stay_as_they_are() -> None:
    bank, queries = 3 * drawn(200, 8, 1).float(), 3 * drawn(50, 8, 2).float()
    before = bank.clone(), queries.clone()
    knn_accuracy(
        bank, torch.arange(200) % 5, queries, torch.arange(50) % 5, center=True, limit_bytes=9000
    )
    assert torch.equal(bank, before[0])
    assert torch.equal(queries, before[1])


@pytest.mark.gpu
@pytest.mark.parametrize("limit_bytes", [300_000, 2**28])
def test_a_gpu_finds_the_same_neighbours(limit_bytes: int) -> None:
    for asked, bank in ((signs(300, 64, 1), signs(9000, 64, 2)), rising(9000, 16)):
        nearest = search(asked.cuda(), bank.cuda(), 20, limit_bytes)
        assert torch.equal(nearest.index.cpu(), plain_neighbours(bank, asked, k=20)[1])
