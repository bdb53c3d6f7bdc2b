"""Configs with one view, with two, and with groups of small crops."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from PIL import Image

from fastmoco import recipes
from fastmoco.config import Config, DataConfig, ModelConfig
from fastmoco.config.serial import differences, flatten, from_json, may_change, to_json
from fastmoco.recipes import get_recipe, with_image_size
from fastmoco_pipelines.making.digits import pack_digits
from fastmoco_pipelines.spec import Resume, ViewSpec, cmae_views, each_view, moco_v3_views
from tests.command_line import main

CROPS = ViewSpec(size=96, crop_scale=(0.05, 0.4), copies=6, blur_sigma=(0.1, 1.0), color="exact")


def multi_crop(*more: ViewSpec, **changes) -> Config:
    config = get_recipe("vit_s16_e300_b1024")
    return replace(config, data=replace(config.data, shards="x", more_views=more, **changes))


def test_the_pair_of_a_recipe_reaches_the_loader_as_before():
    config = replace(get_recipe("vit_s16_e300_b1024"), data=DataConfig(shards="x"))
    spec = config.loader_spec(device="cpu", threads=1)
    assert spec.views == spec.each_view == moco_v3_views()
    data = to_json(config)["data"]
    assert {"shards", "view1", "view2"} <= data.keys()
    assert data["view1"]["size"] == data["view2"]["size"] == 224


def test_a_config_from_before_more_views_loads_and_may_continue():
    config = get_recipe("vit_s16_e300_b1024")
    old = json.loads(json.dumps(to_json(config)))
    del old["data"]["more_views"], old["data"]["view1"]["copies"], old["data"]["view2"]["copies"]
    assert from_json(old) == config
    assert differences(from_json(old), config) == []


def test_a_config_from_before_there_was_a_filter_means_bilinear():
    config = multi_crop(CROPS)
    old = json.loads(json.dumps(to_json(config)))
    for group in (old["data"]["view1"], old["data"]["more_views"][0]):
        assert group.pop("interpolation") == "bilinear"
    assert from_json(old) == config
    cubic = multi_crop(replace(CROPS, interpolation="bicubic"))
    (found,) = differences(from_json(old), cubic)
    assert found == "data.more_views.0.interpolation: 'bilinear' -> 'bicubic'"
    assert may_change(cubic, found.partition(":")[0], Resume.WITH_ALLOW)


def test_groups_of_small_crops_reach_the_loader_and_travel_through_json():
    config = multi_crop(CROPS, replace(CROPS, size=32, copies=1))
    assert from_json(json.loads(json.dumps(to_json(config)))) == config
    spec = config.loader_spec(device="cpu", threads=1)
    assert [view.size for view in spec.each_view] == [224, 224] + [96] * 6 + [32]
    assert flatten(config)["data.more_views.1.size"] == 32


def test_one_view():
    config = multi_crop()
    config = replace(config, data=replace(config.data, view2=ViewSpec(size=8, copies=0)))
    (view,) = config.loader_spec(device="cpu", threads=1).each_view
    assert view == config.data.view1
    assert each_view(config.data.views) == (view,)


def test_differences_count_groups_and_name_their_fields():
    config = multi_crop(CROPS)
    stronger = replace(CROPS, hue=0.2)
    assert differences(multi_crop(), config) == ["data.more_views: 0 -> 1"]
    assert differences(config, multi_crop()) == ["data.more_views: 1 -> 0"]
    found = differences(config, multi_crop(stronger, CROPS))
    assert found == ["data.more_views: 1 -> 2", "data.more_views.0.hue: 0.1 -> 0.2"]
    assert all(may_change(config, line.partition(":")[0], Resume.WITH_ALLOW) for line in found)


def test_an_image_size_carries_small_crops_along_to_whole_patches():
    config = with_image_size(multi_crop(CROPS), 112)
    (crops,) = config.data.more_views
    assert (config.data.view2.size, crops.size, crops.copies) == (112, 48, 6)
    assert crops.blur_sigma == pytest.approx((0.05, 0.5))
    tiny = with_image_size(multi_crop(CROPS), 32).data
    assert tiny.more_views[0].size == 16  # a whole patch
    assert tiny.more_views[0].blur_sigma == pytest.approx((0.1 / 7, 1 / 7))
    assert tiny.view1.blur_sigma == pytest.approx((0.1 / 7, 2 / 7))


def test_an_image_size_carries_a_shared_crop_along():
    config = multi_crop()

    def pair(size):
        return dict(zip(("view1", "view2"), cmae_views(size), strict=True))

    config = replace(config, data=replace(config.data, **pair(224)))
    for size in (112, 64):
        data = with_image_size(config, size).data
        assert (data.view1, data.view2) == cmae_views(size)
    # A config that was stored before there were shared crops.
    stored = to_json(config)
    for view in ("view1", "view2"):
        for name in ("shares_crop", "base_size", "shift", "crop_misfit"):
            del stored["data"][view][name]
    old = from_json(stored).data
    assert (old.view1.base_size, old.view2.shift, old.view2.shares_crop) == (0, 0, False)
    assert old.view1.crop_misfit == "retry"
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (
            lambda: DataConfig(view2=replace(ViewSpec(), shares_crop=True, crop_scale=(0.2, 1))),
            r"more_views=\(\(0.2, 1\),\): crop_scale of the groups with shares_crop",
        ),
        (lambda: DataConfig(view1=ViewSpec(copies=0)), r"view1.copies=0: .*set view2.copies to 0"),
        (
            lambda: DataConfig(view2=ViewSpec(size=96)),
            r"view2.size=96: both views must have the same size",
        ),
        (
            lambda: multi_crop(CROPS, ViewSpec()),
            r"view1, view2 and more_views=\(224, 224, 96, 224\): .*neighbours, change the order",
        ),
        (
            lambda: multi_crop(replace(CROPS, copies=300)),
            r"more_views=\(1, 1, 300\): .*at most 255",
        ),
        (
            lambda: multi_crop(replace(CROPS, size=90)),
            r"data.more_views.0.size=90: must be a multiple of model.patch_size=16",
        ),
        (
            lambda: multi_crop(CROPS, replace(CROPS, size=256)),
            r"data.more_views.1.size=256: .*at most model.image_size=224",
        ),
        (
            lambda: replace(multi_crop(CROPS), model=ModelConfig(image_size=112)),
            r"data.view1.size=224: must be model.image_size=112",
        ),
        (
            lambda: from_json({"data": {"more_views": [{"colour_of": 3}]}}),
            r"config.data.more_views.0=\['colour_of'\]: unknown fields",
        ),
    ],
)
def test_views_that_do_not_fit_are_refused_by_field_with_a_cure(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_the_command_line_reaches_every_group_and_the_picture_shows_all_views(
    monkeypatch, tmp_path, capsys
):
    small = replace(CROPS, size=4, blur_sigma=(0.01, 0.04), copies=2)
    config = get_recipe("quickstart_digits")
    config = replace(config, data=replace(config.data, more_views=(small,)))
    monkeypatch.setitem(recipes.RECIPES, "multi_crop", lambda: config)
    words = ["--data.more-views.0.copies", "3", "--format", "json"]
    assert main(["print-config", "multi_crop", *words]) == 0
    assert json.loads(capsys.readouterr().out)["data"]["more_views"][0]["copies"] == 3
    shards, _ = pack_digits(tmp_path / "digits")
    pictures = {}
    for copies in (1, 3):
        out = tmp_path / f"{copies}.png"
        words = ["--rows", "2", "--no-parameters", "--more-views.0.copies", str(copies)]
        assert (
            main(["data", "views", shards, "--recipe", "multi_crop", "--out", str(out), *words])
            == 0
        )
        pictures[copies] = Image.open(out).size
    # Two images a row with three views each, one image a row with five; cells of 96 pixels, 4
    # between them.
    assert pictures == {1: (2 * (4 * 100 + 8) - 4, 2 * 100 + 4), 3: (6 * 100 + 8 - 4, 2 * 100 + 4)}
