"""kNN while training: refused early where it cannot work, put off when it takes too long, and without a trace in the model."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from PIL import Image

from fastmoco.distributed.mesh import World
from fastmoco.evaluation.monitor import KnnMonitor
from fastmoco.objectives.build import build_objective
from fastmoco.training import setup


@pytest.fixture
def config(small_run, digits):
    return replace(small_run, knn=replace(small_run.knn, every_epochs=1, test_shards=digits[1]))


def _monitor(config) -> KnnMonitor:
    monitor = setup.build_knn(config, World(), threads=1)
    assert monitor is not None
    return monitor


def test_no_held_out_shards_no_monitor(small_run):
    assert setup.build_knn(small_run, World(), threads=1) is None


def test_measuring_leaves_no_trace_in_the_model(config):
    objective = build_objective(config, torch.device("cpu"))
    before, rng = copy.deepcopy(objective.state_dict()), torch.get_rng_state()
    monitor = _monitor(config)
    accuracy = monitor.measure(objective.encoder, 2.0)
    assert 0.2 < accuracy < 0.9
    assert (monitor.last, monitor.best, monitor.last_epoch) == (accuracy, accuracy, 2.0)
    assert objective.encoder.training
    assert all(torch.equal(value, before[name]) for name, value in objective.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert monitor.measure(objective.encoder, 3.0) == accuracy


def test_due_by_epochs_and_within_its_share_of_the_time(config):
    monitor = _monitor(config)
    monitor._started -= 100.0
    assert not monitor.is_due(0.9)
    assert monitor.is_due(1.0)
    monitor._spent = 50.0
    assert not monitor.is_due(1.0)


def test_its_state_continues(config):
    one, two = _monitor(config), _monitor(config)
    one.last_epoch, one.last, one.best = 3.0, 0.5, 0.6
    two.load_state_dict(one.state_dict())
    assert (two.last_epoch, two.last, two.best) == (3.0, 0.5, 0.6)


def test_sets_that_cannot_vote_on_each_other_are_refused_at_once(config, tmp_path):
    from fastmoco_pipelines import pack_folder

    for i in range(3):
        for folder in ("flat", "classes/cat", "classes/dog"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i * 40, 9, 9)).save(tmp_path / folder / f"{i}.png")
    unlabelled = pack_folder(tmp_path / "flat", tmp_path / "a").pattern
    with pytest.raises(ValueError, match="without a label"):
        _monitor(replace(config, knn=replace(config.knn, test_shards=unlabelled)))
    others = pack_folder(tmp_path / "classes", tmp_path / "b").pattern
    with pytest.raises(ValueError, match="2 classes that are not the 10 classes"):
        _monitor(replace(config, knn=replace(config.knn, test_shards=others)))
