"""The training step on the device where it will run: against float64, in chunks, after a bad step,
and continued.

Each test has a form for the CPU, so that a GPU machine meets no test that never ran. What only CUDA
has, waits and allocator, is in test_step_waits_gpu.py.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmoco.objectives.build import build_objective
from fastmoco.training import state as training_state
from fastmoco.training.trainer import Trainer
from tests.step_runs import (
    after_backward,
    clear_images,
    distance,
    gradients_of,
    images_of,
    plain_step,
    poisoned,
    running,
    short_run,
)

cuda = pytest.param("cuda", marks=pytest.mark.gpu)
on_each_device = pytest.mark.parametrize("device", ["cpu", cuda])


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Copies of weights, buffers, averages and the optimizer's state; not of random numbers, which
    no step draws."""
    state = training_state.collect(trainer.objective, trainer.optimizer)
    return {name: tensor.clone() for name, tensor in state.items() if not name.startswith("rng.")}


def differing(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> list[str]:
    assert one.keys() == two.keys()
    return [name for name in one if not torch.equal(one[name], two[name])]


def assert_same_run(one: Mapping[str, Tensor], two: Mapping[str, Tensor], device: str) -> None:
    """Bit for bit on a CPU. On a card a library may choose another product, and one ReLU that flips
    is 2e-3 of a gradient.

    What is lost there all the same, a moment or a buffer, is as large as itself.
    """
    assert one.keys() == two.keys()
    if device == "cpu":
        assert differing(one, two) == []
        return
    kinds: dict[str, list[str]] = {}
    for name in one:
        part = name.rpartition(".")[2]
        kind = (
            part
            if name.startswith("optimizer.") or "running" in part or "num_" in part
            else "weights"
        )
        kinds.setdefault(kind, []).append(name)
    assert {
        "weights",
        "running_mean",
        "running_var",
        "exp_avg",
        "exp_avg_sq",
        "step",
    } <= kinds.keys()
    for kind, names in kinds.items():
        limit = {"weights": 1e-4, "step": 0.0, "num_batches_tracked": 0.0}.get(kind, 1e-2)
        assert (
            distance({name: one[name] for name in names}, {name: two[name] for name in names})
            <= limit
        ), kind


# Whole; chunks that do not divide the batch, without kept graphs, with one, with all.
@on_each_device
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("chunk", "kept"), [("none", "auto"), (20, 0), (20, 1), (20, 3)])
def test_loss_and_gradients_are_as_near_to_float64_as_plain_torch(
    device: str, precision: str, chunk: Any, kept: Any, tmp_path: Path
) -> None:
    _require_as_near_as_torch(device, tmp_path, precision=precision, chunk=chunk, kept=kept)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("attention", "precision"),
    [("triton", "bf16"), ("explicit", "bf16"), ("explicit", "fp32"), ("efficient", "fp32")],
)
def test_so_they_are_under_other_attention(attention: str, precision: str, tmp_path: Path) -> None:
    _require_as_near_as_torch(
        "cuda", tmp_path, precision=precision, chunk=20, kept=1, attention=attention
    )


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", ["none", 20])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_so_they_are_where_blocks_are_compiled(chunk: Any, precision: str, tmp_path: Path) -> None:
    _require_as_near_as_torch(
        "cuda", tmp_path, precision=precision, chunk=chunk, kept=1, compile=True
    )


def _require_as_near_as_torch(device: str, out: Path, *, precision: str, **options: Any) -> None:
    """A multiple of what the plain forward in torch loses in the same precision, for all of the
    gradient and for each tensor.

    In float32 the multiple is 10: of a few millionths, and a card may put float32 products together
    from narrower ones. There the loss multiplies unit rows in bf16 whatever the run's precision;
    rounding them so in float64 moves the gradient by 1.6e-3, and no tensor of it by more than
    2.4e-3.
    """
    config = short_run(device, precision=precision, **options)
    found: dict[str, Tensor] = {}
    with running(config, out, device) as trainer:
        # Not a copy: a copy of a compiled block calls the block that it was copied from.
        start = build_objective(config, trainer.world.device)
        start.load_state_dict(trainer.objective.state_dict())
        reference = copy.deepcopy(start).cpu().double()
        batch = clear_images(config, reference, device)
        exact_loss, exact = plain_step(reference, batch, "fp64")
        for part in start.modules():  # the peer is torch alone
            if hasattr(part, "backend"):
                part.backend = "explicit"
        _, plain = plain_step(start, batch, precision)
        with after_backward(trainer, lambda: found.update(gradients_of(trainer.objective))):
            output = trainer.step(batch)
    sharp = precision == "fp32"
    assert output.loss.item() == pytest.approx(exact_loss, rel=1e-3 if sharp else 1e-2)
    # Batch norms of so few images enlarge rounding; were it the gradient's own size, nothing would
    # be told apart.
    assert distance(plain, exact) <= (2e-5 if sharp else 0.3)
    multiple, share, floor = (10, 1e-4, 1e-5) if sharp else (2, 0, 0)
    if sharp and device == "cuda":
        share, floor = 8e-3, 1e-4
    assert distance(found, exact) <= multiple * distance(plain, exact) + (share if sharp else 0)
    if not sharp:  # two roundings of one small tensor may differ more than those of all of them
        multiple, share, floor = 3, 0.15, 0.02
    whole = math.sqrt(sum(float(gradient.square().sum()) for gradient in exact.values()))
    for name, gradient in exact.items():
        lost = float((plain[name] - gradient).norm())
        allowed = multiple * lost + share * float(gradient.norm()) + floor * whole
        assert float((found[name] - gradient).norm()) <= allowed, name


@on_each_device
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_two_steps_in_chunks_are_two_steps_on_the_whole_in_float64(
    device: str, kept: int, tmp_path: Path
) -> None:
    states = []
    for chunk in ("none", 20):
        config = short_run(device, precision="fp64", chunk=chunk, kept=kept)
        with running(config, tmp_path / str(chunk), device) as trainer:
            losses = [
                trainer.step(images_of(config, step, device)).loss.item() for step in range(2)
            ]
            states.append(
                {**state_of(trainer), "losses": torch.tensor(losses, dtype=torch.float64)}
            )
    assert distance(*states) <= 1e-10
    assert states[0]["losses"].tolist() == pytest.approx(states[1]["losses"].tolist(), abs=1e-11)


@pytest.mark.gpu
def test_the_card_takes_the_steps_of_a_cpu_in_float64(tmp_path: Path) -> None:
    states = []
    for device in ("cpu", "cuda"):
        config = short_run("cuda", precision="fp64")  # one model on both
        with running(config, tmp_path / device, device) as trainer:
            for step in range(2):
                trainer.step(images_of(config, step, device))
            states.append(state_of(trainer))
    assert distance(*states) <= 1e-9


@on_each_device
@pytest.mark.parametrize("backend", ["torch", "fastmoco"])
def test_weights_and_average_move_as_by_adamw_and_average_in_float64(
    device: str, backend: Any, tmp_path: Path
) -> None:
    """From the gradients that the run had, so that only the end of a step is looked at; 3 steps,
    all three moments of AdamW."""
    config = short_run(device, precision="bf16")
    config = replace(config, optim=replace(config.optim, fused_backend=backend))
    with running(config, tmp_path, device) as trainer:
        exact = copy.deepcopy(trainer.objective).cpu().double()
        named = {
            name: parameter
            for name, parameter in exact.named_parameters()
            if parameter.requires_grad
        }
        rules = config.optim
        optimizer = torch.optim.AdamW(
            named.values(),
            betas=rules.betas,
            eps=rules.eps,
            weight_decay=rules.weight_decay,
            foreach=False,
        )
        for step in range(3):
            found: dict[str, Tensor] = {}
            with after_backward(
                trainer, lambda found=found: found.update(gradients_of(trainer.objective))
            ):
                trainer.step(images_of(config, step, device))
            for name, parameter in named.items():
                parameter.grad = found[name]
            optimizer.param_groups[0]["lr"] = trainer.train_step.learning_rate(
                trainer.progress(step)
            )
            optimizer.step()
            momentum = trainer.objective.schedules(trainer.progress(step + 1))["ema_momentum"]
            with torch.no_grad():
                for average, own in zip(
                    exact.momentum_encoder.parameters(), exact.encoder.parameters(), strict=True
                ):
                    average.lerp_(own, 1 - momentum)
        before, after = dict(exact.named_parameters()), dict(trainer.objective.named_parameters())
        for name, parameter in after.items():
            # 3 steps of lr = 2.8e-4 round three times; an update lost or doubled is a hundred times
            # this.
            torch.testing.assert_close(
                parameter.cpu().double(), before[name], rtol=1e-6, atol=1e-6, msg=name
            )


@on_each_device
@pytest.mark.parametrize(
    ("chunk", "backend"), [("none", "torch"), ("none", "fastmoco"), (20, "fastmoco")]
)
def test_a_bad_step_leaves_no_trace_and_the_next_is_that_of_a_run_without_it(
    device: str, chunk: Any, backend: Any, tmp_path: Path
) -> None:
    config = short_run(device, chunk=chunk, kept=1, attention="explicit")
    config = replace(config, optim=replace(config.optim, fused_backend=backend))
    ends = []
    for fed in (True, False):
        with running(config, tmp_path / str(fed), device) as trainer:
            trainer.step(images_of(config, 0, device))
            before = state_of(trainer)
            if fed:
                assert not math.isfinite(
                    trainer.step(poisoned(images_of(config, 1, device))).loss.item()
                )
                assert differing(before, state_of(trainer)) == []
                assert trainer.guard.report(2) == [
                    "warning: 1 step up to step 2 skipped, loss or gradients not finite (1 so far)"
                ]
            else:
                trainer.step_count += 1
            trainer.step(images_of(config, 2, device))
            after = state_of(trainer)
            assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())
            assert len(differing(before, after)) > 20
            ends.append(after)
    assert_same_run(*ends, device)


@on_each_device
def test_infinite_gradients_under_a_finite_loss_leave_no_trace_either(
    device: str, tmp_path: Path
) -> None:
    config = short_run(device, precision="bf16", chunk=20, kept=1)
    with running(config, tmp_path, device) as trainer:
        trainer.step(images_of(config, 0, device))
        before = state_of(trainer)

        def spoil() -> None:
            gradient = trainer.objective.encoder.cls_token.grad
            assert gradient is not None
            gradient.flatten()[0] = math.inf

        with after_backward(trainer, spoil):
            assert math.isfinite(trainer.step(images_of(config, 1, device)).loss.item())
        assert differing(before, state_of(trainer)) == []


@on_each_device
@pytest.mark.parametrize("chunk", ["none", 20])
def test_a_run_continued_from_a_checkpoint_is_the_run_without_a_break(
    device: str, chunk: Any, tmp_path: Path
) -> None:
    config = short_run(device, precision="fp32", chunk=chunk, kept=1, attention="explicit")
    config = replace(
        config, checkpoint=replace(config.checkpoint, every_steps=2, keep=9, async_save=False)
    )
    with running(config, tmp_path / "whole", device) as trainer:
        assert trainer.run() == 0
        whole = state_of(trainer)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "DONE").unlink()
    for folder in sorted((tmp_path / "cut" / "checkpoints").iterdir())[2:]:
        shutil.rmtree(folder)
    with running(config, tmp_path / "cut", device) as trainer:
        assert trainer.step_count == 4
        assert trainer.run() == 0
        assert_same_run(state_of(trainer), whole, device)
