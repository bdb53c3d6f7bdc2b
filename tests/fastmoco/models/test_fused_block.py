"""The fused block is the block of modules: outputs, every gradient, chunks, what is kept, what is
planned and counted."""

from __future__ import annotations

import copy
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmoco.config import ModelConfig
from fastmoco.config.serial import differences
from fastmoco.distributed.mesh import World
from fastmoco.models import fused_block
from fastmoco.models.blocks import Block, Recompute
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.planning.costs import measure_costs
from fastmoco.planning.live_bytes import LiveBytes
from fastmoco.recipes import quickstart_digits
from fastmoco.training.forward_backward import ForwardBackward

B, L, E, A = 3, 17, 48, 4
CPU = torch.device("cpu")


def _block(
    dtype: torch.dtype = torch.float32, *, width: int = E, heads: int = A, device: str = "cpu"
) -> Block:
    torch.manual_seed(0)
    block = Block(width, heads, 4 * width, "sdpa")
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=width**-0.5)  # biases and norms of their own, too
    return block.to(device, dtype)


def _run(
    block: Block, *, fused: bool, half: bool, branch: bool, used: str = "both", rows: int = L
) -> dict[str, Tensor]:
    """Outputs and all gradients by name, of the same numbers whatever the dtype."""
    block.fused = fused
    block.zero_grad()
    weight = block.norm1.weight
    narrow = torch.bfloat16 if half else weight.dtype
    torch.manual_seed(1)
    x, *others = torch.randn(4, B, rows, len(weight))
    added, *given = (t.bfloat16().to(weight) for t in others)
    x = x.to(weight).requires_grad_()
    branch_in = added.to(narrow).requires_grad_() if branch else None
    with torch.autocast(weight.device.type, torch.bfloat16, enabled=half):
        stream, out = block(x, branch_in)
    assert out is not None
    chosen = {"both": (0, 1), "stream": (0,), "branch": (1,)}[used]
    torch.autograd.backward(
        [(stream, out)[i] for i in chosen], [given[i].to((stream, out)[i].dtype) for i in chosen]
    )
    found = {"stream": stream.detach(), "branch": out.detach(), "dx": x.grad}
    found |= {} if branch_in is None else {"dbranch": branch_in.grad}
    found |= {name: p.grad for name, p in block.named_parameters()}
    return {name: t for name, t in found.items() if t is not None}


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_outputs_and_every_gradient_are_those_of_the_modules(
    dtype: torch.dtype, tolerance: float, branch: bool
) -> None:
    block = _block(dtype)
    modules, fused = (
        _run(block, fused=fused, half=False, branch=branch) for fused in (False, True)
    )
    assert fused.keys() == modules.keys()
    for name, truth in modules.items():
        assert (fused[name].dtype, fused[name].shape) == (truth.dtype, truth.shape), name
        assert _distance(fused[name], truth) <= tolerance, name


def _assert_as_good_as_modules(
    width: int, heads: int, rows: int, device: str, *, branch: bool
) -> None:
    """Under autocast: types of the modules, and their distance from float64 or less."""
    size = {"width": width, "heads": heads, "device": device}
    block = _block(**size)  # type: ignore[arg-type]
    modules, fused = (
        _run(block, fused=fused, half=True, branch=branch, rows=rows) for fused in (False, True)
    )
    exact = _run(_block(torch.float64, **size), fused=False, half=False, branch=branch, rows=rows)  # type: ignore[arg-type]
    for name, truth in exact.items():
        assert (fused[name].dtype, fused[name].shape) == (
            modules[name].dtype,
            modules[name].shape,
        ), name
        error, allowed = _distance(fused[name], truth), _distance(modules[name], truth)
        assert error <= max(1.2 * allowed, torch.finfo(torch.bfloat16).eps / 2), (
            name,
            error,
            allowed,
        )


@pytest.mark.parametrize("branch", [True, False])
def test_under_autocast_it_is_as_near_to_float64_as_the_modules_are(branch: bool) -> None:
    _assert_as_good_as_modules(E, A, L, "cpu", branch=branch)


@pytest.mark.parametrize("branch", [True, False])
def test_the_kernels_give_the_same_block(monkeypatch: pytest.MonkeyPatch, branch: bool) -> None:
    """In float32 through Triton's interpreter, or on a GPU."""
    block = _block(device="cuda" if torch.cuda.is_available() else "cpu")
    modules = _run(block, fused=False, half=False, branch=branch)
    asked: list[Tensor] = []
    monkeypatch.setattr(fused_block, "kernels_fit", lambda x: asked.append(x) is None)
    fused = _run(block, fused=True, half=False, branch=branch)
    assert len(asked) == 2
    for name, truth in modules.items():
        assert _distance(fused[name], truth) <= 1e-5, name


@pytest.mark.gpu
@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize(("width", "heads"), [(384, 12), (768, 12)])
def test_on_cuda_it_is_as_near_to_float64_as_the_modules_are(
    width: int, heads: int, branch: bool
) -> None:
    _assert_as_good_as_modules(width, heads, 197, "cuda", branch=branch)


@pytest.mark.parametrize("used", ["stream", "branch"])
def test_either_result_may_be_used_alone(used: str) -> None:
    block = _block(torch.float64)
    modules, fused = (
        _run(block, fused=fused, half=False, branch=True, used=used) for fused in (False, True)
    )
    for name, truth in modules.items():
        assert _distance(fused[name], truth) <= 1e-12, name


def test_without_gradient_it_is_the_same_and_keeps_nothing() -> None:
    block = _block()
    x, branch = torch.randn(2, B, L, E).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        block.fused = True
        kept = block(x, branch.bfloat16())
        with torch.no_grad():
            free = block(x, branch.bfloat16())
    for a, b in zip(free, kept, strict=True):
        assert torch.equal(a, b.detach())
        assert a.grad_fn is None


@pytest.mark.parametrize("branch", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_what_is_made_again_is_what_was_there(branch: bool, half: bool) -> None:
    """The same operations on the same numbers: not a bit differs from a block that keeps them."""
    block = _block()
    kept = _run(block, fused=True, half=half, branch=branch)
    block.recompute = "full"
    again = _run(block, fused=True, half=half, branch=branch)
    assert again.keys() == kept.keys()
    for name, truth in kept.items():
        assert torch.equal(again[name], truth), name


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_it_goes_back_once(recompute: Recompute) -> None:
    block = _block()
    block.fused, block.recompute = True, recompute
    out = sum(t.sum() for t in block(torch.randn(B, L, E), None))
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="supports one backward pass"):
        out.backward()


def test_a_branch_wider_than_the_stream_is_refused() -> None:
    block = _block()
    block.fused = True
    with pytest.raises(ValueError, match="wider than the stream"):
        block(torch.randn(B, L, E), torch.randn(B, L, E).double())


def _kept(*, fused: bool, branch: bool, recompute: Recompute = "none") -> float:
    """Numbers of 16 bits a token and channel that lie between forward and backward of one block,
    its results aside."""
    rows, width = 8, 384
    with FakeTensorMode():
        block = Block(width, 12, 4 * width, "sdpa")
        block.fused, block.recompute = fused, recompute
        x = torch.empty(rows, 197, width, requires_grad=True)
        added = (
            torch.empty(rows, 197, width, dtype=torch.bfloat16, requires_grad=True)
            if branch
            else None
        )
        live = LiveBytes([*block.parameters(), x])
        with live, torch.autocast("cpu", torch.bfloat16):
            stream, out = block(x, added)
        return (live.now - stream.nbytes - out.nbytes) / (2 * rows * 197 * width)


@pytest.mark.parametrize("branch", [True, False])
def test_eleven_numbers_a_token_and_channel_are_kept(branch: bool) -> None:
    """The stream (2; the first block's is its input), q, k and v (3), attention (1), its projection
    (1), the hidden layer (4)."""
    expected = 11 if branch else 9
    assert (
        expected <= _kept(fused=True, branch=branch) < expected + 0.1
    )  # norms' and attention's statistics
    assert _kept(fused=False, branch=branch) > expected + 5


@pytest.mark.parametrize("branch", [True, False])
def test_three_where_the_rest_is_made_again(branch: bool) -> None:
    """The stream (2; the first block's is its input) and the attention's projection (1)."""
    expected = 3 if branch else 1
    assert expected <= _kept(fused=True, branch=branch, recompute="full") < expected + 0.1


def _small(*, blocks: str):
    recipe = quickstart_digits()
    model = replace(
        recipe.model, architecture="vit_micro", hidden_dim=64, projection_dim=16, attention="sdpa"
    )
    return replace(recipe, precision="fp64", model=replace(model, blocks=blocks))


def _gradients(objective: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("chunk", "lean"), [(0, False), (4, False), (3, True)])
def test_a_step_whole_or_in_chunks_is_that_of_modules(chunk: int, lean: bool) -> None:
    torch.manual_seed(2)
    side = _small(blocks="fused").model.image_size
    view1, view2 = torch.randn(2, 8, 3, side, side, dtype=torch.float64).unbind()
    found = []
    for blocks in ("modules", "fused"):
        objective = build_objective(_small(blocks=blocks), CPU)
        assert {m.fused for m in objective.modules() if isinstance(m, Block)} == {blocks == "fused"}
        if chunk and blocks == "fused":
            step = ChunkedStep(objective, chunk=chunk, kept=1, lean=lean)
            with mock.patch.object(objective, "features", wraps=objective.features) as forward:
                step(view1, view2)
            # Of two chunks of four, or three of three: a second forward only where nothing is kept.
            assert forward.call_count == 3
            assert {block.recompute for block in objective.encoder.blocks} == {"none"}
        else:
            objective(view1, view2).loss.backward()
        found.append(_gradients(objective))
    modules, fused = found
    assert fused.keys() == modules.keys()
    for name, truth in modules.items():
        # A bias before a batch norm has no gradient but rounding's.
        torch.testing.assert_close(fused[name], truth, rtol=1e-9, atol=1e-12, msg=name)


def test_the_planner_counts_the_fused_block() -> None:
    """The same products, none of them twice; of the one block beside the last, 9 numbers a token
    and channel instead of 16."""
    configs = (_small(blocks=blocks) for blocks in ("modules", "fused"))
    nano = (
        replace(config, model=replace(config.model, architecture="vit_nano")) for config in configs
    )
    modules, fused = (measure_costs(config, "bf16") for config in nano)
    assert fused.step_flops == modules.step_flops
    assert fused.recompute_flops == 0
    unit = 2 * 2 * 17 * 64  # two views, 16 bits, tokens, channels
    assert modules.graph.per_image - fused.graph.per_image == pytest.approx(7 * unit, rel=0.02)
    assert fused.train.per_image <= modules.train.per_image


def test_fused_blocks_are_not_compiled() -> None:
    config = _small(blocks="fused")
    objective = build_objective(config, CPU)
    forward_backward = ForwardBackward(config, objective, World(), "fp64")
    assert not forward_backward.compile.compiled


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"compile": True}, "compile=True: blocks=fused"),
        ({"linears": "float8"}, "linears='float8': blocks=fused"),
        ({"checkpointing": "selective"}, "checkpointing='selective': blocks=fused"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ModelConfig(architecture="vit_large", blocks="fused", **options)


def test_a_run_may_change_over() -> None:
    assert differences(_small(blocks="modules"), _small(blocks="fused")) == []


def test_a_copy_of_a_block_stays_fused() -> None:
    block = _block()
    block.fused = True
    assert copy.deepcopy(block).fused
