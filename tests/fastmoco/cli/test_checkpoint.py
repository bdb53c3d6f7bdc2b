"""`fastmoco checkpoint verify|list|consolidate`, on checkpoints of one process and of ranks."""

from __future__ import annotations

import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastmoco.checkpoint import CheckpointError, save_checkpoint
from fastmoco.config import Config, ModelConfig
from fastmoco.config.serial import from_json, to_json
from fastmoco.distributed.mesh import World
from fastmoco.models.weights.building import load_foreign
from fastmoco.objectives.build import build_objective
from fastmoco.recipes.dino import DINOConfig, dino_digits
from fastmoco.training.load_run import load_run
from fastmoco.training.trainer import Trainer
from tests.checkpoint_content import assert_same, content, flip_bit, group_of_one, save
from tests.command_line import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints, one in each layout, and what a killed save left."""
    save(tmp_path / "run" / "checkpoints", 1)
    with group_of_one() as group:
        save(tmp_path / "run" / "checkpoints", 2, group=group)
    (tmp_path / "run" / "checkpoints" / ".writing-step_00000003-0123abcd").mkdir()
    return tmp_path / "run"


def test_verify_says_which_are_sound_by_its_exit_code(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newest = run / "checkpoints" / "step_00000002"
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out == "step_00000001: sound\nstep_00000002: sound\n"
    flip_bit(newest / "__0_0.distcp", 900)
    assert main(["checkpoint", "verify", str(run)]) == 1
    out = capsys.readouterr().out
    assert "step_00000001: sound" in out
    assert "__0_0.distcp differs in size or SHA-256" in out
    assert main(["checkpoint", "verify", str(newest)]) == 1
    assert main(["checkpoint", "verify", str(newest.parent / "step_00000001")]) == 0
    (newest / "COMMITTED").unlink()
    assert main(["checkpoint", "verify", str(run)]) == 0  # every reader ignores it
    assert main(["checkpoint", "verify", str(newest)]) == 1


@pytest.mark.parametrize("verb", ["verify", "consolidate"])
def test_a_folder_without_checkpoints_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    more = ["--out", str(tmp_path / "out")] if verb == "consolidate" else []
    assert main(["checkpoint", verb, str(tmp_path), *more]) == 2
    assert (
        "contains no checkpoint; is it the folder given to fastmoco train --out?"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_list_shows_step_size_time_ranks_and_verdict(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_bit(run / "checkpoints" / "step_00000001" / "state.json", 9)
    assert main(["checkpoint", "list", str(run)]) == 0
    _, first, second, left = capsys.readouterr().out.splitlines()
    assert first.split()[0] == "1"
    assert "state.json differs" in first
    step, size, saved_at, ranks, knn, verdict = second.split()
    assert (step, ranks, knn, verdict) == ("2", "1", "-", "sound")
    assert float(size) > 0
    assert saved_at.endswith("Z")
    assert left.split()[0] == "3"
    assert "no usable COMMITTED marker" in left


@pytest.mark.parametrize("step", [1, 2])
def test_consolidate_gives_one_file_from_either_layout(
    run: Path, tmp_path: Path, step: int
) -> None:
    out = tmp_path / "all.safetensors"
    folder = run / "checkpoints" / f"step_{step:08d}"
    assert main(["checkpoint", "consolidate", str(folder), "--out", str(out)]) == 0
    assert_same(load_file(out), content(step))
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["step"] == str(step)
    before = out.read_bytes()
    assert main(["checkpoint", "consolidate", str(run), "--out", str(out)]) == 2
    assert out.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_consolidate_passes_over_what_it_cannot_trust(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_bit(run / "checkpoints" / "step_00000002" / ".metadata", 900)
    assert main(["checkpoint", "consolidate", str(run), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "passed over step_00000002" in out
    assert "tensors of step 1 to" in out


def test_the_encoder_alone_loads_into_the_encoder_of_its_architecture(
    small_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = Trainer.build(replace(small_run, epochs=1), tmp_path / "run", World())
    trainer.step(trainer.loader.next())
    trainer._save(force=True)
    trainer.close()
    out = tmp_path / "encoder.safetensors"
    assert (
        main(["checkpoint", "consolidate", str(tmp_path / "run"), "--out", str(out), "--encoder"])
        == 0
    )
    objective, _, _ = load_run(tmp_path / "run")
    tensors = load_file(out)
    expected = {
        k: v for k, v in objective.encoder.state_dict().items() if not k.startswith("head.")
    }
    assert_same(tensors, expected)
    assert tensors


def test_the_encoder_of_something_else_is_a_clear_error(run: Path, tmp_path: Path, capsys) -> None:
    assert (
        main(["checkpoint", "consolidate", str(run), "--out", str(tmp_path / "out"), "--encoder"])
        == 2
    )
    assert "it is no checkpoint of a run" in capsys.readouterr().err


def test_help_names_the_three(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint"]) == 0
    out = capsys.readouterr().out
    assert all(f"checkpoint {verb}" in out for verb in ("verify", "list", "consolidate"))


def test_a_hostile_name_is_no_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, step=1, tensors={"w": torch.ones(1)}, state={}, keep=1)
    (tmp_path / "step_00000002").symlink_to(tmp_path / "step_00000001")
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0


def test_a_full_state_says_what_the_tensors_of_its_encoder_do_not_show(tmp_path: Path) -> None:
    # A ViT-S of 6 heads with the fixed table: by its tensors alone it would pass for one of 12.
    base = dino_digits()
    model = ModelConfig(
        architecture="deit_small", image_size=8, patch_size=4, projection_dim=8, hidden_dim=8
    )
    assert isinstance(base.objective, DINOConfig)
    own = replace(base.objective, prototypes=8)
    grey = replace(base.data.view1, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    data = replace(base.data, view1=grey)
    knn = replace(base.knn, resize=9)
    config = replace(base, model=model, objective=own, data=data, knn=knn)
    objective = build_objective(config, torch.device("cpu"))
    tensors = {f"model.{name}": tensor for name, tensor in objective.state_dict().items()}
    state = {"config": to_json(config)}
    save_checkpoint(tmp_path / "run", step=1, tensors=tensors, state=state, keep=1)
    out = tmp_path / "all.safetensors"
    assert main(["checkpoint", "consolidate", str(tmp_path / "run"), "--out", str(out)]) == 0

    found = load_foreign(out)
    assert found.description.heads == 6
    assert found.description.image == config.eval_spec()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(found.encoder(images), objective.evaluation_encoder.eval()(images))

    # Nor does the form of the feature show, or what norms add to the variance.
    for unseen in (
        ModelConfig(architecture="vit_nano", image_size=8, patch_size=4, pooling="mean_norm"),
        ModelConfig(architecture="swin_nano", image_size=8, norm_eps=1e-3),
    ):
        small = replace(unseen, projection_dim=8, hidden_dim=8)
        state = {"config": to_json(replace(config, model=small))}
        objective = build_objective(from_json(state["config"]), torch.device("cpu"))
        tensors = {f"model.{name}": tensor for name, tensor in objective.state_dict().items()}
        run = tmp_path / small.architecture
        save_checkpoint(run, step=1, tensors=tensors, state=state, keep=1)
        file = tmp_path / f"{small.architecture}.safetensors"
        assert main(["checkpoint", "consolidate", str(run), "--out", str(file)]) == 0
        expected = objective.evaluation_encoder.eval()(images)
        torch.testing.assert_close(load_foreign(file).encoder(images), expected)

    # The file of an older version does not say it.
    old = tmp_path / "old.safetensors"
    save_file(load_file(out), old, {"evaluated": "momentum_encoder"})
    with pytest.raises(CheckpointError, match="does not show its number of attention heads"):
        load_foreign(old)
    assert load_foreign(old, heads=6).weights.which == "momentum"
