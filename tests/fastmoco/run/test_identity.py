"""A run continues from its own checkpoints; those of others only where the user says so, and only
if they are sound."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmoco.checkpoint import CheckpointError, load_checkpoint, load_latest, save_checkpoint
from fastmoco.checkpoint.folder import fingerprint, marker_text
from fastmoco.config import Config
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.run.folder import RunFolder
from fastmoco.run.identity import identify
from fastmoco.training.load_run import load_run
from fastmoco.training.trainer import Trainer
from tests.checkpoint_content import flip_bit
from tests.command_line import main
from tests.spikes import ROLLING

pytestmark = pytest.mark.faults
WORLD = World()
CONFIG = replace(
    ROLLING, epochs=ROLLING.epochs / 5, faults=replace(ROLLING.faults, rollback_spike=0)
)


def train(config: Config, out: Path, **options: Any) -> Trainer:
    trainer = Trainer.build(config, out, WORLD, **options)
    try:
        assert trainer.run() == 0
    finally:
        trainer.close()
    return trainer


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of one config: six steps, saved behind the fourth and the last; the second was
    stopped behind its fourth."""
    out = tmp_path_factory.mktemp("runs")
    train(CONFIG, out / "one")
    train(CONFIG, out / "two")
    shutil.rmtree(out / "two" / "checkpoints" / "step_00000006")
    return out / "one", out / "two"


@pytest.fixture
def mixed(runs: tuple[Path, Path], tmp_path: Path) -> Path:
    """The second run with the last checkpoint of the first in its folder."""
    out = Path(shutil.copytree(runs[1], tmp_path / "mixed"))
    shutil.copytree(
        runs[0] / "checkpoints" / "step_00000006", out / "checkpoints" / "step_00000006"
    )
    return out


def test_one_id_in_the_folder_in_every_state_and_every_marker(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    ids = [RunFolder(run).read_config()["run_id"] for run in runs]
    assert ids[0] != ids[1]
    for run, run_id in zip(runs, ids, strict=True):
        assert len(run_id) == 14
        for folder in sorted((run / "checkpoints").iterdir()):
            assert json.loads((folder / "COMMITTED").read_text())["run_id"] == run_id
            assert (
                load_checkpoint(folder).run_id == load_checkpoint(folder).state["run_id"] == run_id
            )
    again = Path(shutil.copytree(runs[1], tmp_path / "again"))  # a run and its copy are one run
    train(CONFIG, again)
    assert RunFolder(again).read_config()["run_id"] == ids[1]
    assert load_checkpoint(again / "checkpoints" / "step_00000006").run_id == ids[1]


def test_the_id_is_on_the_disk_before_it_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut that left config.json empty would leave a run that owns no checkpoint."""
    flushed: list[bytes] = []
    replaced: list[bytes] = []
    monkeypatch.setattr(
        os, "fsync", lambda file: flushed.append(Path(f"/proc/self/fd/{file}").read_bytes())
    )
    plain = os.replace
    monkeypatch.setattr(
        os, "replace", lambda old, new: (replaced.append(flushed[-1]), plain(old, new))
    )
    RunFolder(tmp_path).write_config({"run_id": "0" * 14})
    assert replaced == [(tmp_path / "config.json").read_bytes()]


def test_the_checkpoint_of_another_run_is_refused_and_not_passed_over(
    runs: tuple[Path, Path], mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = (RunFolder(run).read_config()["run_id"] for run in (runs[1], runs[0]))
    opened: list[Path] = []
    monkeypatch.setattr(
        "fastmoco.checkpoint.loading.whole_entries", lambda path: opened.append(path) or {}
    )
    with pytest.raises(RunError) as refusal:
        Trainer.build(CONFIG, mixed, WORLD)
    text = str(refusal.value)
    assert str(mixed / "checkpoints" / "step_00000006" / "COMMITTED") in text
    assert f"run {theirs}" in text
    assert f"run {ours}" in text
    assert "--trust" in text
    assert "another --out" in text
    assert opened == []
    assert RunFolder(mixed).read_config()["run_id"] == ours
    monkeypatch.undo()
    Trainer.build(
        CONFIG, mixed, WORLD, trust=True
    ).close()  # the refusal, still held here, has given the folder back


def test_a_folder_that_holds_a_checkpoint_and_nothing_else_owns_none(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    source = runs[0] / "checkpoints"
    shutil.copytree(source, tmp_path / "checkpoints")
    for config in (None, "{", "[]", "{}"):
        if config is not None:
            (tmp_path / "config.json").write_text(config)
        with pytest.raises(RunError, match="--trust"):
            Trainer.build(CONFIG, tmp_path, WORLD)


def test_trusted_once_it_is_taken_over_for_good(
    runs: tuple[Path, Path], mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = (RunFolder(run).read_config()["run_id"] for run in (runs[1], runs[0]))
    longer = replace(CONFIG, epochs=CONFIG.epochs * 1.5)
    trainer = train(longer, mixed, trust=True, allow=["epochs"])
    assert f"continuing from step_00000006, written by run {theirs}" in " ".join(
        capsys.readouterr().out.split()
    )
    assert trainer.step_count == 9
    saved = RunFolder(mixed).read_config()
    assert (saved["run_id"], saved["trusted_run_ids"]) == (ours, [theirs])
    assert load_checkpoint(mixed / "checkpoints" / "step_00000009").run_id == ours
    shutil.rmtree(mixed / "checkpoints" / "step_00000009")
    newest = sorted((mixed / "checkpoints").iterdir())[-1]
    assert load_checkpoint(newest).run_id in (ours, theirs)
    train(longer, mixed, allow=["epochs"])  # not asked again
    shutil.rmtree(mixed / "checkpoints")
    shutil.copytree(runs[0] / "checkpoints", mixed / "checkpoints")
    Trainer.build(CONFIG, mixed, WORLD, allow=["epochs"]).close()


def test_trust_takes_nothing_that_is_damaged(
    runs: tuple[Path, Path], mixed: Path, tmp_path: Path
) -> None:
    flip_bit(mixed / "checkpoints" / "step_00000006" / "tensors.safetensors", 9000)
    trainer = Trainer.build(CONFIG, mixed, WORLD, trust=True)
    trainer.close()
    assert trainer.step_count == 4
    shutil.copytree(runs[0] / "checkpoints", tmp_path / "bad" / "checkpoints")
    for folder in (tmp_path / "bad" / "checkpoints").iterdir():
        flip_bit(folder / "state.json", 900)
    with pytest.raises(CheckpointError, match="none can be trusted"):
        Trainer.build(CONFIG, tmp_path / "bad", WORLD, trust=True)
    marker = mixed / "checkpoints" / "step_00000004" / "COMMITTED"
    marker.write_text(
        marker.read_text().replace('"run_id": "', '"run_id": "0')
    )  # the marker vouches for the id too
    with pytest.raises(CheckpointError, match="COMMITTED marker is damaged"):
        Trainer.build(CONFIG, mixed, WORLD, trust=True)


def test_a_config_without_an_id_owns_no_checkpoint(runs: tuple[Path, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(runs[1], tmp_path / "old"))
    saved = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(
        json.dumps({name: saved[name] for name in ("config", "resolved")})
    )
    with pytest.raises(RunError, match=r"old has no config\.json with a run's id.*add --trust"):
        Trainer.build(CONFIG, out, WORLD)
    Trainer.build(CONFIG, out, WORLD, trust=True).close()
    assert len(RunFolder(out).read_config()["run_id"]) == 14


def test_a_checkpoint_saved_outside_a_run_has_no_id_and_is_refused(
    runs: tuple[Path, Path], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(runs[1], tmp_path / "run"))
    saved = save_checkpoint(
        out / "checkpoints", step=9, tensors={"a": torch.zeros(2)}, state={}, keep=9
    )
    assert load_checkpoint(saved).run_id == ""
    with pytest.raises(RunError, match="a run without an id"):
        Trainer.build(CONFIG, out, WORLD)


def test_readers_that_only_look_read_any_folder(mixed: Path, tmp_path: Path) -> None:
    shutil.copytree(mixed / "checkpoints", tmp_path / "only" / "checkpoints")
    for run in (mixed, tmp_path / "only"):
        assert load_run(run)[2].step == 6
        assert main(["checkpoint", "verify", str(run)]) == 0
        out = tmp_path / f"{run.name}.safetensors"
        assert main(["checkpoint", "consolidate", str(run), "--encoder", "--out", str(out)]) == 0
        assert out.exists()


def test_the_marker_says_whose_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "step_00000003"
    folder.mkdir()
    (folder / "state.json").write_text("{}")
    (folder / "tensors.safetensors").write_bytes(b"")
    files = {name: fingerprint(folder / name) for name in ("state.json", "tensors.safetensors")}
    for told, known in ((("ab",), True), ((), False)):
        text = marker_text(3, files, world_size=1, saved_at="", run_id=told[0] if told else "")
        (folder / "COMMITTED").write_text(text)
        seen: list[str] = []

        def admit(path: Path, run_id: str, seen: list[str] = seen) -> None:
            seen.append(run_id)
            raise RunError("stop here")

        with pytest.raises(RunError, match="stop here"):
            load_latest(tmp_path, admit=admit)
        assert seen == [told[0] if known else ""]


def test_the_command_line_says_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        "fastmoco.cli.train.train", lambda config, out, **more: given.append(more["trust"]) or 0
    )
    for words in ([], ["--trust"]):
        assert main(["train", "quickstart_digits", "--out", "unused", *words]) == 0
    launched: list[list[str]] = []
    keep: Callable[..., int] = lambda gpus, args, out, **more: launched.append(args) or 0  # noqa: E731
    monkeypatch.setattr("fastmoco.cli.launch.launch", keep)
    assert main(["train", "quickstart_digits", "--out", "unused", "--gpus", "2", "--trust"]) == 0
    assert given == [False, True]
    assert "--trust" in launched[0]


def test_all_ranks_have_the_id_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "fastmoco.run.identity.gather_rows", lambda rows, device: torch.tensor([5, int(rows[0])])
    )
    assert identify(RunFolder(tmp_path), WORLD, trust_all=False).run_id == "00000000000005"


def test_tensors_that_no_run_saved_are_no_run_even_if_trusted(tmp_path: Path) -> None:
    save_checkpoint(
        tmp_path / "checkpoints", step=3, tensors={"a": torch.zeros(2)}, state={}, keep=1
    )
    with pytest.raises(RunError, match="step_00000003: no run wrote this checkpoint"):
        Trainer.build(CONFIG, tmp_path, WORLD, trust=True)
