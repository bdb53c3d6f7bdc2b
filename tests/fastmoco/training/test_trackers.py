"""A run with trackers: its weights and its metrics are those of a run without, whatever they do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmoco.checkpoint import list_checkpoints
from fastmoco.checkpoint.folder import step_of
from fastmoco.config import Config, TrackersConfig
from fastmoco.config.serial import differences
from fastmoco.distributed.mesh import World
from fastmoco.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("sinks_of_tests")
FAULTY = ("Raises", "Exits", "Dies", "Hangs", "Spins", "HangsAtEnd")
TIMES = ("time", "images_per_s", "wait_share")


@pytest.fixture(autouse=True)
def a_short_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmoco.telemetry.trackers.trackers.CLOSE_S", 2.0)


def trained(
    config: Config, out: Path, trackers: TrackersConfig, max_steps: int | None = None
) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights and lines of metrics, without times and memory."""
    trainer = Trainer.build(replace(config, trackers=trackers), out, World())
    try:
        assert trainer.run(max_steps) == 0
        state = {name: tensor.clone() for name, tensor in trainer.objective.state_dict().items()}
    finally:
        trainer.close()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [
        {
            k: v
            for k, v in row.items()
            if k not in TIMES and not k.startswith(("loader/", "memory/"))
        }
        for row in rows
        if "event" not in row
    ]
    return state, kept


def test_a_run_with_trackers_that_fail_is_bit_identical(
    brief_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(brief_run, log_every_steps=1)
    plain, rows = trained(config, tmp_path / "plain", TrackersConfig(use=()), 6)
    capsys.readouterr()
    names = tuple(f"tests.faulty_sinks:{name}" for name in FAULTY)
    every = TrackersConfig(use=("tensorboard", *names), histogram_every=1)
    state, others = trained(config, tmp_path / "faulty", every, 6)
    assert others == rows
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], plain[name]) for name in plain)

    said = capsys.readouterr().out
    for name in names:  # one warning each
        assert said.count(f"tracker {name} ") == 1, said


def test_a_run_that_continues_from_an_earlier_checkpoint_continues_its_tracker(
    brief_run: Config, tmp_path: Path
) -> None:
    """The same id, from the step after the checkpoint; no picture of the first batch again."""
    saves = replace(brief_run.checkpoint, every_steps=2, keep=99, keep_best=False)
    config = replace(brief_run, log_every_steps=1, checkpoint=saves)
    out, mine = tmp_path / "run", TrackersConfig(use=("tests.faulty_sinks:Notes",))
    trained(config, out, mine)
    first = [json.loads(line) for line in (out / "notes.txt").read_text().splitlines()[:-1]]
    for checkpoint in list_checkpoints(out / "checkpoints")[1:]:
        shutil.rmtree(checkpoint)
    trained(config, out, mine)
    every = (out / "notes.txt").read_text().splitlines()
    second = [json.loads(line) for line in every[len(first) + 1 : -1]]

    (kept,) = (step_of(path) for path in list_checkpoints(out / "checkpoints")[:1])
    assert first[0][:2] == ["start", 0]
    assert second[0] == ["start", kept + 1, first[0][2], True]
    for notes, begin in ((first, 1), (second, kept + 1)):
        steps = [note[1] for note in notes if note[0] == "write" and "loss" in note[2]]
        assert steps == list(range(begin, steps[-1] + 1))
    assert steps[-1] > kept
    assert [note[1] for note in first if note[0] == "picture"] == [1]
    assert not [note for note in second if note[0] == "picture"]
    histograms = {name for note in first if note[0] == "histograms" for name in note[2]}
    assert "gradients/heads" in histograms


def test_a_run_may_continue_with_other_trackers(brief_run: Config) -> None:
    changed = replace(brief_run, trackers=TrackersConfig(use=("wandb",), project="other"))
    assert differences(brief_run, changed) == []


def test_no_secret_of_a_tracker_is_stored(brief_run: Config, tmp_path: Path) -> None:
    trackers = TrackersConfig(use=(), uri="https://ann:pass-word@127.0.0.1/x?token=hush")
    out = tmp_path / "run"
    trained(brief_run, out, trackers, max_steps=1)
    for file in (path for path in out.rglob("*") if path.is_file()):
        content = file.read_bytes()
        assert b"pass-word" not in content
        assert b"hush" not in content
