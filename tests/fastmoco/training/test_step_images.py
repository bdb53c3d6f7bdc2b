"""Which images were in a step of a run: those on which it was trained, by the names of their
files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastmoco.checkpoint import list_checkpoints
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.run.folder import RunFolder
from fastmoco.run.world_sizes import with_start, world_size_at
from fastmoco.training.step_images import RunImages
from fastmoco.training.trainer import Trainer
from tests.command_line import main
from tests.pipelines.damage import damage
from tests.spikes import spike

BAD = (3, 1000)
SPIKE = 8


@pytest.fixture(scope="module")
def trained(small_run, tmp_path_factory) -> tuple[Path, dict[int, np.ndarray]]:
    """A run in two parts over a set with two bad images, with a spike of infinite gradients in step
    8, and the samples of each of its steps."""
    folder = tmp_path_factory.mktemp("named")
    (folder / "set").mkdir()
    for path in Path(small_run.data.shards).parent.glob("train-*"):
        shutil.copy(path, folder / "set")
    for sample in BAD:
        damage(folder / "set", sample, "garbage")
    shards = str(folder / "set" / "train-*.tar")
    config = replace(small_run, epochs=2, data=replace(small_run.data, shards=shards))
    seen = {}
    for steps in (4, None):
        trainer = spike(Trainer.build(config, folder / "run", World()), SPIKE, factor=np.inf)
        plain = trainer.step

        def step(batch, plain=plain):
            seen[batch.step + 1] = batch.sample_ids
            return plain(batch)

        trainer.step = step
        try:
            trainer.run(steps)
            if steps:  # `run` does not save if it is given a number of steps
                trainer._save(force=True)
        finally:
            trainer.close()
    return folder / "run", seen


def images_of(run: Path, step: int, **options) -> list[int]:
    source = RunImages(run)
    try:
        found = source.of_step(step, **options)
        return np.concatenate([one.sample_ids for one in found.ranks]).tolist()
    finally:
        source.close()


def test_every_step_has_the_images_that_it_was_trained_on(trained):
    run, seen = trained
    assert sorted(seen) == list(range(1, 11))
    source = RunImages(run)
    wanted = []
    for step, ids in seen.items():
        (one,) = source.of_step(step).ranks
        assert np.array_equal(one.sample_ids, ids)
        wanted += one.wanted_ids[one.wanted_ids != one.sample_ids].tolist()
    assert set(wanted) == set(BAD)
    assert source.steps_done() == 10
    source.close()


def test_a_rank_has_its_part_after_the_number_of_ranks_changed(trained, tmp_path):
    run, seen = trained
    shutil.copytree(run, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    saved = folder.read_config()
    assert saved["ranks"] == [[0, 1], [4, 1]]
    folder.write_config(saved | {"ranks": [[0, 1], [4, 2]]})
    for step, world_size in ((4, 1), (5, 2)):
        parts = np.split(seen[step], world_size)
        for rank, part in enumerate(parts):
            assert images_of(folder.path, step, rank=rank) == part.tolist()
        with pytest.raises(ValueError, match=f"ranks of step {step} were 0"):
            images_of(folder.path, step, rank=world_size)


def test_a_run_of_an_earlier_version_is_read_from_its_checkpoint(trained, tmp_path):
    run, seen = trained
    shutil.copytree(run, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    saved = folder.read_config()
    folder.write_config({k: v for k, v in saved.items() if k not in ("data", "ranks")})
    assert images_of(folder.path, 9) == seen[9].tolist()
    for path in list_checkpoints(folder.checkpoints):
        (path / "state.json").write_text("{}")
    with pytest.raises(RunError, match=r"state\.json differs"):
        images_of(folder.path, 9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": 11}, "the steps of this run are 1 to 10"),
        ({"step": 0}, "the steps of this run are 1 to 10"),
        ({"shards": "other"}, "give the original set with --shards"),
        ({"run": "no"}, "is it the folder given to fastmoco train --out"),
    ],
    ids=str,
)
def test_wrong_questions_are_refused(trained, digits, change, words, tmp_path):
    run = tmp_path if "run" in change else trained[0]
    with pytest.raises((RunError, ValueError), match=words):
        RunImages(run, digits[1] if "shards" in change else "").of_step(change.get("step", 1))


@pytest.mark.parametrize(
    ("group", "name"),
    [
        *(("resolved", name) for name in ("total_steps", "steps_per_epoch", "world_size")),
        *(("data", name) for name in ("seed", "global_batch_size", "shuffle_window")),
    ],
)
@pytest.mark.parametrize("value", ["x", [], True, -1, 1.5, 10**30])
def test_a_field_of_another_type_is_named(trained, group, name, value, tmp_path):
    folder = RunFolder(tmp_path)
    saved = RunFolder(trained[0]).read_config()
    folder.write_config(saved | {group: saved[group] | {name: value}})
    with pytest.raises(RunError, match=rf"config.json: {group}.{name}=.*: must be a whole number"):
        RunImages(tmp_path)


def test_the_command_lists_spikes_and_images(trained, capsys):
    run, seen = trained
    assert main(["run", "images", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"step {SPIKE}: gradient norm of " in out
    assert "total not finite; skipped" in out
    assert f"--step {SPIKE}" in out
    assert main(["run", "images", str(run), "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["spikes"]
    assert one["step"] == SPIKE
    assert one["gradient_norms"]["total"] is None

    # The images of two steps, one of which has a stand-in.
    with_bad = next(step for step in seen if step != SPIKE and stands_in(run, step))
    steps = [str(SPIKE), str(with_bad)]
    assert main(["run", "images", str(run), "--step", *steps, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["steps"]
    for one in found:
        assert [image["sample"] for image in one["images"]] == seen[one["step"]].tolist()
        # digits are packed from class folders
        assert all(image["path"].startswith(f"{image['label']}/") for image in one["images"])
    assert {image["in_place_of"]["sample"] for image in found[1]["images"] if len(image) > 6} <= (
        set(BAD)
    )
    assert main(["run", "images", str(run), "--step", *steps]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 2 + 2 * 256
    assert sum("in place of train-000000.tar: " in line for line in out) >= 1
    assert out[1].startswith("rank 0 ")
    assert ".png  (train-000000.tar: 00000" in out[1]


def stands_in(run: Path, step: int) -> bool:
    source = RunImages(run)
    (one,) = source.of_step(step).ranks
    source.close()
    return bool((one.wanted_ids != one.sample_ids).any())


def test_world_sizes_follow_the_starts_that_count():
    saved = {"ranks": [[0, 4], [100, 8], [200, 2]]}
    assert [world_size_at(saved, step) for step in (1, 100, 101, 200, 201)] == [4, 4, 8, 8, 2]
    # back to the checkpoint of step 150: later starts are trained again
    assert with_start(saved, 150, 16) == [[0, 4], [100, 8], [150, 16]]
    assert with_start(saved, 0, 1) == [[0, 1]]
    for broken in ({}, {"ranks": 3}, {"ranks": [[0, 0]]}, {"ranks": [[0, 1], 5]}):
        assert world_size_at(broken, 5) is None
