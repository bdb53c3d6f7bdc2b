"""A step in its order: what is read once, what is frozen for a time, what is told to the objective,
and which rates it has.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmoco.config import Config
from fastmoco.objectives.interface import Progress
from fastmoco.training.profiling.counting import StepCounter
from tests.step_runs import images_of, running, short_run


def test_gradients_are_read_once_for_the_guard_clipping_telemetry_and_rollback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = short_run("cpu")
    config = replace(
        config,
        optim=replace(config.optim, clip_norm=0.1),
        faults=replace(config.faults, rollback_spike=10),
        checkpoint=replace(config.checkpoint, every_steps=50),
    )
    passes = []
    norms = torch._foreach_norm
    monkeypatch.setattr(
        torch, "_foreach_norm", lambda *args: passes.append(len(args[0])) or norms(*args)
    )
    with running(config, tmp_path, "cpu") as trainer:
        trained = sum(p.requires_grad for p in trainer.objective.parameters())
        trainer.loader.next = lambda: images_of(config, 0, "cpu")  # type: ignore[method-assign]
        trainer._one_step()
        assert passes == [trained]
        assert [step for step, _ in trainer.rollback.state_dict()["history"]] == [1]


def test_the_objective_hears_of_a_step_in_its_order_and_at_one_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = short_run("cpu")
    heard: list[tuple[str, Progress]] = []
    with running(config, tmp_path, "cpu") as trainer:
        for name in ("before_step", "after_backward", "frozen", "ema_momentum", "after_step"):
            plain = getattr(trainer.objective, name)

            def hearing(*args: Any, name: str = name, plain: Any = plain) -> Any:
                heard.append((name, args[-1]))
                return plain(*args)

            monkeypatch.setattr(trainer.objective, name, hearing)
        trainer.step_count = 3
        trainer.step(images_of(config, 3, "cpu"))
        assert [name for name, _ in heard] == [
            "before_step",
            "after_backward",
            "frozen",
            "ema_momentum",
            "after_step",
        ]
        assert {at for _, at in heard} == {trainer.progress(3)}
        assert len({id(at) for _, at in heard}) == 1


@pytest.mark.parametrize("backend", ["torch", "fastmoco"])
def test_a_parameter_that_is_frozen_for_a_step_stays_and_moves_in_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Any
) -> None:
    config = short_run("cpu")
    config = replace(config, optim=replace(config.optim, fused_backend=backend))
    name = "encoder.head.0.weight"
    with running(config, tmp_path, "cpu") as trainer:
        monkeypatch.setattr(
            trainer.objective, "frozen", lambda at: frozenset([name] if at.step == 0 else [])
        )
        parameters = dict(trainer.objective.named_parameters())
        start = {name: p.detach().clone() for name, p in parameters.items()}
        trainer.step(images_of(config, 0, "cpu"))
        assert torch.equal(parameters[name], start[name])
        assert not torch.equal(parameters["encoder.head.3.weight"], start["encoder.head.3.weight"])
        trainer.step(images_of(config, 1, "cpu"))
        assert not torch.equal(parameters[name], start[name])


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_rates_follow_every_number_of_the_config(
    small_run: Config, tmp_path: Path, schedule: Any
) -> None:
    """Against the definitions, with no number at its default."""
    config = replace(
        small_run,
        epochs=7,
        global_batch_size=128,
        optim=replace(small_run.optim, lr=0.03, warmup_epochs=2),
        objective=replace(small_run.objective, ema_momentum=0.9, ema_schedule=schedule),
    )
    with running(config, tmp_path, "cpu") as trainer:
        per_epoch, total = trainer.resolved.steps_per_epoch, trainer.resolved.total_steps
        assert (per_epoch, total) == (11, 77)
        for step in range(total):
            epoch, at = step / 11, trainer.progress(step)
            rise, fall = epoch / 2, 0.5 * (1 + math.cos(math.pi * (epoch - 2) / 5))
            lr = 0.03 * 128 / 256 * (rise if epoch < 2 else fall)
            assert trainer.train_step.learning_rate(at) == pytest.approx(lr, rel=1e-12)

            # The average that made a step's keys moved at the end of the step before.
            momentum = 1 - 0.5 * (1 + math.cos(math.pi * epoch / 7)) * 0.1
            expected = pytest.approx(momentum if schedule == "cosine" else 0.9, rel=1e-12)
            assert trainer.objective.schedules(at)["ema_momentum"] == expected
            if step:
                assert trainer.objective.ema_momentum(trainer.progress(step - 1)) == expected
        assert trainer.objective.ema_momentum(trainer.progress(total - 1)) is None


@pytest.mark.parametrize("backend", ["torch", "fastmoco"])
def test_figures_of_the_weights_change_no_bit_and_wait_for_nothing(
    backend: Any, tmp_path: Path
) -> None:
    config = short_run("cpu")
    config = replace(config, optim=replace(config.optim, fused_backend=backend))
    ended = []
    for figures in (False, True):
        counter = StepCounter()
        with running(config, tmp_path / str(figures), "cpu") as trainer:
            for number in range(3):
                batch = images_of(config, number, "cpu")
                at = trainer.progress(number)
                result = trainer.train_step(batch, at, accuracy=True, figures=figures)
            trainer.step_count = 3
            tensors, _ = trainer._state()
            ended.append({name: tensor.clone() for name, tensor in tensors.items()})
            places = [name for name in result.norms if name != "total"]
            expected = {f"update_ratio/{place}" for place in places}
            expected |= {"ema_distance", "batch_norm_drift"}
            assert result.figures.keys() == (expected if figures else set())
            assert all(0 < value.item() < 1 for value in result.figures.values())

            # On a CPU fastmoco's sweep reads its numbers on the host, and other kernels are counted.
            if figures and backend == "torch":
                with counter:
                    trainer.train_step(batch, at, accuracy=True, figures=True)
        assert not counter.waits
        assert bool(counter.operators) == (figures and backend == "torch")
    without, with_figures = ended
    assert without.keys() == with_figures.keys()
    assert all(torch.equal(without[name], with_figures[name]) for name in without)
