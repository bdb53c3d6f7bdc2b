"""Exports of a run: every format is read back by its own package, and a wrong one is not written."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastmoco.checkpoint import CheckpointError
from fastmoco.distributed.mesh import World
from fastmoco.models.encoder_file import (
    EncoderDescription,
    ResNetDescription,
    SwinDescription,
    load_encoder,
)
from fastmoco.models.weights import judging
from fastmoco.models.weights.judging import compare_features, features_of_export
from fastmoco.models.weights.writing import refusal, write_encoder
from fastmoco.recipes import get_recipe
from fastmoco.training import export_run
from fastmoco.training.encoder_source import load_source
from fastmoco.training.export_run import export_encoder
from fastmoco.training.load_run import load_run
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines.spec import EvalSpec
from tests.official_checkpoints import official_checkpoint

NEEDS = {"hf": ("transformers",), "onnx": ("onnx", "onnxscript", "onnxruntime")}


@pytest.fixture(scope="module")
def run(small_run, tmp_path_factory) -> Path:
    """A run of two steps on digits."""
    folder = tmp_path_factory.mktemp("run")
    config = replace(small_run, epochs=0.4, optim=replace(small_run.optim, warmup_epochs=0))
    trainer = Trainer.build(config, folder, World())
    try:
        assert trainer.run() == 0
    finally:
        trainer.close()
    return folder


@pytest.mark.parametrize(
    ("to", "which"),
    [
        ("timm", "base"),
        ("torchvision", "momentum"),
        ("safetensors", "momentum"),
        ("moco-v3", "momentum"),
        ("torch-export", "base"),
        ("hf", "momentum"),
        ("onnx", "base"),
    ],
)
def test_the_features_of_a_file_are_those_of_the_run(run: Path, tmp_path: Path, to, which) -> None:
    for package in NEEDS.get(to, ()):
        pytest.importorskip(package)
    done = export_encoder(run, to, tmp_path / "out", which=which)
    assert done.comparison.max_error < 1e-5
    assert done.comparison.lowest_cosine > 1 - 1e-9
    assert done.comparison.images == 32
    assert done.images.endswith(".tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.report.json"]
    report = json.loads((tmp_path / "out.report.json").read_text())
    assert report["comparison"]["reader"] == done.comparison.reader
    assert report["source"]["encoder"] == which

    # What was exported can be evaluated, and is the encoder that was meant.
    if to in ("timm", "safetensors", "hf", "moco-v3"):
        heads = 4 if to == "moco-v3" else None
        found = load_source(tmp_path / "out", heads=heads, which="base" if to == "hf" else which)
        objective, config, _ = load_run(run)
        expected = objective.encoder if which == "base" else objective.momentum_encoder
        images = torch.randn(2, 3, 8, 8)
        assert torch.equal(found.encoder(images), expected.eval()(images))
        assert to == "moco-v3" or found.image == config.eval_spec()


def test_official_checkpoints_come_back_bit_by_bit(tmp_path, run, monkeypatch) -> None:
    monkeypatch.setattr(export_run, "IMAGES", 2)
    for kind in ("vit", "resnet18"):
        path, back = tmp_path / f"{kind}.pth.tar", tmp_path / f"{kind}.back"
        content = official_checkpoint(kind)
        torch.save(content, path)
        export_encoder(path, "moco-v3", back, heads=4 if kind == "vit" else None)
        found = torch.load(back, weights_only=True)
        assert (found["epoch"], found["arch"]) == (content["epoch"], content["arch"])
        assert list(found["state_dict"]) == list(content["state_dict"])
        for name, tensor in content["state_dict"].items():
            assert found["state_dict"][name].dtype == tensor.dtype
            assert torch.equal(found["state_dict"][name], tensor)

    # Through the objective itself, which has these tensors and no other.
    objective, _, _ = load_run(run)
    networks = {
        name.replace("module.base_encoder.", "encoder.")
        .replace("module.momentum_encoder.", "momentum_encoder.")
        .replace("module.predictor.", "predictor."): tensor
        for name, tensor in official_checkpoint("vit")["state_dict"].items()
    }
    assert list(networks) == list(objective.state_dict())


def test_timm_weights_come_back_bit_by_bit(tmp_path: Path, run: Path) -> None:
    export_encoder(run, "timm", tmp_path / "one.safetensors")
    export_encoder(tmp_path / "one.safetensors", "timm", tmp_path / "two.safetensors")
    one, two = (
        load_source(tmp_path / name).encoder.state_dict()
        for name in ("one.safetensors", "two.safetensors")
    )
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("architecture", "to"), [("resnet18", "hf"), ("resnet_nano", "onnx")])
def test_resnets_in_other_packages(tmp_path: Path, architecture: str, to) -> None:
    for package in NEEDS[to]:
        pytest.importorskip(package)
    torch.manual_seed(0)
    description = ResNetDescription(architecture=architecture, image=EvalSpec(size=32, resize=32))
    encoder = description.build()
    for name, tensor in encoder.state_dict().items():
        if name.endswith(("running_var", "bn2.weight")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            tensor.normal_(std=0.1)
    encoder.eval().requires_grad_(False)
    write_encoder(to, tmp_path / "out", encoder, description, {"note": "x"})
    images = torch.randn(3, 3, 32, 32)
    theirs, reader = features_of_export(to, tmp_path / "out", images, which="base", heads=None)
    ours = encoder(images)
    assert ours.std(dim=0).mean() > 1e-2
    found = compare_features(ours, theirs, reader)
    assert found.good
    assert found.max_error < 1e-5 * max(1.0, found.max_feature)


def test_a_swin_with_shifted_and_padded_windows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    image = EvalSpec(size=16, resize=16)
    description = SwinDescription(architecture="swin_nano", image=image, window=3)
    encoder = description.build().eval().requires_grad_(False)
    header = description.to_metadata()
    write_encoder("safetensors", tmp_path / "out", encoder, description, header)
    images = torch.randn(3, 3, 16, 16)
    path = tmp_path / "out"
    theirs, reader = features_of_export("safetensors", path, images, which="base", heads=None)
    assert compare_features(encoder(images), theirs, reader).good


@pytest.mark.parametrize("positions", ["sincos", "learned"])
def test_a_file_that_would_be_read_with_other_heads_is_refused(tmp_path, positions) -> None:
    torch.manual_seed(0)
    description = EncoderDescription(
        architecture="deit_small",
        width=384,
        depth=12,
        heads=6,
        patch_size=4,
        positions=positions,
        image=EvalSpec(size=8, resize=8),
    )
    encoder = description.build().eval().requires_grad_(False)
    write_encoder("torchvision", tmp_path / "out", encoder, description, {})
    found = partial(
        features_of_export, "torchvision", tmp_path / "out", torch.randn(2, 3, 8, 8), which="base"
    )
    if positions == "sincos":
        with pytest.raises(CheckpointError, match="takes 12, and this encoder has 6; timm, hf and"):
            found(heads=6)
    else:
        found(heads=6)


def test_a_file_whose_features_differ_is_not_written(run, tmp_path, monkeypatch) -> None:
    def wrong(*args, **options):
        features, reader = judging.features_of_export(*args, **options)
        features[5, 3] += 1e-4
        return features, reader

    monkeypatch.setattr(export_run, "features_of_export", wrong)
    with pytest.raises(
        CheckpointError, match=r"was not written.*differ from ours by up to 0\.0001"
    ):
        export_encoder(run, "timm", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CheckpointError, match="exists; choose another --out"):
        export_encoder(run, "timm", tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "refused"),
    [
        ("stem", "conv", {"timm", "torchvision", "hf"}),
        ("mlp_norm", "batch", {"timm", "torchvision", "hf", "moco-v3"}),
        ("pooling", "mean", {"torchvision", "hf", "moco-v3"}),
        ("positions", "none", {"moco-v3"}),
        ("positions", "learned", set()),
    ],
)
def test_what_a_format_cannot_express_is_refused_with_the_reason(field, value, refused) -> None:
    description = replace(EncoderDescription.of(get_recipe("vit_s16_e300_b4096")), **{field: value})
    targets = ("timm", "torchvision", "hf", "moco-v3", "safetensors", "torch-export", "onnx")
    reasons = {to: refusal(to, description) for to in targets}
    assert {to for to, reason in reasons.items() if reason} == refused
    for to in refused:
        assert f"--to {to} has no ViT" in reasons[to]
        assert "safetensors" in reasons[to]


def test_on_the_command_line(run: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("tyro", reason="tyro is not installed")
    from fastmoco.cli.main import main

    out = tmp_path / "e.safetensors"
    assert main(["export", str(run), "--to", "safetensors", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"wrote 30 tensors to {out}" in printed
    assert "lowest cosine 1.0" in printed
    official = ["--to", "moco-v3", "--out"]
    assert main(["export", str(run), *official, str(tmp_path / "official")]) == 0
    assert "no place for how images are normalised" in capsys.readouterr().err

    # A file that does not say how images were normalised is told it once; one that does is not.
    plain, stated = tmp_path / "plain.safetensors", tmp_path / "stated.safetensors"
    save_file(load_file(out), plain)
    own = ["--heads", "4", "--mean", "0.1", "0.2", "0.3", "--std", "0.4", "0.5", "0.6"]
    to = ["--to", "safetensors", "--out"]
    assert main(["export", str(plain), *to, str(stated), *own]) == 0
    assert load_encoder(stated).image.mean == (0.1, 0.2, 0.3)
    assert load_encoder(stated).image.std == (0.4, 0.5, 0.6)
    assert "does not say" not in capsys.readouterr().err
    assert main(["export", str(stated), *to, str(tmp_path / "y"), *own[2:]]) == 2
    assert "--mean" in capsys.readouterr().err
    assert main(["export", str(out), "--to", "moco-v3", "--out", str(tmp_path / "x")]) == 2
    assert "needs a run or a checkpoint of moco-v3" in capsys.readouterr().err


def test_a_run_of_another_method_is_refused_for_moco_v3(run: Path, tmp_path, monkeypatch) -> None:
    found = replace(load_source(run), config=get_recipe("simclr_digits"))
    monkeypatch.setattr("fastmoco.training.export_run.load_source", lambda *_, **__: found)
    with pytest.raises(CheckpointError, match="needs a run of MoCo v3, this one is of simclr"):
        export_encoder(run, "moco-v3", tmp_path / "x")
