"""The optimizer's backends in the trainer: one training whoever takes the step, through checkpoints
in both directions."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmoco.checkpoint import load_latest, saver
from fastmoco.config import Config
from fastmoco.config.serial import differences, from_json, to_json
from fastmoco.distributed.mesh import World
from fastmoco.objectives.build import build_objective
from fastmoco.optim.averaged import AveragedOptimizer
from fastmoco.optim.build import build_optimizer, choose_optimizer_backend, name_of
from fastmoco.run.folder import RunFolder
from fastmoco.training.trainer import Trainer
from tests.command_line import main
from tests.golden_objective import train_step

CPU = torch.device("cpu")
CUT = 6
STEPS = 15
Losses = list[tuple[int, float]]


@pytest.fixture(scope="module")
def config(brief_run: Config) -> Config:
    """15 steps of 24 digits, through warm-up and the whole of both schedules."""
    rules = replace(brief_run.checkpoint, every_steps=0)
    config = replace(brief_run, epochs=1, global_batch_size=24, precision="fp64", checkpoint=rules)
    return with_optim(config, lr=config.optim.lr * 64 / 24)  # the rate of a batch of 64


def with_optim(config: Config, **changes: Any) -> Config:
    return replace(config, optim=replace(config.optim, **changes))


def train(config: Config, out: Path, max_steps: int | None = None) -> Losses:
    """Train on from whatever is in ``out``; with ``max_steps``, stop there and save."""
    trainer = Trainer.build(config, out, World())
    try:
        trainer.run(max_steps)
        if max_steps is not None:
            trainer._save(force=True)
    finally:
        trainer.close()
    return RunFolder(out).read_metric("loss")


def final(out: Path) -> dict[str, torch.Tensor]:
    checkpoint = load_latest(out / "checkpoints")
    assert checkpoint is not None
    return dict(checkpoint.tensors)


def farthest(one: Losses, two: Losses) -> float:
    assert [step for step, _ in one] == [step for step, _ in two] == list(range(1, STEPS + 1))
    return max(abs(a - b) for (_, a), (_, b) in zip(one, two, strict=True))


@pytest.fixture(scope="module")
def folders(config: Config, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By backend: a whole run in float64, and one that stopped at a checkpoint (copy it before
    going on)."""
    made = {}
    for backend in ("torch", "fastmoco"):
        changed = with_optim(config, fused_backend=backend)
        made[backend], made[f"{backend} cut"] = (
            tmp_path_factory.mktemp(backend),
            tmp_path_factory.mktemp("cut"),
        )
        train(changed, made[backend])
        train(changed, made[f"{backend} cut"], CUT)
    return made


def losses(folder: Path) -> Losses:
    return RunFolder(folder).read_metric("loss")


def test_the_sweep_trains_to_the_losses_of_torch(folders):
    assert farthest(losses(folders["torch"]), losses(folders["fastmoco"])) <= 1e-10
    one, two = final(folders["torch"]), final(folders["fastmoco"])
    assert one.keys() == two.keys()
    for name in one:
        if "momentum_encoder" in name and one[name].is_floating_point():
            assert (one[name] - two[name]).abs().max() <= 1e-10, name


def test_the_sweep_trains_to_the_losses_of_torch_in_float32(config, tmp_path):
    """At a rate too small for AdamW to turn rounding noise into whole steps, as in
    test_trainer.py."""
    config = replace(with_optim(config, lr=1e-6 * 64 / 24), precision="fp32")
    torchs = train(with_optim(config, fused_backend="torch"), tmp_path / "torch")
    assert (
        farthest(torchs, train(with_optim(config, fused_backend="fastmoco"), tmp_path / "ours"))
        <= 1e-5
    )


def test_the_average_at_the_end_of_a_step_is_the_one_before_the_next_bit_for_bit(config, tmp_path):
    """Float32, the method's own order (average, forward, backward, optimizer) on the trainer's
    batches, all 15 steps."""
    config = replace(config, precision="fp32")
    trainer = Trainer.build(config, tmp_path, World())
    try:
        book = build_objective(config, CPU)
        optimizer = build_optimizer(config, book.named_parameters(), book.averages())
        for step in range(STEPS):
            batch = trainer.loader.next()
            at = trainer.progress(step)
            lr, momentum = (
                trainer.train_step.learning_rate(at),
                trainer.objective.schedules(at)["ema_momentum"],
            )
            loss = train_step(book, optimizer.inner, batch.views, lr=lr, ema_momentum=momentum)
            assert torch.equal(trainer.step(batch).loss, loss), step
        for (
            name,
            tensor,
        ) in trainer.objective.state_dict().items():  # the last step ends without a further average
            assert torch.equal(tensor, book.state_dict()[name]), name
    finally:
        trainer.close()


@pytest.mark.parametrize("backend", ["torch", "fastmoco"])
def test_it_continues_bit_for_bit_under_each_backend(config, tmp_path, backend):
    config = with_optim(replace(config, precision="fp32"), fused_backend=backend)
    whole = train(config, tmp_path / "whole")
    train(config, tmp_path / "cut", CUT)
    assert train(config, tmp_path / "cut") == whole
    one, two = final(tmp_path / "whole"), final(tmp_path / "cut")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("first", "then"), [("torch", "fastmoco"), ("fastmoco", "torch")])
def test_it_continues_under_the_other_backend_and_says_so(
    config, folders, tmp_path, capsys, first, then
):
    shutil.copytree(folders[f"{first} cut"], tmp_path, dirs_exist_ok=True)
    continued = train(with_optim(config, fused_backend=then), tmp_path)
    assert farthest(losses(folders[first]), continued) <= 1e-10
    names = {"torch": "torch AdamW", "fastmoco": "fastmoco_kernels AdamWEMA"}
    assert f"optimizer {names[first]} -> {names[then]}" in " ".join(capsys.readouterr().out.split())


@pytest.fixture(scope="module")
def old_folder(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as it was when a step began with the average: without the entry, the twin one
    average behind."""
    folder = tmp_path_factory.mktemp("old")
    update, save = AveragedOptimizer.step, saver.save_checkpoint
    calls: list[float | None] = []

    def as_before(optimizer: Any, *, ema_momentum: float | None, skip: torch.Tensor | None) -> None:
        calls.append(ema_momentum)
        update(optimizer, ema_momentum=None if len(calls) == CUT else ema_momentum, skip=skip)

    def saved_as_before(*arguments: Any, state: dict[str, Any], **options: Any) -> Path:
        assert state.pop("twin_advanced")
        return save(*arguments, state=state, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AveragedOptimizer, "step", as_before)
        patch.setattr(saver, "save_checkpoint", saved_as_before)
        train(config, folder, CUT)
    return folder


@pytest.mark.parametrize("backend", ["torch", "fastmoco"])
def test_a_checkpoint_from_when_a_step_began_with_the_average_continues(
    config, folders, old_folder, tmp_path, backend
):
    shutil.copytree(old_folder, tmp_path, dirs_exist_ok=True)
    continued = train(with_optim(config, fused_backend=backend), tmp_path)
    assert farthest(losses(folders["torch"]), continued) <= (0 if backend == "torch" else 1e-10)


def test_the_last_checkpoint_says_that_no_step_follows(config, folders):
    middle, end = (load_latest(folders[name] / "checkpoints") for name in ("torch cut", "torch"))
    assert middle is not None
    assert end is not None
    assert (middle.state["twin_advanced"], end.state["twin_advanced"]) == (True, False)
    trainer = Trainer.build(config, folders["torch"], World())
    trainer.close()
    for name, tensor in trainer.objective.state_dict().items():
        assert torch.equal(tensor, end.tensors[f"model.{name}"]), name


def test_lars_trains_the_quickstart_and_continues_bit_for_bit(config, small_run, tmp_path):
    """22 steps of 64 digits: fewer have a loss that falls by chance alone."""
    config = replace(config, precision="fp32", global_batch_size=64, data=small_run.data)
    config = with_optim(config, name="lars", lr=0.6, weight_decay=1e-6)
    whole = train(config, tmp_path / "whole")
    train(config, tmp_path / "cut", CUT)
    assert train(config, tmp_path / "cut") == whole
    assert whole[-1][1] < whole[0][1]
    tensors = final(tmp_path / "cut")
    assert "optimizer.encoder.blocks.0.attn.qkv.weight.momentum_buffer" in tensors


def test_every_frozen_stem_that_differs_moves_under_each_backend(config):
    """As after loading foreign weights: the sweep knows trainable parameters alone, the rest must
    not be forgotten."""
    twins = []
    for backend in ("torch", "fastmoco"):
        changed = with_optim(config, fused_backend=backend)
        objective = build_objective(changed, CPU)
        optimizer = build_optimizer(changed, objective.named_parameters(), objective.averages())
        with torch.no_grad():
            for parameter in objective.momentum_encoder.parameters():
                parameter.add_(1.0)
        size = objective.encoder.image_size
        views = torch.randn(
            2, 4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
        )
        objective(*views).loss.backward()
        unused = objective.encoder.blocks[0].mlp.fc1.bias
        unused.grad = None
        start = {
            name: p.detach().clone() for name, p in objective.momentum_encoder.named_parameters()
        }
        optimizer.step(ema_momentum=0.5)
        moved = dict(objective.momentum_encoder.named_parameters())
        assert all(not torch.equal(start[name], moved[name]) for name in start)
        twins.append(moved)
    for name in twins[0]:
        assert (twins[0][name] - twins[1][name]).abs().max() <= 1e-14, name


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "torch AdamW"),
        (["--optim.fused-backend", "fastmoco"], "fastmoco_kernels AdamWEMA"),
        (["--optim.name", "lars"], "fastmoco_kernels LARS"),
        (["--optim.name", "larc"], "fastmoco LARC"),
        (["--optim.name", "sgd"], "torch SGD"),
    ],
)
def test_the_command_line_chooses(words, name, capsys, monkeypatch):
    built: list[Config] = []
    monkeypatch.setattr(
        "fastmoco.cli.train.train", lambda config, out, **options: built.append(config) or 0
    )
    assert main(["train", "quickstart_digits", "--out", "unused", *words]) == 0
    objective = build_objective(built[0], CPU)
    assert (
        name_of(build_optimizer(built[0], objective.named_parameters(), objective.averages()))
        == name
    )


def test_auto_takes_the_sweep_where_triton_runs(config, monkeypatch):
    assert choose_optimizer_backend(config, CPU) == "torch"
    asked: list[Callable[..., bool] | torch.device] = []
    monkeypatch.setattr(
        "fastmoco.optim.build.triton_is_default", lambda device: asked.append(device) or True
    )
    assert choose_optimizer_backend(config, torch.device("cuda")) == "fastmoco"
    assert asked == [torch.device("cuda")]
    assert choose_optimizer_backend(with_optim(config, fused_backend="torch"), CPU) == "torch"


def test_configs_saved_before_there_was_a_choice_still_load_and_may_continue(config):
    saved = to_json(config)
    for name in ("name", "fused_backend", "sgd_momentum", "trust_coefficient"):
        del saved["optim"][name]
    assert from_json(saved) == config
    assert differences(from_json(saved), with_optim(config, fused_backend="fastmoco")) == []
    assert differences(config, with_optim(config, name="lars")) == ["optim.name: 'adamw' -> 'lars'"]
