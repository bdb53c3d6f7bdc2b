"""Captured and replayed passes on a GPU: the numbers of those from Python, no waiting, and all that
happens around a step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastmoco.config import BatchConfig, Config
from fastmoco.distributed.mesh import World
from fastmoco.models.float8_inference import float8_layers, use_float8_inference_
from fastmoco.objectives import MoCoV3
from fastmoco.objectives.chunk_graphs import ChunkGraphs
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.recipes import quickstart_digits
from fastmoco.training.trainer import Trainer
from tests.golden_objective import random_views, rough_objective

pytestmark = pytest.mark.gpu
BATCH, CHUNK = 13, 4


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def case() -> tuple[MoCoV3, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(61)
    objective = rough_objective(depth=3)
    batches = [random_views(objective, BATCH) for _ in range(4)]
    on_gpu = [(view1.float().cuda(), view2.float().cuda()) for view1, view2 in batches]
    return objective.float().cuda(), on_gpu


def train(step: ChunkedStep, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[float, Tensor]]:
    """Loss and all gradients as one vector, of steps with weights that move."""
    objective = step.objective
    trained = [p for p in objective.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    history = []
    for views in batches:
        objective.zero_grad(set_to_none=True)
        loss = step(*views).loss.detach()
        history.append((loss, torch.cat([p.grad.flatten() for p in trained if p.grad is not None])))
        optimizer.step()
        objective.update_momentum_encoder(0.9)
    return [(loss.item(), gradient) for loss, gradient in history]


def compare(
    ours: list[tuple[float, Tensor]], other: list[tuple[float, Tensor]], tolerance: float
) -> None:
    for i, ((loss, gradient), (expected, wanted)) in enumerate(zip(ours, other, strict=True)):
        assert loss == pytest.approx(expected, rel=tolerance), f"loss of step {i}"
        assert (gradient - wanted).norm() <= 20 * tolerance * wanted.norm(), (
            f"gradients of step {i}"
        )


# float32 differs by the order of sums in atomic additions, bf16 by its rounding of what that moved,
# at weights that drift apart.
@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-4), (True, 2e-2)])
@pytest.mark.parametrize("how", [{}, {"kept": 1}, {"kept_images": 6}])
def test_replays_are_the_passes_from_python(
    half: bool, tolerance: float, how: dict[str, int]
) -> None:
    objective, batches = case()
    autocast = partial(torch.autocast, "cuda", torch.bfloat16, enabled=half)
    expected = train(
        ChunkedStep(copy.deepcopy(objective), chunk=CHUNK, autocast=autocast, **how), batches
    )
    graphs = ChunkGraphs(objective, CHUNK, autocast)
    compare(
        train(
            ChunkedStep(objective, chunk=CHUNK, autocast=autocast, graphs=graphs, **how), batches
        ),
        expected,
        tolerance,
    )
    assert graphs._features.captured
    assert graphs._backward.captured


def test_a_replay_does_not_make_the_host_wait_and_takes_no_memory() -> None:
    objective, batches = case()
    step = ChunkedStep(objective, chunk=CHUNK, graphs=ChunkGraphs(objective, CHUNK))
    train(step, batches)
    levels = []
    for views in batches:
        objective.zero_grad(set_to_none=True)
        with no_waiting():
            output = step(*views)
        assert output.loss.isfinite()
        del output
        levels.append(torch.cuda.memory_allocated())
    assert len(set(levels[1:])) == 1


def test_weights_written_in_place_are_seen_and_those_that_moved_are_captured_anew() -> None:
    objective, batches = case()
    graphs = ChunkGraphs(objective, CHUNK)
    step = ChunkedStep(objective, chunk=CHUNK, graphs=graphs)
    train(step, batches)
    state = {
        name: tensor + 0.01 * torch.randn_like(tensor)
        for name, tensor in objective.state_dict().items()
        if "blocks" in name
    }
    first = graphs._backward
    for moved in (False, True):
        objective.load_state_dict(state, strict=False)  # in place, as a restore writes
        if moved:
            weight = objective.encoder.blocks[1].mlp.fc1.weight
            weight.data = weight.data.clone()
        expected = train(ChunkedStep(copy.deepcopy(objective), chunk=CHUNK), batches)
        compare(train(step, batches), expected, 1e-4)
        assert (graphs._backward is first) is not moved


def test_what_is_not_finite_is_gone_in_the_next_step() -> None:
    objective, batches = case()
    expected = train(ChunkedStep(copy.deepcopy(objective), chunk=CHUNK), batches[:1])
    step = ChunkedStep(objective, chunk=CHUNK, graphs=ChunkGraphs(objective, CHUNK))
    buffers = [buffer.clone() for buffer in objective.buffers()]
    bad = batches[1][0].clone()
    bad[2, 0, 0, 0] = torch.nan
    assert step(bad, batches[1][1]).loss.isnan()
    for buffer, before in zip(objective.buffers(), buffers, strict=True):
        buffer.copy_(before)
    compare(train(step, batches[:1]), expected, 1e-4)


def test_compiled_blocks_and_float8_keys_are_captured_too() -> None:
    from fastmoco.models.compiled import compile_blocks

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 products here")
    objective, batches = case()
    use_float8_inference_(objective.momentum_encoder)
    plain = copy.deepcopy(objective)
    compile_blocks(objective)
    compile_blocks(plain)
    autocast = partial(torch.autocast, "cuda", torch.bfloat16)
    runs = []
    for one, graphs in ((plain, None), (objective, ChunkGraphs(objective, CHUNK, autocast))):
        step = ChunkedStep(one, chunk=CHUNK, autocast=autocast, graphs=graphs)
        history = []
        for batch in batches:
            for layer in float8_layers(one):
                layer.refresh_()
            history += train(step, [batch])
        runs.append(history)
    compare(runs[1], runs[0], 2e-2)


def config(*, cuda_graphs: bool) -> Config:
    recipe = quickstart_digits()
    return replace(
        recipe,
        device="cuda",
        precision="fp32",
        global_batch_size=20,
        batch=BatchConfig(chunk=8, kept=0, cuda_graphs=cuda_graphs),
        data=replace(recipe.data, synthetic=True),
        knn=replace(recipe.knn, every_epochs=0),
        optim=replace(recipe.optim, warmup_epochs=0),
    )


def test_trainers_in_one_process_skip_resume_and_go_on(tmp_path: Path) -> None:
    """Two at once, one of them with graphs: a bad batch is skipped by both, and a restart goes on
    where it stood."""
    world = World(device=torch.device("cuda", torch.cuda.current_device()))
    trainers = {
        graphs: Trainer.build(config(cuda_graphs=graphs), tmp_path / str(graphs), world)
        for graphs in (False, True)
    }
    again = None
    try:
        losses: dict[bool, list[float]] = {False: [], True: []}
        for i in range(5):
            for graphs, trainer in trainers.items():
                batch = trainer.loader.next()
                view1 = batch.views[0].to(world.device, torch.float32, copy=True)
                if i == 3:
                    view1[0] = torch.nan
                batch = replace(batch, views=(view1, batch.views[1].to(world.device)))
                if i >= 2:  # step 1 is logged, and captures
                    with no_waiting():
                        output = trainer.step(batch)
                else:
                    output = trainer.step(batch)
                losses[graphs].append(output.loss.item())
        assert [loss == loss for loss in losses[True]] == [True, True, True, False, True]
        for i in (0, 1, 2, 4):
            assert losses[True][i] == pytest.approx(
                losses[False][i], rel=1e-2
            )  # AdamW makes full steps of rounding
        trainers[True]._save(force=True)
        weights = {
            name: tensor.clone() for name, tensor in trainers[True].objective.state_dict().items()
        }
        trainers[True].close()
        again = Trainer.build(config(cuda_graphs=True), tmp_path / "True", world)
        assert again.step_count == 5
        assert all(
            torch.equal(weights[name], tensor)
            for name, tensor in again.objective.state_dict().items()
        )
        assert again.step(again.loader.next()).loss.isfinite()
    finally:
        for trainer in (*trainers.values(), *([again] if again is not None else [])):
            trainer.close()
