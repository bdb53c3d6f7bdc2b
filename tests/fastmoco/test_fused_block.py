"""The fused block is the block of modules: outputs, every gradient, chunks, what is kept, what is planned and counted."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmoco.config import ModelConfig
from fastmoco.config_json import differences
from fastmoco.distributed.mesh import World
from fastmoco.gradients import Gradients
from fastmoco.live_bytes import LiveBytes
from fastmoco.models.blocks import Block
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.recipes import quickstart_digits
from fastmoco.setup_run import build_objective
from fastmoco.step_costs import measure_costs

B, L, E, A = 3, 17, 48, 4
CPU = torch.device("cpu")


def _block(dtype: torch.dtype = torch.float32) -> Block:
    torch.manual_seed(0)
    block = Block(E, A, 4 * E, "sdpa").to(dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)  # biases and norms of their own, too
    return block


def _run(block: Block, *, fused: bool, half: bool, branch: bool, used: str = "both") -> dict[str, Tensor]:
    """Outputs and all gradients by name."""
    block.fused = fused
    block.zero_grad()
    dtype = block.norm1.weight.dtype
    torch.manual_seed(1)
    x = torch.randn(B, L, E, dtype=dtype, requires_grad=True)
    added = torch.randn(B, L, E).to(torch.bfloat16 if half else dtype).requires_grad_() if branch else None
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        stream, out = block(x, added)
    assert out is not None
    outputs = {"both": [stream, out], "stream": [stream], "branch": [out]}[used]
    torch.autograd.backward(outputs, [torch.randn_like(t) for t in outputs])
    found = {"stream": stream.detach(), "branch": out.detach(), "dx": x.grad} | (
        {"dbranch": added.grad} if added is not None else {}
    )
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
    modules, fused = (_run(block, fused=fused, half=False, branch=branch) for fused in (False, True))
    assert fused.keys() == modules.keys()
    for name, truth in modules.items():
        assert (fused[name].dtype, fused[name].shape) == (truth.dtype, truth.shape), name
        assert _distance(fused[name], truth) <= tolerance, name


@pytest.mark.parametrize("branch", [True, False])
def test_under_autocast_they_differ_by_units_in_the_last_place(branch: bool) -> None:
    block = _block()
    modules, fused = (_run(block, fused=fused, half=True, branch=branch) for fused in (False, True))
    for name, other in modules.items():
        assert fused[name].dtype == other.dtype, name
        assert _distance(fused[name], other) <= 2 * torch.finfo(torch.bfloat16).eps, name


@pytest.mark.parametrize("used", ["stream", "branch"])
def test_either_result_may_be_used_alone(used: str) -> None:
    block = _block(torch.float64)
    modules, fused = (_run(block, fused=fused, half=False, branch=True, used=used) for fused in (False, True))
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


def test_it_goes_back_once() -> None:
    block = _block()
    block.fused = True
    out = sum(t.sum() for t in block(torch.randn(B, L, E), None))
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="goes back once"):
        out.backward()


def test_a_branch_wider_than_the_stream_is_refused() -> None:
    block = _block()
    block.fused = True
    with pytest.raises(ValueError, match="wider than the stream"):
        block(torch.randn(B, L, E), torch.randn(B, L, E).double())


def _kept(*, fused: bool, branch: bool) -> float:
    """Numbers of 16 bits a token and channel that lie between forward and backward of one block, its results aside."""
    rows, width = 8, 384
    with FakeTensorMode():
        block = Block(width, 12, 4 * width, "sdpa")
        block.fused = fused
        x = torch.empty(rows, 197, width, requires_grad=True)
        added = torch.empty(rows, 197, width, dtype=torch.bfloat16, requires_grad=True) if branch else None
        live = LiveBytes([*block.parameters(), x])
        with live, torch.autocast("cpu", torch.bfloat16):
            stream, out = block(x, added)
        return (live.now - stream.nbytes - out.nbytes) / (2 * rows * 197 * width)


@pytest.mark.parametrize("branch", [True, False])
def test_eleven_numbers_a_token_and_channel_are_kept(branch: bool) -> None:
    """The stream (2; the first block's is its input), q, k and v (3), attention (1), its projection (1), the hidden layer (4)."""
    expected = 11 if branch else 9
    assert expected <= _kept(fused=True, branch=branch) < expected + 0.1  # norms' and attention's statistics
    assert _kept(fused=False, branch=branch) > expected + 5


def _small(*, blocks: str):
    recipe = quickstart_digits()
    model = replace(recipe.model, architecture="vit_micro", hidden_dim=64, projection_dim=16, attention="sdpa")
    return replace(recipe, precision="fp64", model=replace(model, blocks=blocks))


def _gradients(objective: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("chunk", [0, 4])
def test_a_step_whole_or_in_chunks_is_that_of_modules(chunk: int) -> None:
    torch.manual_seed(2)
    side = _small(blocks="fused").model.image_size
    view1, view2 = torch.randn(2, 8, 3, side, side, dtype=torch.float64).unbind()
    found = []
    for blocks in ("modules", "fused"):
        objective = build_objective(_small(blocks=blocks), CPU)
        assert {m.fused for m in objective.modules() if isinstance(m, Block)} == {blocks == "fused"}
        if chunk and blocks == "fused":
            ChunkedStep(objective, chunk=chunk, kept=1)(view1, view2)
        else:
            objective(view1, view2).loss.backward()
        found.append(_gradients(objective))
    modules, fused = found
    assert fused.keys() == modules.keys()
    for name, truth in modules.items():
        # A bias before a batch norm has no gradient but rounding's.
        torch.testing.assert_close(fused[name], truth, rtol=1e-9, atol=1e-12, msg=name)


def test_the_planner_counts_the_fused_block() -> None:
    """The same products, none of them twice, and fewer bytes."""
    modules, fused = (measure_costs(_small(blocks=blocks), "bf16") for blocks in ("modules", "fused"))
    assert fused.step_flops == modules.step_flops
    assert fused.recompute_flops == 0
    assert fused.graph.per_image < 0.7 * modules.graph.per_image
    assert fused.train.per_image < 0.8 * modules.train.per_image


def test_fused_blocks_are_not_compiled() -> None:
    config = _small(blocks="fused")
    objective = build_objective(config, CPU)
    gradients = Gradients(config, objective, World(), "fp64")
    assert not gradients.compile.compiled


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"compile": True}, "compile=True: blocks=fused"),
        ({"linears": "float8"}, "linears='float8': blocks=fused"),
        ({"checkpointing": "selective"}, "checkpointing='selective': blocks=fused"),
        ({"checkpointing": "full"}, "checkpointing='full': blocks=fused"),
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
