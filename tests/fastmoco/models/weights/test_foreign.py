"""Files of weights of other packages: what they are, which encoder, how many heads; and hostile
ones."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fastmoco.checkpoint import CheckpointError
from fastmoco.models.encoder_file import load_encoder
from fastmoco.models.vit import VisionTransformer, vit_nano
from fastmoco.models.weights.building import describe, load_foreign
from fastmoco.models.weights.foreign import find_encoder
from fastmoco.models.weights.names import HF_VIT, to_theirs
from fastmoco.models.weights.reading import RawWeights
from tests.official_checkpoints import (
    official_checkpoint,
    official_resnet18,
    official_vit,
    sincos_table,
)


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def blank_vit(width: int, depth: int, *, sincos: bool = False) -> dict[str, Tensor]:
    """A trunk of zeros that takes no memory."""
    with torch.device("meta"):
        shapes = official_vit(width=width, depth=depth, positions=torch.empty(1, 5, width))
    tensors = {name: torch.zeros(1).expand(tensor.shape) for name, tensor in shapes.items()}
    tensors["pos_embed"] = sincos_table(2, width) if sincos else torch.rand(1, 5, width)
    return tensors


def raw(tensors: dict[str, Tensor], **facts: Any) -> RawWeights:
    return RawWeights(path=Path("w.pth"), tensors=tensors, **facts)


@pytest.mark.parametrize("which", ["base", "momentum"])
@pytest.mark.parametrize("kind", ["vit", "resnet18"])
def test_both_encoders_of_an_official_checkpoint(tmp_path: Path, kind: str, which) -> None:
    checkpoint = official_checkpoint(kind)
    path = save(tmp_path / "checkpoint_0299.pth.tar", checkpoint)
    loaded = load_foreign(path, which, heads=4 if kind == "vit" else None)
    assert loaded.weights.format == "moco-v3"
    assert loaded.weights.facts["epoch"] == 300
    state = loaded.encoder.state_dict()
    for name, tensor in state.items():
        assert torch.equal(tensor, checkpoint["state_dict"][f"module.{which}_encoder.{name}"])
    unused = set(loaded.weights.beside.values())
    assert unused == {"projector", "predictor", "the other encoder"}
    assert len(loaded.weights.beside) + len(state) == len(checkpoint["state_dict"])


def test_the_features_are_those_of_the_encoder(tmp_path: Path) -> None:
    torch.manual_seed(1)
    encoder = vit_nano().eval()
    path = tmp_path / "weights.safetensors"
    save_file(to_theirs(encoder.state_dict(), HF_VIT), path)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(load_foreign(path, heads=4).encoder(images), encoder(images))
    assert not torch.allclose(load_foreign(path, heads=2).encoder(images), encoder(images))


@pytest.mark.parametrize(
    ("prefix", "sincos", "heads"),
    [
        # An official checkpoint, and one whose positions are the fixed table, are of MoCo v3.
        ("module.base_encoder.", False, 12),
        ("", True, 12),
        # Others may be of timm, of DeiT or a fine-tuned one of MoCo v3.
        ("", False, None),
    ],
)
def test_heads_of_a_vit_s_are_known_or_asked_for(prefix, sincos, heads) -> None:
    trunk = blank_vit(384, 12, sincos=sincos)
    weights = raw({prefix + name: tensor for name, tensor in trunk.items()})
    assert find_encoder(weights).heads == heads
    assert find_encoder(weights, heads=6).heads == 6
    if heads is None:
        with pytest.raises(CheckpointError, match="12 for MoCo v3 and 6 for timm, DeiT"):
            describe(find_encoder(weights))


def test_other_known_sizes_have_one_number_of_heads() -> None:
    assert describe(find_encoder(raw(blank_vit(192, 12)))).heads == 3
    assert describe(find_encoder(raw(blank_vit(768, 12)))).architecture == "vit_base"
    with pytest.raises(CheckpointError, match=r"--heads N --out encoder\.safetensors"):
        describe(find_encoder(raw(blank_vit(32, 2))))
    with pytest.raises(CheckpointError, match="5 heads do not divide its width of 32"):
        find_encoder(raw(blank_vit(32, 2)), heads=5)


def test_a_folder_states_heads_and_normalisation(tmp_path: Path) -> None:
    save_file(to_theirs(vit_nano().state_dict(), HF_VIT), tmp_path / "model.safetensors")
    config = {"model_type": "vit", "num_attention_heads": 4, "layer_norm_eps": 1e-12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    for path in (tmp_path, tmp_path / "model.safetensors"):
        loaded = load_foreign(path)
        assert loaded.description.heads == 4
        assert loaded.description.image.mean == (0.5, 0.5, 0.5)
        assert loaded.weights.notes == ("its layer norms add 1e-12 to the variance, ours 1e-06",)
    with pytest.raises(CheckpointError, match="states 4 attention heads, the caller 2"):
        load_foreign(tmp_path, heads=2)
    for key, value in (("hidden_act", "relu"), ("qkv_bias", False), ("model_type", "dinov2")):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(CheckpointError, match=f"{key}={value!r}, and fastmoco has"):
            load_foreign(tmp_path)


def test_a_config_of_timm_states_the_heads_of_its_model() -> None:
    config: dict[str, Any] = {"architecture": "vit_small_patch16_224"}
    config["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3}
    found = find_encoder(raw(blank_vit(384, 12), config=config))
    assert (found.heads, found.image.std) == (6, (0.5, 0.5, 0.5))
    config["model_args"] = {"num_heads": 12}
    assert find_encoder(raw(blank_vit(384, 12), config=config)).heads == 12


def test_a_resnet_of_timm_with_the_same_tensors_is_another_function() -> None:
    trunk = official_resnet18()
    config = {"architecture": "resnet18.a1_in1k"}
    assert find_encoder(raw(trunk, config=config)).family == "resnet"
    with pytest.raises(CheckpointError, match="resnetblur18', and fastmoco has resnet18"):
        find_encoder(raw(trunk, config={"architecture": "resnetblur18"}))


def test_a_linear_probe_file_is_named_as_one(tmp_path: Path) -> None:
    trunk = official_vit()
    state = {f"module.{name}": tensor for name, tensor in trunk.items()}
    state |= {"module.head.weight": torch.ones(10, 64), "module.head.bias": torch.ones(10)}
    content = {"epoch": 90, "arch": "vit_small", "state_dict": OrderedDict(state)}
    path = save(
        tmp_path / "p.pth.tar", content | {"best_acc1": torch.tensor(73.2), "optimizer": {}}
    )
    loaded = load_foreign(path, heads=4)
    assert loaded.weights.format == "linear probe of moco-v3"
    assert "is a linear-probe file" in loaded.weights.notes[0]
    assert set(loaded.weights.beside.values()) == {"classifier"}
    with pytest.raises(CheckpointError, match=r"linear probe of moco-v3.*has one encoder"):
        load_foreign(path, "momentum", heads=4)


def test_what_has_no_place_in_an_encoder_is_refused_by_name(tmp_path: Path) -> None:
    trunk = official_vit()
    path = save(tmp_path / "w.pth", trunk | {"blocks.0.ls1.gamma": torch.ones(64)})
    with pytest.raises(CheckpointError, match=r"blocks.0.ls1.gamma: no part of a plain ViT"):
        load_foreign(path, heads=4)
    del trunk["blocks.1.norm2.bias"]
    with pytest.raises(CheckpointError, match=r"blocks.1.norm2.bias is missing in the file"):
        load_foreign(save(path, trunk), heads=4)
    with pytest.raises(CheckpointError, match="no encoder that is known here"):
        load_foreign(save(path, {"layer.weight": torch.ones(2)}))
    resnet = official_checkpoint("resnet18")["state_dict"]
    state = {n: t for n, t in resnet.items() if "base_encoder.layer4.1" not in n}
    with pytest.raises(CheckpointError, match="is none of resnet"):
        load_foreign(save(path, {"state_dict": state}))


@pytest.mark.parametrize(
    "options",
    [
        {"stem": "conv", "patch_size": 16},
        {"mlp_norm": "batch"},
        {"pooling": "mean"},
        {"pooling": "norm_mean", "positions": "learned"},
        {"pooling": "class_attention", "positions": "sincos_columns"},
        {"positions": "learned"},
    ],
    ids=str,
)
def test_options_of_a_vit_are_seen_in_its_tensors(tmp_path: Path, options) -> None:
    torch.manual_seed(2)
    sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    encoder = VisionTransformer(**{**sizes, **options}).eval()
    path = tmp_path / "w.safetensors"
    save_file(dict(encoder.state_dict()), path)
    loaded = load_foreign(path, heads=2)
    for name, value in options.items():
        assert getattr(loaded.description, name) == value
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.encoder(images), encoder(images))


def test_without_positions_a_header_must_state_the_size_of_images(tmp_path: Path) -> None:
    encoder = vit_nano(positions="none")
    path = tmp_path / "w.safetensors"
    save_file(dict(encoder.state_dict()), path)
    with pytest.raises(CheckpointError, match="has no positions, so the size of its images"):
        load_foreign(path, heads=4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"depth": "1000000000"}, "depth=1000000000"),
        ({"width": "1000000000"}, "has shape|overflowed"),
        ({"image_size": "100000000", "patch_size": "1"}, "has shape|Storage|size"),
        ({"mlp_ratio": "inf"}, "mlp_ratio=inf"),
        ({"mlp_ratio": "nan"}, "mlp_ratio=nan"),
        ({"heads": "0"}, "num_heads=0"),
        ({"heads": "7"}, "num_heads=7"),
        ({"stem": "deep"}, "stem='deep'"),
    ],
    ids=str,
)
def test_a_header_that_claims_any_size_is_compared_before_memory_is_taken(
    tmp_path: Path, changes: dict[str, str], words: str
) -> None:
    found = describe(find_encoder(raw(official_vit()), heads=4))
    header = {**found.to_metadata(), "architecture": "custom", **changes}
    del header["timm_arguments"]
    path = tmp_path / "w.safetensors"
    save_file(official_vit(), path, metadata=header)
    with pytest.raises(CheckpointError, match=words) as error:
        load_encoder(path)
    assert str(path) in str(error.value)


class Bomb:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "legacy"])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, new: bool) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / "w.pth.tar"
    torch.save(
        {"state_dict": official_vit(), "bomb": Bomb(mark)}, path, _use_new_zipfile_serialization=new
    )
    with pytest.raises(CheckpointError, match=r"contains posix.mkdir. Only tensors.*save_file"):
        load_foreign(path)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, kind: str, share: float) -> None:
    path = tmp_path / f"w.{kind}"
    if kind == "pth":
        torch.save(official_vit(), path)
    else:
        save_file(official_vit(), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"cannot be read.*copy or download it again"):
        load_foreign(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "contains no weights"),
        ({"state_dict": {"a": 1}}, "contains no weights"),
        ({"state_dict": {"state_dict": {"state_dict": {"state_dict": {}}}}}, "contains no weights"),
        ({"w": torch.ones(2), "v": "text"}, "are no tensors"),
        # A few bytes that claim to be terabytes, and tensors without plain data.
        ({"w": torch.ones(1).expand(1 << 40)}, "no plain tensor"),
        ({"w": torch.ones(2, 2).to_sparse()}, "no plain tensor"),
        # Shapes that no encoder has.
        (official_vit() | {"pos_embed": torch.ones(1, 7, 64)}, "not that of a square image"),
        (official_vit() | {"pos_embed": torch.ones(17, 64)}, "not that of a square image"),
        (official_vit() | {"patch_embed.proj.weight": torch.ones(64)}, "of 4 dimensions"),
        (official_vit() | {"patch_embed.proj.weight": torch.ones(0, 3, 2, 2)}, "of 4 dimensions"),
        (official_vit() | {"blocks.9999.norm1.bias": torch.ones(64)}, "not numbered from 0 to 2"),
        # Quantised weights, whose scale is in another tensor or nowhere.
        (
            official_vit() | {"norm.bias": torch.ones(64, dtype=torch.int8)},
            "norm.bias is of type int8",
        ),
        (official_vit() | {"norm.bias": torch.ones(64).to(torch.float8_e4m3fn)}, "float8_e4m3fn"),
        (
            official_vit() | {"pos_embed": torch.ones(1, 17, 64).long()},
            "pos_embed is of type int64",
        ),
        (official_vit() | {"norm.bias": torch.full((64,), torch.nan)}, "norm.bias is not finite"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content, words: str) -> None:
    path = save(tmp_path / "w.pth", content)
    with pytest.raises(CheckpointError, match=words) as error:
        load_foreign(path, heads=4)
    assert str(path) in str(error.value)


def test_tensors_beside_a_state_dict_do_not_hide_it(tmp_path: Path) -> None:
    trunk = official_vit()
    content = {"epoch": 3, "state_dict": trunk, "queue": torch.ones(4, 4)}
    found = load_foreign(save(tmp_path / "w.pth", content), heads=4)
    assert torch.equal(found.encoder.state_dict()["norm.bias"], trunk["norm.bias"])
    assert found.weights.facts["epoch"] == 3


def test_old_files_without_counts_of_batches_load(tmp_path: Path) -> None:
    state = official_checkpoint("resnet18")["state_dict"]
    older = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    loaded = load_foreign(save(tmp_path / "w.pth", older))
    assert loaded.description.architecture == "resnet18"
    assert not isinstance(loaded.encoder, VisionTransformer)
