"""The file of an encoder: its header describes it completely, and a wrong header is refused."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastmoco.checkpoint import CheckpointError
from fastmoco.models.encoder_file import (
    Description,
    EncoderDescription,
    ResNetDescription,
    describe_run,
    description_of,
    load_encoder,
)
from fastmoco.recipes import get_recipe

SMALL = EncoderDescription.of(get_recipe("vit_nano8_e60_b256"))
RESNET = ResNetDescription(architecture="resnet_nano", image=SMALL.image)


def write(path: Path, description: Description = SMALL, **changes: str) -> Path:
    """A file with random weights; `changes` replace entries of its header, "" removes one."""
    torch.manual_seed(1)
    encoder = description.build()
    header = {"format": "pt", "step": "7", **description.to_metadata(), **changes}
    save_file(
        dict(encoder.state_dict()), path, metadata={k: v for k, v in header.items() if v != ""}
    )
    return path


def test_the_header_alone_builds_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(1)
    expected = SMALL.build().eval()
    loaded = load_encoder(write(tmp_path / "e.safetensors", method="byol"))
    images = torch.randn(2, 3, SMALL.image.size, SMALL.image.size)
    assert torch.equal(loaded.encoder(images), expected(images))
    assert loaded.image == SMALL.image
    assert loaded.header["method"] == "byol"
    assert not loaded.encoder.training


@pytest.mark.parametrize(
    ("name", "timm"),
    [
        ("vit_s16_e300_b4096", "vit_small_patch16_224"),
        ("vit_b16_e300_b4096", "vit_base_patch16_224"),
    ],
)
def test_vits_of_the_paper_have_a_name_in_timm_and_its_own_heads(name: str, timm: str) -> None:
    header = EncoderDescription.of(get_recipe(name)).to_metadata()
    assert header["timm_model"] == timm
    assert header["heads"] == "12"
    assert json.loads(header["timm_arguments"])["num_heads"] == 12
    assert json.loads(header["timm_pretrained_cfg"]) == {
        "input_size": [3, 224, 224],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "interpolation": "bilinear",
        "crop_pct": 0.875,
    }
    assert EncoderDescription.from_metadata(header) == EncoderDescription.of(get_recipe(name))


def test_timm_prepares_the_images_of_a_run_as_the_run_does() -> None:
    """Its own mean and deviation, and the side as timm computes it: crop / share, rounded down."""
    base = get_recipe("vit_s16_e300_b4096")
    view = replace(base.data.view1, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    own = replace(base, data=replace(base.data, view1=view))
    for architecture in ("vit_small", "resnet50"):
        config = replace(own, model=replace(own.model, architecture=architecture))
        header = describe_run(config).to_metadata()
        assert json.loads(header["timm_pretrained_cfg"])["mean"] == [0.1, 0.2, 0.3]
        assert json.loads(header["timm_pretrained_cfg"])["std"] == [0.4, 0.5, 0.6]
        assert description_of(header).image == config.eval_spec()
    for size in range(8, 400):
        for resize in (size, size + 1, round(size * 256 / 224)):
            image = replace(config.eval_spec(), size=size, resize=resize)
            header = replace(describe_run(config), image=image).to_metadata()
            share = json.loads(header["timm_pretrained_cfg"])["crop_pct"]
            assert math.floor(size / share) == resize


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": "2"}, "heads=2, but vit_nano has 4"),
        ({"heads": ""}, "its header has no heads"),
        ({"heads": "many"}, "cannot be read"),
        ({"mean": "[0.5]"}, "cannot be read"),
        ({"architecture": "vit_giant"}, "unknown to this version"),
        ({"patch_size": "4", "timm_arguments": ""}, "has shape"),
        ({"patch_size": "4"}, "contradicts itself"),
        ({"architecture": ""}, "6 and 12 heads have weights of the same shapes"),
    ],
)
def test_a_header_that_cannot_be_right_is_refused(
    tmp_path: Path, changes: dict[str, str], words: str
) -> None:
    path = write(tmp_path / "e.safetensors", **changes)
    with pytest.raises(CheckpointError, match=words) as error:
        load_encoder(path)
    assert str(path) in str(error.value)


def test_a_description_replaces_a_header_and_must_agree_with_one(tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file(dict(SMALL.build().state_dict()), bare)
    assert load_encoder(bare, SMALL).image == SMALL.image
    path = write(tmp_path / "e.safetensors")
    load_encoder(path, SMALL)
    with pytest.raises(CheckpointError, match="has heads=4, the caller wants 2"):
        load_encoder(path, replace(SMALL, heads=2))
    with pytest.raises(CheckpointError, match="only in the file or only in the encoder"):
        load_encoder(bare, replace(SMALL, depth=3))
    (tmp_path / "text").write_text("no safetensors")
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load_encoder(tmp_path / "text")


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm")
@pytest.mark.parametrize("recipe", ["vit_nano8_e60_b256", "vit_s16_e300_b4096"])
def test_timm_gives_the_same_features(tmp_path: Path, recipe: str) -> None:
    from safetensors import safe_open
    from timm.models.vision_transformer import VisionTransformer

    description = EncoderDescription.of(get_recipe(recipe))
    path = write(tmp_path / "e.safetensors", description)
    with safe_open(path, "pt") as file:
        theirs = VisionTransformer(**json.loads(file.metadata()["timm_arguments"])).eval()
        theirs.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    images = torch.randn(2, 3, description.image.size, description.image.size)
    with torch.no_grad():
        ours = load_encoder(path).encoder(images)
        torch.testing.assert_close(theirs(images), ours, rtol=1e-4, atol=1e-4)


def test_the_header_of_a_resnet_builds_it_and_names_it_as_torchvision_does(tmp_path: Path) -> None:
    path = write(tmp_path / "e.safetensors", RESNET)
    torch.manual_seed(1)
    expected = RESNET.build().eval()
    loaded = load_encoder(path, RESNET)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.encoder(images), expected(images))
    base = get_recipe("vit_s16_e300_b4096")
    config = replace(base, model=replace(base.model, architecture="resnet50"))
    header = describe_run(config).to_metadata()
    assert (header["torchvision_model"], header["width"], header["depth"]) == (
        "resnet50",
        "2048",
        "16",
    )
    assert description_of(header) == describe_run(config)
    assert "torchvision_model" not in loaded.header


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": "64"}, "width=64, but resnet_nano has 128"),
        ({"std": ""}, "its header has no std"),
        ({"mean": "[0.5]"}, "cannot be read"),
        ({"architecture": "resnet18", "width": "512", "depth": "8"}, "only in the file"),
        ({"architecture": "resnet101"}, "unknown to this version"),
    ],
)
def test_a_wrong_header_of_a_resnet_is_refused(
    tmp_path: Path, changes: dict[str, str], words: str
) -> None:
    path = write(
        tmp_path / "e.safetensors", RESNET, **({"heads": "4", "patch_size": "8"} | changes)
    )
    with pytest.raises(CheckpointError, match=words):
        load_encoder(path)
    with pytest.raises(CheckpointError, match="the caller wants vit_nano"):
        load_encoder(write(tmp_path / "f.safetensors", RESNET), SMALL)
