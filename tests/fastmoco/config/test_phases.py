"""Schedules of tokens and patches: what is read, where phases begin, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fastmoco.config import Config, DataConfig, ModelConfig
from fastmoco.config.phases import Phase, Phases, phases_of
from fastmoco.config.serial import from_json, to_json
from fastmoco_pipelines.spec import ViewSpec


def test_a_single_number_ends_with_all_tokens() -> None:
    assert phases_of("1", "", 16) == Phases()
    assert phases_of("1", "16@0", 16).plain
    assert phases_of("0.5", "", 16).items == (Phase(keep=0.5), Phase(start=0.95))
    assert phases_of("0.5@0", "", 16).items == (Phase(keep=0.5),)


def test_both_schedules_share_their_borders() -> None:
    phases = phases_of("0.25@0,0.5@0.6,1@0.95", "32@0,16@0.3", 16)
    assert [(p.start, p.keep, p.patch_size) for p in phases.items] == [
        (0.0, 0.25, 32),
        (0.3, 0.25, 0),
        (0.6, 0.5, 0),
        (0.95, 1.0, 0),
    ]
    assert phases.shares() == pytest.approx((0.3, 0.3, 0.35, 0.05))
    assert len(phases_of("0.5@0,1@0.3,0.5@0.6", "", 16).distinct()) == 2


def test_the_largest_phases_have_the_most_tokens_left_or_in_all() -> None:
    assert phases_of("0.5", "32@0,16@0.3", 16).largest(16) == (Phase(start=0.95),)
    phases = phases_of("1@0,0.1@0.5", "32@0,16@0.5", 16)
    assert phases.largest(16) == phases.items


def test_a_phase_begins_at_its_share_of_the_steps() -> None:
    phases = phases_of("0.25@0,0.5@0.7,1@0.95", "", 16)
    keeps = [phases.at(step, 10).keep for step in range(10)]
    assert keeps == [0.25] * 7 + [0.5] * 2 + [1.0]  # and the last phase has a step
    assert [phases.at(step, 200).keep for step in (139, 140, 189, 190)] == [0.25, 0.5, 0.5, 1.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_tokens": "0"}, r"keep_tokens='0': every share of tokens must be in \(0, 1\]"),
        ({"keep_tokens": "nan"}, "every share of tokens"),
        ({"keep_tokens": "half"}, "'half' is not a share"),
        ({"keep_tokens": "0.5@0.1"}, "must start at 0"),
        ({"keep_tokens": "0.5@0,1@1"}, "less than 1"),
        ({"keep_tokens": "0.5@0,0.7@0.5,1@0.5"}, "rise"),
        ({"keep_tokens": "0.5@0,1"}, "must start at 0, rise"),
        ({"keep_tokens": "0.001"}, "keeps none of the 196 patch tokens"),
        ({"keep_tokens": "0.5", "mlp_norm": "batch"}, "use mlp_norm=layer"),
        ({"keep_tokens": "0.5", "architecture": "resnet50"}, "it has no tokens"),
        ({"patch_schedule": "24@0,16@0.5"}, "multiple of patch_size=16"),
        ({"patch_schedule": "48@0,16@0.5"}, "image_size=224 must be a multiple"),
        ({"patch_schedule": "32@0"}, r"must end with patch_size=16.*32@0,16@0\.3"),
        ({"patch_schedule": "32.5@0,16@0.5"}, "not a whole number"),
        ({"patch_schedule": "32@0,16@0.5", "architecture": "vit_conv_small"}, "conv stem"),
    ],
)
def test_what_is_refused(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)  # type: ignore[arg-type]


def test_small_views_must_fit_too() -> None:
    data = DataConfig(synthetic=True, more_views=(ViewSpec(size=96, copies=2),))
    Config(data=data, model=ModelConfig(keep_tokens="0.5", patch_schedule="32@0,16@0.5"))
    with pytest.raises(ValueError, match=r"more_views\.0\.size=96: must be a multiple of every"):
        Config(data=data, model=ModelConfig(patch_schedule="112@0,16@0.5"))
    with pytest.raises(ValueError, match=r"keeps none of the 36 patch tokens of this view"):
        Config(data=data, model=ModelConfig(keep_tokens="0.02"))


def test_schedules_are_stored_as_they_were_typed() -> None:
    config = Config(data=DataConfig(synthetic=True))
    config = replace(config, model=replace(config.model, keep_tokens="0.25@0,1@0.5"))
    assert from_json(to_json(config)) == config
