"""A step with a loss or gradient that is not finite leaves no bit behind, on one rank and on two;
too many end the run."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from benchmarks.op_counts import OperationCounter
from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.telemetry.stability import gradient_norms
from fastmoco.training import state as training_state
from fastmoco.training.step_guard import StepGuard, copies_of
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import Batch
from tests.checkpoint_content import group_of_one
from tests.step_runs import after_backward

pytestmark = pytest.mark.faults

WORLD = World()


def poison(batch: Batch, value: float = math.nan) -> Batch:
    """One bad pixel."""
    view1 = batch.views[0].clone()
    view1[0, 0, 0, 0] = value
    return replace(batch, views=(view1, *batch.views[1:]))


def steps(
    config: Config, out: Path, *, bad: set[int], fed: bool
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """State and losses after 6 steps, of which the bad ones saw a NaN or, unless fed, never
    were."""
    trainer = Trainer.build(config, out, WORLD)
    losses = []
    try:
        for number in range(6):
            batch = trainer.loader.next()
            if number not in bad:
                losses.append(trainer.step(batch).loss.item())
            elif fed:
                assert not math.isfinite(trainer.step(poison(batch)).loss.item())
            else:
                trainer.step_count += 1
        state = {
            name: tensor.clone()
            for name, tensor in training_state.collect(trainer.objective, trainer.optimizer).items()
        }
        assert all(
            torch.isfinite(tensor).all() for tensor in state.values() if tensor.is_floating_point()
        )
    finally:
        trainer.close()
    return state, losses


OPTIMIZERS: list[dict[str, Any]] = [
    {"fused_backend": "torch"},
    {"fused_backend": "fastmoco"},
    {"name": "lars", "lr": 0.3},
    {"fused_backend": "fastmoco", "clip_norm": 0.5},
]


CASES = {
    "torch": (OPTIMIZERS[0], {2, 3}),
    "fastmoco": (OPTIMIZERS[1], {2, 3}),
    "lars": (OPTIMIZERS[2], {2, 3}),
    "clipped": (OPTIMIZERS[3], {2, 3}),
    "first step": (OPTIMIZERS[1], {0}),
    "first step of torch": (OPTIMIZERS[0], {0}),
    "first step of lars": (OPTIMIZERS[2], {0}),
}


# By every optimizer; with clipping; and before the optimizer has any state.
@pytest.mark.parametrize(("optim", "bad"), CASES.values(), ids=CASES)
def test_a_bad_step_leaves_the_state_of_a_run_that_never_saw_it(
    brief_run: Config, tmp_path: Path, optim: dict[str, Any], bad: set[int]
) -> None:
    config = replace(brief_run, optim=replace(brief_run.optim, **optim))
    fed, fed_losses = steps(config, tmp_path / "fed", bad=bad, fed=True)
    never, losses = steps(config, tmp_path / "never", bad=bad, fed=False)
    assert fed_losses == losses
    assert fed.keys() == never.keys()
    different = [name for name in fed if not torch.equal(fed[name], never[name])]
    assert not different
    counters = [fed[name] for name in fed if name.endswith(".step")]
    assert all(counter == 6 - len(bad) for counter in counters)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exactly_the_numbers_that_are_not_finite_are_bad(dtype: torch.dtype) -> None:
    numbers = [0.0, -0.0, 1.0, -1.0, 1e-45, torch.finfo(torch.float32).max, -3e38]
    numbers += [math.inf, -math.inf, math.nan]
    guard = StepGuard(torch.nn.BatchNorm1d(1), WORLD, patience=9)
    bad_steps = 0
    for first in numbers:
        for second in numbers:
            # In bfloat16 the largest float32 is infinite, and the smallest is zero.
            loss, norm = torch.tensor(first, dtype=dtype), torch.tensor(second)
            expected = not (math.isfinite(loss.item()) and math.isfinite(norm.item()))
            assert guard.judge(loss, norm).item() == expected, (first, second)
            bad_steps += expected
    assert guard._counts.tolist()[0] == bad_steps


@pytest.mark.parametrize("chunk", ["none", 16])
def test_infinite_gradients_under_a_finite_loss_are_skipped_too(
    brief_run: Config, tmp_path: Path, chunk: Any
) -> None:
    config = replace(brief_run, batch=replace(brief_run.batch, chunk=chunk))
    trainer = Trainer.build(config, tmp_path, WORLD)
    try:
        trainer.step(trainer.loader.next())
        before = {name: tensor.clone() for name, tensor in trainer.objective.state_dict().items()}

        def spoil() -> None:
            gradient = trainer.objective.predictor[0].weight.grad
            assert gradient is not None
            gradient[0, 0] = math.inf

        with after_backward(trainer, spoil):
            assert math.isfinite(trainer.step(trainer.loader.next()).loss.item())
        after = trainer.objective.state_dict()
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        assert trainer.guard.report(2) == [
            "warning: 1 step up to step 2 skipped, loss or gradients not finite (1 so far)"
        ]
        assert trainer.guard.report(3) == []
    finally:
        trainer.close()


def test_a_run_goes_on_after_bad_steps_and_ends_after_too_many(
    brief_run: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = replace(
        brief_run,
        epochs=2,
        optim=replace(brief_run.optim, warmup_epochs=1),
        faults=replace(brief_run.faults, max_skipped_steps=3),
    )
    for bad, ends in (({2, 5, 6}, False), ({4, 5, 6}, True)):
        trainer = Trainer.build(config, tmp_path / str(ends), WORLD)
        good = trainer.loader.next
        monkeypatch.setattr(trainer.loader, "next", lambda good=good, bad=bad: _maybe(good(), bad))
        try:
            if ends:
                with pytest.raises(
                    RunError, match=r"3 steps in a row up to step 7 .* Lower --optim.lr"
                ):
                    trainer.run()
            else:
                assert trainer.run() == 0
                assert "2 steps" not in (text := capsys.readouterr().out)
                assert text.count("warning: 1 step up to") == 3
        finally:
            trainer.close()


def _maybe(batch: Batch, bad: set[int]) -> Batch:
    return poison(batch) if batch.step in bad else batch


def test_gradients_are_clipped_to_the_norm_and_shorter_ones_left_alone(
    brief_run: Config, tmp_path: Path
) -> None:
    norms = []
    for clip in (0.0, 1e-3, 1e3):
        config = replace(brief_run, optim=replace(brief_run.optim, clip_norm=clip))
        trainer = Trainer.build(config, tmp_path / str(clip), WORLD)
        try:
            before = trainer.step(trainer.loader.next()).norms["total"].item()
            after = gradient_norms(trainer.objective.named_parameters(), {})["total"].item()
            norms.append((before, after))
        finally:
            trainer.close()
    whole = norms[0][0]
    assert whole > 0.01
    assert [before for before, _ in norms] == [
        whole
    ] * 3  # what is recorded is the norm before clipping
    assert norms[0][1] == norms[2][1] == whole
    assert norms[1][1] == pytest.approx(1e-3, rel=1e-5)


def test_a_step_draws_no_random_numbers(brief_run: Config, tmp_path: Path) -> None:
    """What a skipped step would otherwise have to put back."""
    trainer = Trainer.build(brief_run, tmp_path, WORLD)
    try:
        before = torch.get_rng_state()
        trainer.step(trainer.loader.next())
        assert torch.equal(before, torch.get_rng_state())
    finally:
        trainer.close()


def test_the_norm_of_shards_and_whole_tensors_is_that_of_all_of_them() -> None:
    with group_of_one():
        mesh = init_device_mesh("cpu", (1,))
        whole = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
        mixed = [
            distribute_tensor(whole[0], mesh, [Shard(0)]),
            whole[1],
            distribute_tensor(whole[2], mesh, [Shard(0)]),
        ]
        expected = torch.cat([tensor.flatten() for tensor in whole]).norm()
        torch.testing.assert_close(_norm(mixed), expected)
        mixed[2].to_local()[0, 0] = math.nan
        assert not torch.isfinite(_norm(mixed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_norm_is_that_which_torch_clips_by(dtype: torch.dtype) -> None:
    """To the bit, so that clipping shortens as `torch.nn.utils.clip_grad_norm_` does; in the width
    of the gradients."""
    noise = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, 7, generator=noise, dtype=dtype) for size in range(1, 80)]
    ours = _norm(gradients)
    assert ours.dtype == dtype
    assert torch.equal(ours, torch.nn.utils.get_total_norm(gradients))


def _norm(gradients: list[torch.Tensor]) -> torch.Tensor:
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    return gradient_norms([(str(i), parameter) for i, parameter in enumerate(parameters)], {})[
        "total"
    ]


@pytest.mark.parametrize("bad", [True, False])
def test_buffers_of_every_type_and_layout_are_restored_to_the_bit_or_left_alone(bad: bool) -> None:
    def buffers(values: list[float]) -> list[torch.Tensor]:
        rows = torch.tensor(values).reshape(2, 4)
        return [
            rows.clone(),
            rows.t().clone().t(),  # not contiguous
            rows[0, 0].clone(),
            rows.to(torch.float64),
            rows.nan_to_num(0.0, 7.0, -7.0).to(torch.int64),
            rows > 0,
            torch.empty(0),
        ]

    before = [1.5, -0.0, math.inf, 4.0, math.nan, -6.0, 7.25, 0.0]
    after = [math.nan, 0.0, -math.inf, 5.0, 1.0, math.nan, -8.0, -0.0]
    held = buffers(before)
    copies = copies_of(held)
    assert len(copies) == 4  # one for each type
    for copy in copies:
        copy.take()
    for buffer, value in zip(held, buffers(after), strict=True):
        buffer.copy_(value)
    for copy in copies:
        copy.restore(torch.tensor(bad))
    for buffer, expected in zip(held, buffers(before if bad else after), strict=True):
        assert buffer.numpy().tobytes() == expected.numpy().tobytes()
        assert buffer.stride() == expected.stride()


def test_the_number_of_operators_does_not_grow_with_the_number_of_buffers() -> None:
    def operators(buffers: list[torch.Tensor]) -> int:
        copies = copies_of(buffers)
        with OperationCounter() as counter:
            for copy in copies:
                copy.take()
                copy.restore(torch.tensor(True))
        return counter.counts.total.operations

    few = [torch.ones(3), torch.ones(2, 2)]
    assert operators(few) == operators(few * 20)
