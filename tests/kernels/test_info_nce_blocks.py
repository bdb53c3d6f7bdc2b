"""Keys in blocks against the definition in float64 and against the pass over all keys, on the
chunked path and in the kernels (in the interpreter where there is no GPU).
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from fastmoco_kernels import KeyBlock, info_nce_over_blocks
from fastmoco_kernels.info_nce.chunked import Request
from fastmoco_kernels.info_nce.op import symmetric_info_nce_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PATHS = ("triton", "chunked")


def rows_of(rows: int, seed: int, dim: int = 40, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def sides(rows: int, keys: int, offset: int, dim: int = 40, dtype=torch.float64):
    """Queries and keys of both directions, positives at a cosine around 0.7, some ranked lower."""
    queries = [3 * rows_of(rows, seed, dim, dtype) for seed in (0, 1)]
    every = [rows_of(keys, seed, dim, dtype) for seed in (2, 3)]
    for q, k in zip(queries, every, strict=True):
        k[offset : offset + rows] += 0.3 * q * torch.linspace(0, 1, rows, dtype=dtype)[:, None]
    return queries, every


def in_blocks(every, sizes, order):
    """The keys in blocks of these sizes, in this order."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    for i in order:
        yield KeyBlock(starts[i], tuple(k[starts[i] : starts[i] + sizes[i]] for k in every))


def measure(queries, blocks, **how):
    """Loss, gradients of the queries, accuracy."""
    leaves = [q.detach().clone().requires_grad_() for q in queries]
    result = info_nce_over_blocks(leaves, blocks, accuracy=True, **how)
    result.loss.backward()
    return result.loss.detach(), *(q.grad for q in leaves), result.top1, result.top5


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth).norm() / truth.norm().clamp_min(1e-30)).item()


# Four blocks of 5 as of four ranks, positives in each; ragged ones; one row a block; D of no tile.
@pytest.mark.parametrize(
    ("sizes", "order", "offset", "rows"),
    [
        ([5, 5, 5, 5], [0, 3, 2, 1], 0, 5),
        ([5, 5, 5, 5], [3, 2, 1, 0], 15, 5),
        ([7, 1, 12], [2, 0, 1], 9, 4),
        ([1, 1], [1, 0], 1, 1),
    ],
)
@pytest.mark.parametrize("temperature", [0.2, 1.0, 0.003, "tensor"])
def test_blocks_are_the_definition_in_float64(sizes, order, offset, rows, temperature):
    queries, every = sides(rows, sum(sizes), offset)
    found, truth, slopes = [], [], []
    for backend, kept in (("chunked", found), ("reference", truth)):
        tau = temperature
        if temperature == "tensor":
            tau = torch.tensor(0.2, dtype=torch.float64, device=DEVICE, requires_grad=True)
        how = {"temperature": tau, "positive_offset": offset, "backend": backend}
        kept += measure(queries, in_blocks(every, sizes, order), **how)
        slopes.append(tau.grad if temperature == "tensor" else torch.zeros(()))
    for mine, expected in zip([*found, slopes[0]], [*truth, slopes[1]], strict=True):
        assert (mine - expected).abs().max() <= 1e-12 * max(1.0, expected.abs().max().item())

    # And the definition over blocks is the definition over all keys.
    leaves = [q.clone().requires_grad_() for q in queries]
    whole = symmetric_info_nce_loss(
        leaves[0], every[0], leaves[1], every[1],
        temperature=0.2 if temperature == "tensor" else temperature,
        positive_offset=offset, backend="reference", accuracy=True,
    )  # fmt: skip
    whole.loss.backward()
    expected = (whole.loss.detach(), *(q.grad for q in leaves), whole.top1, whole.top5)
    for one, other in zip(truth, expected, strict=True):
        assert (one - other).abs().max() <= 1e-12 * max(1.0, other.abs().max().item())


@pytest.mark.parametrize(
    ("path", "temperature"), [("triton", "tensor"), ("chunked", 0.07), ("chunked", "tensor")]
)
def test_blocks_in_float32(path, temperature):
    """Ragged blocks, the positives in the second block of the keys, D of no tile."""
    sizes, order, offset, rows = [6, 35, 9], [1, 0, 2], 8, 30
    queries, every = sides(rows, sum(sizes), offset)
    plain = 0.2 if temperature == "tensor" else temperature
    how = {"positive_offset": offset, "precision": "fp32"}
    truth = measure(
        queries, in_blocks(every, sizes, order), temperature=plain, backend="reference", **how
    )
    tau = torch.tensor(0.2, device=DEVICE) if temperature == "tensor" else temperature
    narrow = [k.float() for k in every]
    found, again = (
        measure(
            [q.float() for q in queries],
            in_blocks(narrow, sizes, order),
            temperature=tau,
            backend=path,
            **how,
        )
        for _ in range(2)
    )
    for value, expected in zip(found[:3], truth[:3], strict=True):
        assert relative(value, expected) <= 4e-6
    assert 0 < truth[3] < truth[4] < 1
    assert torch.allclose(torch.stack(found[3:]).double(), torch.stack(truth[3:]), atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_one_block_has_the_bits_of_the_whole_pass(path):
    queries, every = sides(9, 33, 4, dtype=torch.float32)
    how = {"temperature": 0.2, "positive_offset": 4, "backend": path, "precision": "fp32"}
    found = measure(queries, in_blocks(every, [33], [0]), **how)
    leaves = [q.clone().requires_grad_() for q in queries]
    whole = symmetric_info_nce_loss(leaves[0], every[0], leaves[1], every[1], accuracy=True, **how)
    whole.loss.backward()
    expected = (whole.loss.detach(), *(q.grad for q in leaves), whole.top1, whole.top5)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_splits_of_a_block_are_folded_into_the_next():
    """Several parts a block: all of them are in the sums, whatever is wanted."""
    from fastmoco_kernels.info_nce.launch import TritonBlocks
    from fastmoco_kernels.info_nce.tiles import Tile

    queries, every = sides(6, 100, 3, dtype=torch.float32)
    for wanted in ({"gradient": False}, {"gradient": True, "accuracy": True}):
        request = Request(temperature=0.2, scale=0.4, positive_offset=3, precision="fp32", **wanted)
        results = []
        for sizes in ([100], [40, 40, 20]):
            sums = TritonBlocks(queries, request, tile=Tile(64, 16, 4, 2), splits=2)
            for block in in_blocks(every, sizes, range(len(sizes))):
                sums.add(block.keys, 3 - block.first)
            results.append(sums.finish())
        for other in results[1:]:
            torch.testing.assert_close(other.loss, results[0].loss, rtol=1e-6, atol=0)
            torch.testing.assert_close(other.dq, results[0].dq, rtol=1e-4, atol=1e-7)
            assert torch.equal(other.hits, results[0].hits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_rows_keep_their_dtype_and_sum_in_float32(dtype):
    queries, every = sides(8, 24, 8)
    how = {"temperature": 0.2, "positive_offset": 8}
    truth = measure(queries, in_blocks(every, [8] * 3, [1, 0, 2]), backend="reference", **how)
    narrow = [k.to(dtype) for k in every]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found = measure(
            [q.to(dtype) for q in queries], in_blocks(narrow, [8] * 3, [1, 0, 2]), **how
        )
    assert found[0].dtype == torch.float32
    assert found[1].dtype == dtype
    assert relative(found[0], truth[0]) <= 1e-2
    assert relative(found[1], truth[1]) <= 3e-2


def test_a_block_is_let_go_before_the_next_is_asked_for():
    """Or a ring would hold one block more; the first one stays for its positives."""
    queries, every = sides(4, 12, 0, dtype=torch.float32)
    seen: list[weakref.ref[torch.Tensor]] = []

    def arriving():
        for start in (0, 4, 8):
            gc.collect()
            assert [ref() is None for ref in seen[1:]] == [True] * len(seen[1:])
            block = KeyBlock(start, tuple(k[start : start + 4].clone() for k in every))
            seen.append(weakref.ref(block.keys[0]))
            yield block
            del block

    info_nce_over_blocks(queries, arriving(), temperature=0.2, backend="chunked")
    assert len(seen) == 3


def test_without_gradients_none_is_computed_and_a_second_derivative_is_refused():
    queries, every = sides(4, 8, 0, dtype=torch.float32)
    leaves = [q.requires_grad_() for q in queries]

    def run():
        blocks = in_blocks(every, [4, 4], [0, 1])
        return info_nce_over_blocks(leaves, blocks, temperature=0.2, backend="chunked").loss

    with torch.no_grad():
        silent = run()
    loss = run()
    assert not silent.requires_grad
    assert silent.item() == pytest.approx(loss.item(), rel=1e-6)
    (slope,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        slope.square().sum().backward()


def _block(first=0, rows=4, dim=40, count=2, dtype=torch.float64) -> KeyBlock:
    return KeyBlock(first, tuple(rows_of(rows, 9, dim, dtype) for _ in range(count)))


@pytest.mark.parametrize(
    ("queries", "blocks", "text"),
    [
        (3, [_block(count=3)], r"queries for 3 directions; takes 1 or 2"),
        (2, [], r"blocks is empty"),
        (2, [_block(count=1)], r"keys for 1 directions but there are queries for 2"),
        (2, [_block(first=2)], r"positives -2\.\.1 are outside the 4 keys"),
        (2, [_block(rows=3)], r"positives 0\.\.3 are outside the 3 keys"),
        (2, [_block(), _block(4, dim=41)], r"the block at row 4 are .*\(4, 41\).*\(4, 40\)"),
        (2, [_block(), _block(4, dtype=torch.float32)], r"row 4 are torch.float32 .*float64"),
    ],
)
def test_what_does_not_fit_is_refused(queries, blocks, text):
    given = [rows_of(4, seed) for seed in range(queries)]
    with pytest.raises(ValueError, match=text):
        info_nce_over_blocks(given, blocks, temperature=0.2)
