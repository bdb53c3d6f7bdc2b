"""Every tile that tuning may pick, by name: tests run deterministically, so that `tuned` itself
takes defaults alone.

Attention's tiles are run in `test_attention_short.py`. Ops over tables of addresses have one tile
each.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.aot.info_nce import aot_cases
from fastmoco_kernels import tuning
from fastmoco_kernels.attention import launch as attention_launch
from fastmoco_kernels.attention.op import attention
from fastmoco_kernels.info_nce import cost, launch
from fastmoco_kernels.info_nce.chunked import Request
from fastmoco_kernels.info_nce.op import info_nce_loss
from fastmoco_kernels.info_nce.reference import positive_ranks_reference
from fastmoco_kernels.info_nce.tiles import FAMILIES, Tile, candidates, family

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of the whole tensor: operands of 11 bits (fp16, tf32) and of 8 (bf16), sums in float32.
TOLERANCE = {"fp32": 4e-6, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2}


def _families() -> tuple[int, ...]:
    """Kinds of GPU whose tiles run here: its own on a GPU, all of them in the interpreter."""
    return FAMILIES if DEVICE.type == "cpu" else (family(torch.cuda.get_device_capability()),)


def _tiles(D: int, precision: str) -> list[Tile]:
    return sorted({tile for kind in _families() for tile in candidates(kind, D, precision)})


def _cases(precisions: tuple[str, ...]) -> list[tuple[str, int, Tile]]:
    return [
        (precision, D, tile)
        for precision in precisions
        for D in (128, 256, 512)
        for tile in _tiles(D, precision)
    ]


def _data(rows: int, keys: int, dim: int, offset: int, precision: str) -> tuple[Tensor, Tensor]:
    """Positives at a cosine around 0.7; values that the op is given exactly."""
    generator = torch.Generator().manual_seed(dim)
    q, k = (torch.randn(n, dim, generator=generator) for n in (rows, keys))
    k[offset : offset + rows] += q
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return q.to(DEVICE, dtype), k.to(DEVICE, dtype)


def _check_info_nce(rows: int, keys: int, precision: str, D: int, tile: Tile, limit: float) -> None:
    """Loss, ranks, and the gradients of queries, keys and temperature against float64."""
    q, k = _data(rows, keys, D, 3, precision)
    exact = [x.double().requires_grad_() for x in (q, k, torch.tensor(0.2, device=DEVICE))]
    loss = info_nce_loss(
        exact[0],
        exact[1],
        temperature=exact[2],
        scale=1.0,
        positive_offset=3,
        key_gradients=True,
        backend="reference",
    )
    truth = dict(
        zip(("dq", "dkeys", "dtemperature"), torch.autograd.grad(loss, exact), strict=True)
    )
    ranks = positive_ranks_reference(q.double(), k.double(), positive_offset=3)
    request = Request(
        temperature=torch.tensor(0.2, device=DEVICE),
        scale=1.0,
        positive_offset=3,
        gradient=True,
        key_gradient=True,
        accuracy=True,
        precision=precision,
    )
    found = launch.info_nce_triton((q,), (k,), request, tile=tile, splits=2)
    for name, value in {"loss": loss.detach(), **truth}.items():
        mine = getattr(found, name).double()
        mine = mine[0] if name == "dq" else mine
        assert (mine - value).norm() <= limit * value.norm(), (name, tile)
    for share, first in zip(found.hits, (1, 5), strict=True):
        assert abs(share.item() - (ranks < first).double().mean().item()) <= 2 / rows, (first, tile)


SIZES = sorted({(tile.block_x, tile.block_y) for _, _, tile in _cases(cost.PRECISIONS)})


@pytest.mark.skipif(
    DEVICE.type == "cuda", reason="in the interpreter; the next test runs them on a GPU"
)
@pytest.mark.parametrize(("block_x", "block_y"), SIZES)
def test_every_tile_of_the_loss(block_x, block_y):
    """Warps, stages and the width mean nothing to the interpreter: every size of a tile once. The
    keys fill no tile."""
    _check_info_nce(5, 150, "fp32", 64, Tile(block_x, block_y, 4, 1), TOLERANCE["fp32"])


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "D", "tile"), _cases(("bf16", "fp16", "tf32", "fp32")))
def test_every_tile_of_the_loss_on_a_gpu(precision, D, tile):
    """A batch of 1000 of 4 ranks: ragged, and many tiles for every program."""
    _check_info_nce(1000, 4000, precision, D, tile, TOLERANCE[precision])


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tile_of_attention_at_the_shape_of_a_vit(head_dim, dtype, monkeypatch):
    """197 tokens; every tile against float64, in value and gradients, one way varied at a time."""
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [
        torch.randn(8, 6, 197, head_dim, device="cuda", generator=generator).to(dtype)
        for _ in range(4)
    ]
    exact = _both_ways([t.double() for t in inputs], "reference")
    chip = attention_launch._chip(torch.device("cuda"))
    rows = attention_launch.VIT_ROWS
    forward = attention_launch.forward_tiles(chip, head_dim, 197, rows)
    backward = attention_launch.backward_tiles(chip, head_dim, rows)
    for one, other in [
        *((tile, backward[0]) for tile in forward),
        *((forward[0], tile) for tile in backward),
    ]:
        monkeypatch.setattr(attention_launch, "forward_tiles", lambda *_, one=one: [one])
        monkeypatch.setattr(attention_launch, "backward_tiles", lambda *_, other=other: [other])
        for name, mine, true in zip(
            ("out", "dq", "dk", "dv"), _both_ways(inputs, "triton"), exact, strict=True
        ):
            assert (mine.double() - true).norm() <= 1e-2 * true.norm(), (name, one, other)


def _both_ways(inputs: list[Tensor], backend: str) -> list[Tensor]:
    *leaves, gradient = (t.detach().requires_grad_() for t in inputs)
    out = attention(*leaves, backend=backend)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def test_every_candidate_is_compiled_ahead_of_time():
    compiled = {case.name for case in aot_cases()}
    for precision in cost.PRECISIONS:
        for D in (128, 256, 512) if precision != "fp16" else (256,):
            for tile in {tile for kind in FAMILIES for tile in candidates(kind, D, precision)}:
                name = f"info_nce.stream gradient {precision} D{D} {tile.block_x}x{tile.block_y}"
                assert f"{name} w{tile.warps} s{tile.stages}" in compiled


def test_whatever_changes_the_work_is_in_the_key_of_the_loss(monkeypatch):
    """Directions, rows, width, precision; loss alone, with gradients, with ranks; the second
    pass."""
    keys: list[tuple[object, ...]] = []

    def tuned(op, shape, tiles, default, run, device):
        keys.append(tuple(shape))
        return default

    monkeypatch.setattr(launch, "tuned", tuned)
    q, k = _data(5, 9, 64, 3, "fp32")
    usual = {
        "temperature": 0.2,
        "scale": 1.0,
        "positive_offset": 3,
        "gradient": True,
        "precision": "fp32",
    }
    variants = [
        {},
        {"gradient": False},
        {"accuracy": True},
        {"gradient": False, "accuracy": True},
        {"precision": "tf32"},
    ]
    for changes in variants:
        launch.info_nce_triton((q,), (k,), Request(**(usual | changes)))
    launch.info_nce_triton((q, q), (k, k), Request(**usual))
    assert len(set(keys)) == len(keys) == len(variants) + 1
    launch.info_nce_triton((q,), (k,), Request(**usual, key_gradient=True))
    assert len(set(keys)) == len(variants) + 2
    assert keys[-2] == keys[0]


def test_a_settled_choice_is_found_without_text_or_file(monkeypatch, tmp_path):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(tuning, "_settled", {("op", (1, "bf16"), device): (2, 4)})
    monkeypatch.setattr(tuning, "_cache_file", lambda _: pytest.fail("looked for the file"))
    monkeypatch.setattr(tuning, "interpreting", lambda: False)
    torch.use_deterministic_algorithms(False)
    tiles = [(1, 4), (2, 4)]
    assert tuning.tuned("op", (1, "bf16"), tiles, tiles[0], lambda tile: None, device) == (2, 4)
