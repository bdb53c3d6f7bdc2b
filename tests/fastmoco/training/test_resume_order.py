"""A run keeps the order it began with: the window of shards shuffled together is remembered, and
other cuts are refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from fastmoco.config.serial import differences, from_json, to_json
from fastmoco.distributed.mesh import World
from fastmoco.errors import RunError
from fastmoco.recipes import get_recipe
from fastmoco.training import resume, setup
from fastmoco_pipelines import pack_folder


def checkpoint(**data: object) -> SimpleNamespace:
    return SimpleNamespace(state={"data": data})


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
