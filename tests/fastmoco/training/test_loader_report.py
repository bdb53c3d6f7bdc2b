"""What a run tells of its data: figures of the loader, images left out, and a verdict in words."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmoco.cli.train import train
from fastmoco.distributed.mesh import World
from fastmoco.run.folder import RunFolder
from fastmoco.telemetry.log_row import plain_line
from fastmoco.telemetry.recorder import Recorder
from fastmoco_pipelines.formats.quarantine import Quarantine
from fastmoco_pipelines.loading.stages import StageFigures
from fastmoco_pipelines.sampling.order import epoch_order
from tests.pipelines.damage import damage


@pytest.fixture
def bad_digits(small_run, digits, tmp_path):
    """Two bad images in the first epoch."""
    folder = tmp_path / "digits"
    folder.mkdir()
    for path in Path(digits[0]).parent.glob("train-*"):
        shutil.copy(path, folder)
    order = epoch_order(small_run.seed, 0, 1437)
    for place, kind in ((3, "garbage"), (400, "changed")):
        damage(folder, int(order[place]), kind)
    return replace(small_run, data=replace(small_run.data, shards=str(folder)))


def test_a_run_over_bad_images_goes_on_and_says_so(bad_digits, tmp_path, capfd):
    assert train(bad_digits, tmp_path / "run") == 0
    said = capfd.readouterr().out
    assert said.count("! warning: left out train-") == 2
    assert "left out 2 " in next(line for line in said.splitlines() if line.startswith("step 15/"))
    assert "the trainer waits for the loader " in said
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert rows[-1]["loader/quarantined"] == 2
    assert {"loader/read_ms", "loader/draw_ms", "loader/decode_ms", "loader/queue_depth"} <= rows[
        -1
    ].keys()
    assert len(Quarantine.read(RunFolder(tmp_path / "run").quarantine)) == 2


def test_the_column_is_shown_only_where_something_is_left_out():
    assert "left out" not in plain_line({"step": 1, "quarantined": None}, 10, {})
    assert plain_line({"step": 1, "quarantined": 3}, 10, {}) == "step 1/10 left out 3"


def test_a_slow_loader_is_put_into_words_once(small_run, tmp_path, capsys):
    from fastmoco.config import resolve

    recorder = Recorder(
        small_run,
        resolve(small_run, world_size=1, sample_count=1437),
        RunFolder(tmp_path),
        World(),
        start_step=0,
    )
    q = torch.nn.functional.normalize(torch.randn(8, small_run.model.projection_dim), dim=1)
    watch = {"queries": q[None], "keys": q.roll(1, 0)[None]}
    for step in range(1, 6):
        recorder.loader(
            StageFigures(
                steps=step, wall_s=step, wait_s=0.5 * step, stage_s={"read": 0.1, "decode": step}
            )
        )
        recorder.log(step, torch.tensor(1.0), watch, lr=0.1, schedules={"ema_momentum": 0.9})
    recorder.close()
    assert (
        capsys.readouterr().out.count(
            "decoding (and augmenting, where DALI does) is its slowest stage"
        )
        == 1
    )
