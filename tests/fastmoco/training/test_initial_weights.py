"""`--model.init`: both encoders of a run start from a file or from another run, once."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmoco.checkpoint import CheckpointError
from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.objectives.build import build_objective
from fastmoco.training.initial_weights import start_from
from fastmoco.training.trainer import Trainer
from tests.command_line import main
from tests.official_checkpoints import official_checkpoint
from tests.step_runs import short_run

CPU = torch.device("cpu")


def with_init(path: Path, **model: Any) -> Config:
    return short_run("cpu", steps=2, init=str(path), **model)


def official(tmp_path: Path, **sizes: int) -> tuple[Path, dict[str, Tensor]]:
    """A file for the encoder of `short_run`, and its base encoder."""
    content = official_checkpoint("vit", **{"patch": 4, **sizes})
    path = tmp_path / "checkpoint_0299.pth.tar"
    torch.save(content, path)
    beginning = "module.base_encoder."
    return path, {
        name.removeprefix(beginning): tensor
        for name, tensor in content["state_dict"].items()
        if name.startswith(beginning)
    }


def test_both_encoders_start_from_a_file_and_a_run_goes_on_without_it(tmp_path: Path) -> None:
    path, trunk = official(tmp_path)
    config = with_init(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    trainer = Trainer.build(config, tmp_path / "run", World())
    plain = build_objective(replace(config, model=replace(config.model, init="")), CPU)
    try:
        for network in ("encoder", "momentum_encoder"):
            own = getattr(trainer.objective, network).state_dict()
            start = getattr(plain, network).state_dict()
            for name, tensor in own.items():
                expected = start if name.startswith("head.") else trunk
                torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
        assert trainer.initial is not None
        lines = trainer.initial.lines()
        assert lines[0].startswith(
            f"encoder and momentum encoder start from {path} (moco-v3, SHA-256 {digest[:16]}"
        )
        assert "4 attention heads, as the run has; the file does not show them" in lines
        assert trainer.run() == 0
    finally:
        trainer.close()

    # The run goes on without the file, and its record stays.
    path.unlink()
    trainer = Trainer.build(config, tmp_path / "run", World())
    try:
        assert (trainer.step_count, trainer.initial) == (2, None)
    finally:
        trainer.close()
    record = json.loads((tmp_path / "run" / "config.json").read_text())["initial_weights"]
    assert record["sha256"] == digest
    assert record["filled"] == ["encoder", "momentum_encoder"]
    assert record["tensors"]["matched"] == 30

    # A run is a start too: of the trained encoder, for both.
    again = with_init(tmp_path / "run")
    objective = build_objective(again, CPU)
    found = start_from(again, objective, World())
    assert found is not None
    assert found.weights.format == "run of fastmoco, moco_v3"
    for network in ("encoder", "momentum_encoder"):
        for name, tensor in getattr(objective, network).state_dict().items():
            if not name.startswith("head."):
                assert torch.equal(tensor, trainer.objective.encoder.state_dict()[name])


def test_a_refused_start_changes_nothing(tmp_path: Path) -> None:
    path, _ = official(tmp_path, depth=3)
    with pytest.raises(CheckpointError, match=r"model\.init=.*blocks\.2\.norm1\.weight has no"):
        Trainer.build(with_init(path), tmp_path / "run", World())
    assert not (tmp_path / "run").exists()
    with pytest.raises(CheckpointError, match=r"model\.init='absent': there is no such file"):
        Trainer.build(with_init(Path("absent")), tmp_path / "run", World())


def test_learned_positions_are_resampled_in_both_encoders(tmp_path: Path) -> None:
    path, _ = official(tmp_path, grid=7)
    config = with_init(path, positions="learned")
    objective = build_objective(config, CPU)
    found = start_from(config, objective, World())
    assert found is not None
    assert found.fit.resampled == {"pos_embed": "(7 x 7 to 4 x 4, bicubic)"}
    one, two = (network.pos_embed for network in (objective.encoder, objective.momentum_encoder))
    assert torch.equal(one, found.fit.tensors["pos_embed"])
    assert torch.equal(one, two)


def test_a_resnet_starts_with_its_running_averages(tmp_path: Path) -> None:
    path = tmp_path / "r.pth.tar"
    content = official_checkpoint("resnet18")
    torch.save(content, path)
    config = with_init(path, architecture="resnet18", patch_size=16)
    objective = build_objective(config, CPU)
    assert start_from(config, objective, World()) is not None
    for network in (objective.encoder, objective.momentum_encoder):
        name = "layer3.0.downsample.1.running_var"
        expected = content["state_dict"][f"module.base_encoder.{name}"]
        assert torch.equal(network.state_dict()[name], expected)


def test_what_no_tensor_shows_is_a_warning(tmp_path: Path, capsys) -> None:
    """The class token's norm becomes that of a mean, and images are normalised otherwise."""
    run = tmp_path / "run"
    trainer = Trainer.build(short_run("cpu", steps=1), run, World())
    try:
        assert trainer.run() == 0
    finally:
        trainer.close()
    starts = [run, tmp_path / "encoder.safetensors", tmp_path / "state.safetensors"]
    command = ["checkpoint", "consolidate", str(run), "--out"]
    assert main([*command, str(starts[1]), "--encoder"]) == main([*command, str(starts[2])]) == 0

    for path in starts:
        same = start_from(with_init(path), build_objective(with_init(path), CPU), World())
        assert same is not None
        assert same.warnings == ()
        other = with_init(path, pooling="mean_norm")
        view = replace(other.data.view1, mean=(0.3, 0.3, 0.3), std=(0.35, 0.35, 0.35))
        other = replace(other, data=replace(other.data, view1=view))
        found = start_from(other, build_objective(other, CPU), World())
        assert found is not None
        pooling, image = found.lines()[-2:]
        assert pooling == (
            "warning: these weights are of a run with model.pooling=class, and give other features "
            "with mean_norm; --model.pooling class keeps theirs"
        )
        assert image.startswith(
            "warning: these weights are of images normalised by mean 0.485 0.456 0.406 and "
            "deviation 0.229 0.224 0.225, those of this run by 0.3 0.3 0.3 and 0.35 0.35 0.35: "
        )
