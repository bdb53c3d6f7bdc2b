"""A run keeps the order it began with: its version and the window of shards shuffled together are
remembered, and other cuts are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fastmoco.checkpoint import list_checkpoints, load_checkpoint
from fastmoco.config import Config
from fastmoco.config.serial import differences, from_json, to_json
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.recipes import get_recipe
from fastmoco.run.folder import RunFolder
from fastmoco.training import resume, setup
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import Loader, epoch_order, pack_folder
from fastmoco_pipelines.loading.batch import BatchStream


def checkpoint(**data: object) -> SimpleNamespace:
    return SimpleNamespace(state={"data": data}, path=Path("step-3"))


def sorted_words(seed: int, epoch: int, count: int) -> np.ndarray:
    """Version 1, as it was before there were versions."""
    words = np.random.Philox(key=[seed, 0x6F72646572], counter=[0, 0, epoch, 0]).random_raw(count)
    return np.argsort(words, kind="stable")


def trained(config: Config, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """Run to the end; returns the samples of each step that was made."""
    seen = {}
    of_loader = Loader.next

    def next_batch(loader: Loader) -> object:
        batch = of_loader(loader)
        seen[batch.step] = batch.sample_ids.tolist()
        return batch

    with monkeypatch.context() as patch:
        patch.setattr(Loader, "next", next_batch)
        trainer = Trainer.build(config, out, World(), trust=True)
        try:
            assert trainer.run() == 0
        finally:
            trainer.close()
    return seen


def copied(whole: Path, step: int, out: Path) -> Path:
    """A run of which nothing but the checkpoint of a step is left."""
    saved = {load_checkpoint(one).step: one for one in list_checkpoints(whole / "checkpoints")}
    (out / "checkpoints").mkdir(parents=True)
    shutil.copytree(saved[step], out / "checkpoints" / saved[step].name)
    return out


def expected(
    config: Config, steps: range, order: Callable[[int, int, int], np.ndarray]
) -> dict[int, list[int]]:
    size = config.global_batch_size
    per_epoch = 360 // size
    orders = {epoch: order(config.seed, epoch, 360) for epoch in range(3)}
    return {
        step: orders[step // per_epoch][step % per_epoch * size :][:size].tolist() for step in steps
    }


@pytest.mark.slow
def test_a_run_from_before_versions_keeps_its_order(brief_run, tmp_path, monkeypatch):
    """Its checkpoints do not name a version. It continues with version 1, bit for bit, and goes on
    so from the checkpoints that it writes now."""
    config = replace(brief_run, checkpoint=replace(brief_run.checkpoint, keep=100))
    whole, resumed, again = tmp_path / "whole", tmp_path / "resumed", tmp_path / "again"
    of_stream = BatchStream.state_dict

    def without_version(stream: BatchStream) -> dict[str, object]:
        state = of_stream(stream)
        assert state.pop("order_version") == 1
        return state

    with monkeypatch.context() as before:
        before.setattr(resume, "ORDER_VERSION", 1)
        before.setattr(BatchStream, "state_dict", without_version)
        assert trained(config, whole, monkeypatch) == expected(config, range(15), sorted_words)
    losses = RunFolder(whole).read_metric("loss")

    seen = trained(config, copied(whole, 3, resumed), monkeypatch)
    assert seen == expected(config, range(3, 15), sorted_words)
    assert RunFolder(resumed).read_metric("loss") == losses[3:]
    seen = trained(config, copied(resumed, 6, again), monkeypatch)
    assert seen == expected(config, range(6, 15), sorted_words)
    assert RunFolder(again).read_metric("loss") == losses[6:]


def test_a_new_run_saves_the_version_of_its_order(brief_run, tmp_path, monkeypatch):
    config = replace(brief_run, epochs=1)
    seen = trained(config, tmp_path / "run", monkeypatch)
    assert seen == expected(config, range(5), epoch_order)
    (newest,) = list_checkpoints(tmp_path / "run" / "checkpoints")[-1:]
    assert load_checkpoint(newest).state["data"]["order_version"] == 2


def test_an_unknown_version_is_refused_with_the_reason():
    assert resume.order_version(None) == 2
    assert resume.order_version(checkpoint(step=3)) == 1
    assert [resume.order_version(checkpoint(order_version=known)) for known in (1, 2)] == [1, 2]
    for version in (0, 3, "2", None):
        with pytest.raises(RunError, match=rf"step-3: .* version {version!r} .*knows 1 and 2"):
            resume.order_version(checkpoint(order_version=version))


@pytest.mark.parametrize("version", [1, 2])
def test_synthetic_runs_carry_a_version_too(version):
    config = get_recipe("quickstart_digits")
    config = replace(config, data=replace(config.data, synthetic=True))
    with setup.build_train_loader(config, World(), threads=1, order_version=version) as loader:
        assert loader.state_dict()["order_version"] == version
        ids = epoch_order(config.seed, 0, 1_281_167, version=version)
        size = config.global_batch_size
        assert np.array_equal(loader.next().sample_ids, ids[:size])


def test_the_window_of_a_run_goes_on(tmp_path):
    (tmp_path / "src").mkdir()
    for i in range(96):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / "src" / f"{i}.png")
    train = pack_folder(tmp_path / "src", tmp_path / "set", shard_samples=32).pattern
    config = get_recipe("quickstart_digits")
    config = replace(config, data=replace(config.data, shards=train), global_batch_size=64)
    begun = replace(config, data=replace(config.data, shuffle_window=1))
    assert resume.shuffle_window(None) is None
    assert resume.shuffle_window(checkpoint(step=3)) == 0  # of a run from before there were windows
    for wanted, remembered, window in (
        (begun, None, 1),
        (config, 1, 1),
        (config, None, 0),
        (begun, 0, 1),
    ):
        loader = setup.build_train_loader(wanted, World(), threads=1, shuffle_window=remembered)
        assert loader.shuffle_window == window
        assert loader.state_dict().get("shuffle_window", 0) == window
        loader.close()
    assert differences(config, begun) == ["data.shuffle_window: None -> 1"]
    moved = replace(config, data=replace(config.data, cache_dir="/elsewhere", cache_size_gb=3))
    assert not differences(config, moved)


def test_another_cut_into_shards_is_refused():
    resume.require_same_order(checkpoint(step=3), "")
    resume.require_same_order(checkpoint(shuffle_window=4, order_digest="a"), "a")
    for before, now in (
        ({"shuffle_window": 4, "order_digest": "a"}, "b"),
        ({}, "b"),
        ({"order_digest": "a"}, ""),
    ):
        with pytest.raises(
            RunError,
            match=r"another order of the images.* shards together .*--data\.shuffle-window",
        ):
            resume.require_same_order(checkpoint(**before), now)


def test_configs_from_before_the_cache_load():
    data = to_json(get_recipe("quickstart_digits"))
    for name in ("cache_dir", "cache_size_gb", "shuffle_window"):
        del data["data"][name]
    assert from_json(data) == get_recipe("quickstart_digits")
    assert from_json(to_json(from_json(data))).data.shuffle_window is None
