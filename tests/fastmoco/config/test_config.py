"""Configs refuse what cannot be, travel through JSON unchanged, and say what differs."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar

import pytest

from fastmoco.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    KnnConfig,
    MoCoV3Config,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    resolve,
)
from fastmoco.config.limits import require_limit
from fastmoco.config.parallel import ParallelConfig
from fastmoco.config.serial import differences, flatten, from_json, marked, may_change, to_json
from fastmoco.recipes import (
    EXPECTED,
    RECIPES,
    get_recipe,
    near_recipes,
    quickstart_digits,
    with_image_size,
)
from fastmoco_pipelines.spec import FieldError, LoaderOptions, Resume, ViewSpec


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_travel_through_json(name):
    config = get_recipe(name)
    assert config.recipe == name
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_the_official_numbers():
    config = get_recipe("vit_b16_e300_b4096")
    assert (config.model.architecture, config.epochs, config.global_batch_size) == (
        "vit_base",
        300,
        4096,
    )
    assert config.peak_lr == pytest.approx(2.4e-3)
    assert (
        config.optim.weight_decay,
        config.optim.warmup_epochs,
        config.objective.temperature,
    ) == (0.1, 40, 0.2)
    assert (config.objective.ema_momentum, config.objective.ema_schedule) == (0.99, "cosine")
    view1, view2 = config.data.view1, config.data.view2
    assert (view1.blur_probability, view2.blur_probability) == (1.0, 0.1)
    assert (view1.solarize_probability, view2.solarize_probability) == (0.0, 0.2)
    assert view1.crop_scale == (0.08, 1.0)
    assert config.eval_spec().resize == 256


OFFICIAL = {
    # optimizer, base rate, decay, epochs, warm-up, batch, temperature, momentum, least crop, top-1
    "resnet50_e100_b4096": ("lars", 0.6, 1e-6, 100, 10, 4096, 1.0, 0.99, 0.2, 68.9),
    "resnet50_e300_b4096": ("lars", 0.3, 1e-6, 300, 10, 4096, 1.0, 0.99, 0.2, 72.8),
    "resnet50_e1000_b4096": ("lars", 0.3, 1.5e-6, 1000, 10, 4096, 1.0, 0.996, 0.2, 74.6),
    "vit_s16_e300_b1024": ("adamw", 1.5e-4, 0.1, 300, 40, 1024, 0.2, 0.99, 0.08, None),
    "vit_s16_e300_b4096": ("adamw", 1.5e-4, 0.1, 300, 40, 4096, 0.2, 0.99, 0.08, 73.2),
    "vit_b16_e300_b4096": ("adamw", 1.5e-4, 0.1, 300, 40, 4096, 0.2, 0.99, 0.08, 76.7),
}


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_configuration_of_the_official_release(name):
    config = get_recipe(name)
    optim, objective = config.optim, config.objective
    for view in config.data.views:
        assert (
            optim.name,
            optim.lr,
            optim.weight_decay,
            config.epochs,
            optim.warmup_epochs,
            config.global_batch_size,
            objective.temperature,
            objective.ema_momentum,
            view.crop_scale[0],
            EXPECTED[name].linear,
        ) == OFFICIAL[name]
    assert objective.ema_schedule == "cosine"
    assert (config.model.projection_dim, config.model.hidden_dim) == (256, 4096)
    # The docstring states accuracy, source and hardware.
    for stated in (EXPECTED[name].linear or "not published", "official release", "V100 GPUs"):
        assert str(stated) in (RECIPES[name].__doc__ or "")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("r50", "resnet50_e100_b4096"),
        ("ResNet-50", "resnet50_e100_b4096"),
        ("moco_rn50", "resnet50_e100_b4096"),
        ("vit_large", "vit_l16_e300_b4096"),
        ("vit_conv_small", "vit_conv_s16_e300_b4096"),
        ("ViT-H/14", "vit_h14_e300_b4096"),
        ("MoCo_v3", "vit_s16_e300_b4096"),
        ("mocov2", "moco_v2_r50_e200_b256"),
        ("DINO", "dino_vit_s16_e100_b512"),
    ],
)
def test_other_programs_names_of_encoders_are_understood(typed, meant):
    assert near_recipes(typed)[0] == meant


def test_a_wrong_recipe_name_gets_the_nearest():
    with pytest.raises(ValueError, match="did you mean vit_s16_e300_b1024"):
        get_recipe("vit_s16_e300_b1023")


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (
            lambda: ModelConfig(image_size=100),
            r"image_size=100: must be a multiple of patch_size=16",
        ),
        (lambda: ModelConfig(architecture="vit_giant"), "architecture='vit_giant'"),
        (lambda: MoCoV3Config(temperature=0), "temperature=0: must be positive"),
        (lambda: MoCoV3Config(ema_momentum=1.1), "ema_momentum=1.1"),
        (lambda: OptimConfig(lr=-1), "lr=-1"),
        (lambda: OptimConfig(betas=(0.9, 1.0)), "betas"),
        (lambda: KnnConfig(k=0), "k=0"),
        (lambda: CheckpointConfig(keep=0), "keep=0"),
        (lambda: Config(epochs=0), "epochs=0"),
        (lambda: Config(epochs=10), r"optim.warmup_epochs=40: must be at most epochs=10"),
        (lambda: Config(global_batch_size=1), "global_batch_size=1"),
        (
            lambda: Config(model=ModelConfig(image_size=32)),
            r"data.view1.size=224: must be model.image_size=32",
        ),
    ],
)
def test_errors_name_field_value_and_rule(build, text):
    with pytest.raises(ValueError, match=text):
        build()


def test_resolve_counts_whole_batches():
    config = replace(get_recipe("vit_s16_e300_b1024"), epochs=90)
    resolved = resolve(config, world_size=8, sample_count=1_281_167)
    assert (resolved.steps_per_epoch, resolved.total_steps, resolved.local_batch_size) == (
        1251,
        112_590,
        128,
    )
    assert resolved.peak_lr == pytest.approx(6e-4)


def test_resolve_refuses_worlds_and_sets_that_do_not_fit():
    config = get_recipe("vit_s16_e300_b1024")
    with pytest.raises(
        ValueError, match="global_batch_size=1024: must be a multiple of the 3 processes"
    ):
        resolve(config, world_size=3, sample_count=5000)
    with pytest.raises(
        ValueError, match="at most the 1000 training images; --global-batch-size 256 fits"
    ):
        resolve(config, world_size=1, sample_count=1000)


def test_differences_name_what_changes_training_and_nothing_else():
    config = get_recipe("quickstart_digits")
    assert differences(config, config) == []
    free = replace(
        config,
        threads=7,
        log_every_steps=1,
        knn=KnnConfig(k=5),
        data=replace(config.data, shards="elsewhere"),
    )
    assert differences(config, free) == []
    other = replace(config, seed=1, optim=replace(config.optim, lr=1.0))
    assert differences(config, other) == ["seed: 0 -> 1", "optim.lr: 0.0015 -> 1.0"]


def test_unknown_fields_are_refused_by_name():
    data = to_json(Config())
    data["optim"]["learning_rate"] = 1.0
    with pytest.raises(ValueError, match=r"config.optim=\['learning_rate'\]"):
        from_json(data)


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("knn", "k"), 0, r"config\.knn\.k=0: must be at least 1"),
        (("data", "view2", "size"), 0, r"config\.data\.view2\.size=0: a view"),
        (("epochs",), "many", r"config\.epochs='many': must be a number$"),
        (("seed",), True, r"config\.seed=True: must be a whole number$"),
        (("checkpoint", "keep"), 2.0, r"config\.checkpoint\.keep=2\.0: must be a whole number$"),
        (("optim", "lr"), False, r"config\.optim\.lr=False: must be a number$"),
        (("optim", "milestones"), ["1"], r"config\.optim\.milestones\.0='1': must be a"),
        (("optim",), [1], r"config\.optim=\[1\]: must be an object"),
        (("data", "more_views"), 3, r"config\.data\.more_views=3: must be a list"),
    ],
)
def test_a_wrong_value_in_json_is_named_by_file_and_path(path, value, named):
    data = to_json(Config())
    inner = data
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    with pytest.raises(FieldError, match=f"^{named}"):
        from_json(data)
    with pytest.raises(FieldError, match=f"^runs/a/state.json: {named}"):
        from_json(data, file=Path("runs/a/state.json"))


def test_an_error_of_a_field_survives_a_process_boundary():
    with pytest.raises(FieldError) as caught:
        KnnConfig(k=0)
    assert str(caught.value) == "k=0: must be at least 1"  # as a program has given it
    copy = pickle.loads(pickle.dumps(caught.value.under("knn")))  # noqa: S301 - its own bytes
    assert (str(copy), copy.name) == ("knn.k=0: must be at least 1", "knn.k")


def test_another_objective_writes_its_kind_and_an_unknown_one_is_refused():
    @dataclass(frozen=True, slots=True, kw_only=True)
    class OtherConfig(ObjectiveConfig):
        kind: ClassVar[str] = "other_in_this_test"
        strength: float = 1.0

    assert "kind" not in to_json(Config())["objective"]
    config = replace(Config(), objective=OtherConfig(strength=2.0))
    data = json.loads(json.dumps(to_json(config)))
    assert data["objective"] == {"kind": "other_in_this_test", "strength": 2.0}
    assert from_json(data) == config
    assert flatten(config)["objective.strength"] == 2.0
    assert differences(Config(), config) == ["objective: 'moco_v3' -> 'other_in_this_test'"]
    data["objective"]["kind"] = "nothing_of_that_name"
    with pytest.raises(
        ValueError, match=r"config.objective.kind='nothing_of_that_name': .*known are .*moco_v3"
    ):
        from_json(data)


@pytest.mark.parametrize("kind", [["x"], {"x": 1}, 3, None])
def test_a_kind_of_objective_that_is_no_name_is_refused_by_field(kind):
    data = to_json(Config())
    data["objective"] = {"kind": kind, **data["objective"]}
    with pytest.raises(
        ValueError, match=rf"config\.objective\.kind={re.escape(repr(kind))}: .*known are .*moco_v3"
    ):
        from_json(data)


def test_flatten_spells_names_as_the_command_line_does():
    flat = flatten(Config())
    assert flat["data.view2.solarize_probability"] == 0.2
    assert all(not isinstance(value, dict) for value in flat.values())


def test_another_image_size_carries_views_and_blur_along():
    config = with_image_size(get_recipe("vit_s16_e300_b1024"), 112)
    assert config.data.view1.size == config.data.view2.size == config.model.image_size == 112
    assert config.data.view1.blur_sigma == pytest.approx((0.05, 1.0))


def test_a_config_from_before_a_field_was_there_still_loads():
    old = to_json(Config())
    del old["parallel"], old["model"]["compile"]
    assert from_json(old) == Config()
    sharded = replace(Config(), parallel=ParallelConfig(strategy="hsdp", shard_size=4))
    assert from_json(json.loads(json.dumps(to_json(sharded)))) == sharded
    assert differences(Config(), sharded) == []


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"strategy": "zero"}, "strategy='zero': must be one of"),
        ({"strategy": "hsdp", "shard_size": 1}, "shard_size=1: must be 0 or at least 2"),
        ({"strategy": "fsdp", "shard_size": 2}, "shard_size=2: is for strategy hsdp, not fsdp"),
        ({"verify_replicas_every": -1}, "verify_replicas_every=-1: must not be negative"),
    ],
)
def test_parallel_settings_that_make_no_sense_are_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        ParallelConfig(**fields)


FREE = """recipe threads log_every_steps batch.* parallel.* model.checkpointing model.compile model.blocks
model.init objective.keys optim.fused_backend data.shards data.images data.max_side data.threads data.view_dtype
data.prefetch data.sub_batch data.decode_gb data.seconds_per_image data.cache_dir
data.cache_size_gb data.max_bad_share data.timeout_s data.max_transfers knn.* accuracy.* checkpoint.* faults.*
trackers.*"""
WITH_ALLOW = """epochs model.linears model.momentum_linears objective.temperature objective.ema_momentum
objective.ema_schedule optim.lr optim.weight_decay optim.betas optim.eps optim.sgd_momentum optim.trust_coefficient
optim.warmup_epochs optim.clip_norm optim.clip_tensor_norm optim.final_weight_decay
optim.lr_scaling optim.schedule optim.warmup_lr optim.final_lr
optim.lr_in_buffer optim.nesterov optim.milestones optim.milestone_factor data.view1.* data.view2.* data.more_views"""


@pytest.mark.parametrize(
    ("mark", "expected"), [(Resume.FREE, FREE), (Resume.WITH_ALLOW, WITH_ALLOW)]
)
def test_each_field_says_whether_it_may_change_when_a_run_continues(mark, expected):
    """A field without a mark is not in either list, and a change of it refuses the run."""
    leaves = flatten(Config())
    patterns = expected.split()
    assert {name for name in leaves if may_change(Config(), name, mark)} == {
        name for name in leaves if any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    names = sorted(pattern.removesuffix("*").removesuffix(".") for pattern in patterns)
    assert sorted(marked(Config(), mark)) == names


def test_the_numbers_of_every_objective_bear_marks_of_their_own():
    config = get_recipe("byol_digits")
    ours = [name for name in marked(config, Resume.WITH_ALLOW) if name.startswith("objective.")]
    assert ours == ["objective.ema_momentum", "objective.ema_schedule"]


def test_a_mark_does_not_cover_fields_whose_names_begin_alike():
    assert may_change(Config(), "data.view1.size", Resume.WITH_ALLOW)
    assert not may_change(Config(), "data.view10.size", Resume.WITH_ALLOW)
    assert not may_change(Config(), "data.shards_of_another", Resume.FREE)


def test_cuda_is_another_spelling_of_gpu():
    saved = to_json(Config()) | {"device": "cuda"}
    assert from_json(saved) == Config(device="cuda") == replace(Config(), device="gpu")
    assert to_json(from_json(saved))["device"] == "gpu"


def test_the_loader_gets_every_option_that_the_config_has():
    """One dataclass has these fields, so none can be forgotten between the two."""
    changed = {
        "prefetch": 3,
        "sub_batch": 5,
        "decode_gb": 0.5,
        "seconds_per_image": 8.0,
        "cache_dir": "/c",
        "cache_size_gb": 7,
        "shuffle_window": 2,
    }
    changed |= {"max_bad_share": 0.5, "timeout_s": 9, "max_transfers": 5}
    assert changed.keys() == {option.name for option in fields(LoaderOptions)}
    config = replace(Config(), data=replace(Config().data, shards="x.tar", **changed))
    spec = config.loader_spec(device="cpu", threads=1)
    assert {name: getattr(spec, name) for name in changed} == changed


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"patch_size": 8}, "patch_size=8: has no effect on resnet18, because it has no patches"),
        ({"pooling": "mean"}, "--model.pooling class, or a ViT"),
        ({"positions": "none"}, "--model.positions sincos"),
        ({"mlp_norm": "batch"}, "it has no MLP"),
        ({"freeze_patch_embed": False}, "--model.freeze-patch-embed True"),
        ({"drop_path": 0.1}, "--model.drop-path 0.0"),
        ({"attention": "sdpa"}, "it has no attention"),
        ({"linears": "float8"}, "--model.linears native"),
        ({"momentum_linears": "float8"}, "--model.momentum-linears native"),
        ({"compile": True}, "--model.compile auto"),
        ({"blocks": "fused"}, "--model.blocks modules"),
        ({"checkpointing": "selective"}, "use full or none"),
    ],
)
def test_a_resnet_refuses_what_it_would_not_read(fields, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        ModelConfig(architecture="resnet18", **fields)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"patch_size": 4}, "4 pixels and 2 in swin_nano: take --model.patch-size 16, or a ViT"),
        ({"keep_tokens": "0.5"}, "keep_tokens='0.5': has no effect on swin_tiny"),
        ({"zero_residual": False}, "--model.zero-residual True, or a ResNet"),
        ({"attention": "sdpa"}, "windows have masks"),
        ({"compile": True}, "--model.compile auto"),
        ({"checkpointing": "selective"}, "use full or none"),
        ({"image_size": 30}, "image_size=30: must be a multiple of the encoder's patches, 4"),
        ({"image_size": 28}, "image_size=28: must be at least 32 for swin_tiny"),
        ({"window": 0}, "window=0: must be at least 1 token"),
        ({"window": 14, "architecture": "vit_small"}, "--model.window 7, or a Swin"),
    ],
)
def test_a_swin_refuses_what_it_would_not_read(fields, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        ModelConfig(**{"architecture": "swin_tiny", **fields})


def test_small_views_of_a_swin_are_whole_patches():
    model = ModelConfig(architecture="swin_tiny", window=14, drop_path=0.2, checkpointing="full")
    data = DataConfig(more_views=(ViewSpec(size=96),))
    Config(model=model, data=data)
    with pytest.raises(ValueError, match=r"more_views.0.size=98: .* the encoder's patches, 4, at"):
        Config(model=model, data=replace(data, more_views=(ViewSpec(size=98),)))


def test_a_resnet_takes_images_and_small_views_of_any_size():
    model = ModelConfig(
        architecture="resnet50", image_size=100, checkpointing="full", compile=False
    )
    assert model.family == "resnet"
    view = ViewSpec(size=100)
    data = DataConfig(view1=view, view2=view, more_views=(ViewSpec(size=37),))
    Config(model=model, data=data)
    with pytest.raises(ValueError, match=r"more_views.0.size=101: must be at most"):
        Config(model=model, data=replace(data, more_views=(ViewSpec(size=101),)))


def test_a_whole_number_beyond_all_floats_is_refused_by_its_limit():
    with pytest.raises(FieldError, match=r"x=1000000000.*must be at most"):
        require_limit("x", 10**400)


@pytest.mark.parametrize("value", [5, ["a.tar"], {"a": 1}, None, True])
@pytest.mark.parametrize("name", ["data.shards", "knn.test_shards", "recipe"])
def test_a_text_of_a_stored_config_is_a_text(name, value):
    stored = to_json(quickstart_digits())
    group, _, field = name.rpartition(".")
    (stored[group] if group else stored)[field] = value
    with pytest.raises(ValueError, match=f"config.{name}=.*must be a text"):
        from_json(stored)
