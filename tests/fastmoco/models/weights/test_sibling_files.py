"""Checkpoints of the code of DINO, EsViT, MoBY and FCMAE: which encoder they hold, and what is refused."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastmoco.checkpoint import CheckpointError
from fastmoco.models.convnextv2 import convnextv2_micro
from fastmoco.models.swin import swin_nano
from fastmoco.models.vit import vit_nano
from fastmoco.models.weights.building import load_foreign
from fastmoco.models.weights.foreign import find_encoder
from tests.fastmoco.models.weights.test_foreign import blank_vit, raw, save


class CfgNode(dict):
    """As that of yacs, in which MoBY's checkpoints have the options of their run."""


CfgNode.__module__ = "yacs.config"


def of_two(kind: str, encoders: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """A checkpoint of the code of DINO, EsViT or MoBY with two encoders."""
    base, momentum = encoders["base"], encoders["momentum"]
    if kind == "moby":
        parts = {"encoder.": base, "encoder_k.": momentum}
        state = {before + name: t for before, part in parts.items() for name, t in part.items()}
        for head in ("projector", "projector_k", "predictor"):
            state[f"{head}.linear_hidden.0.weight"] = torch.rand(4, 4)
        state |= {"queue1": torch.rand(4, 8), "queue_ptr": torch.zeros(1)}
        return {"model": state, "config": CfgNode(MODEL=CfgNode(TYPE="moby"))}
    trunk = "backbone." if kind == "dino" else ""
    heads = ["head"] if kind == "dino" else ["head", "head_dense"]
    beside = {
        f"{head}.{name}": torch.rand(3, 3)
        for head in heads
        for name in ("mlp.0.weight", "last_layer.weight_g", "last_layer.weight_v")
    }
    beside["head.last_layer.parametrizations.weight.original0"] = torch.rand(3, 1)

    def network(before: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        named = {trunk + name: tensor for name, tensor in tensors.items()} | beside
        return {before + name: tensor for name, tensor in named.items()}

    pair = {"student": network("module.", base), "teacher": network("", momentum)}
    more = {"args": Namespace(arch="swin", warmup=[10]), "dino_loss": {"center": torch.zeros(1, 4)}}
    return {**pair, **more, "epoch": torch.tensor(3), "optimizer": {}}


@pytest.mark.parametrize("kind", ["dino", "esvit", "moby"])
def test_both_encoders_of_the_code_of_a_sibling(tmp_path: Path, kind: str, monkeypatch) -> None:
    encoders: dict[str, dict[str, Tensor]] = {}
    for number, which in enumerate(("base", "momentum")):
        torch.manual_seed(number)
        encoder = (
            vit_nano(image_size=32, patch_size=8) if kind == "dino" else swin_nano(image_size=224)
        )
        encoders[which] = dict(encoder.state_dict())
    monkeypatch.setitem(sys.modules, "yacs", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "yacs.config", SimpleNamespace(CfgNode=CfgNode))
    path = save(tmp_path / "checkpoint.pth", of_two(kind, encoders))
    monkeypatch.undo()
    for which in ("base", "momentum", None):
        loaded = load_foreign(path, which, heads=4 if kind == "dino" else None)  # type: ignore[arg-type]
        evaluated = which or ("base" if kind == "moby" else "momentum")
        assert loaded.weights.which == evaluated
        assert loaded.weights.family == ("vit" if kind == "dino" else "swin")
        for name, tensor in loaded.encoder.state_dict().items():
            assert torch.equal(tensor, encoders[evaluated][name]), name
        assert json.dumps(loaded.weights.facts) == ("{}" if kind == "moby" else '{"epoch": 3}')
        assert ("norm-eps 1e-6" in " ".join(loaded.weights.notes)) == (kind == "esvit")
        epsilon = {"dino": 1e-6, "esvit": 1e-6, "moby": 1e-5}[kind]
        assert loaded.encoder.norm.eps == epsilon


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            {"teacher": {"a": torch.ones(1)}},
            "no weights under 'student'.*under student and teacher",
        ),
        (
            {"student": {1: torch.ones(1)}, "teacher": {2: torch.ones(1)}},
            "no encoder that is known",
        ),
        (
            {"student": {"a": torch.ones(1)}, "teacher": {"backbone.a": torch.ones(1), "a": 0}},
            "are no tensors",
        ),
        (
            {
                "student": {"a": torch.ones(1)},
                "teacher": {"backbone.a": torch.ones(1), "a": torch.ones(1)},
            },
            "two tensors of one name",
        ),
    ],
)
def test_a_pair_that_is_no_checkpoint_is_refused(tmp_path: Path, content, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_foreign(save(tmp_path / "checkpoint.pth", content))


@pytest.mark.parametrize("kind", ["dino", "moby"])
def test_a_vit_s_of_a_sibling_has_six_heads(kind: str) -> None:
    trunk = blank_vit(384, 12)
    if kind == "dino":
        tensors = {f"{which}.{n}": t for which in ("student", "teacher") for n, t in trunk.items()}
    else:
        tensors = {
            f"{which}.{n}": t for which in ("encoder", "encoder_k") for n, t in trunk.items()
        }
    found = find_encoder(raw(tensors))
    assert (found.heads, found.which) == (6, "momentum" if kind == "dino" else "base")


def sparse_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A dense ConvNeXt V2 as FCMAE's code has it: in a kernel [K^2, ...] the row varies fastest."""
    found = {}
    for name, tensor in state.items():
        if name in ("norm.weight", "norm.bias"):
            continue
        stem = name.startswith("downsample_layers.0.")
        if tensor.ndim == 4 and name.endswith("weight") and not stem:
            out, inside, side, _ = tensor.shape
            shape = (side**2, out) if inside == 1 else (side**2, inside, out)
            kernel = torch.empty(shape)
            for row in range(side):
                for column in range(side):
                    at = tensor[:, :, row, column]
                    kernel[column * side + row] = at[:, 0] if inside == 1 else at.T
            name, tensor = name.replace("weight", "kernel"), kernel
        elif ".grn." in name:
            tensor = tensor.reshape(1, -1)
        elif not stem:
            conv = "dwconv" in name or (name.startswith("downsample") and ".1." in name[18:])
            if conv:
                tensor = tensor.reshape(1, -1)
            else:
                layer = "linear" if "pwconv" in name else "ln"
                before, _, last = name.rpartition(".")
                name = f"{before}.{layer}.{last}"
        found[f"encoder.{name}"] = tensor
    return found


def test_an_encoder_of_sparse_layers_becomes_a_dense_one(tmp_path: Path) -> None:
    encoder = convnextv2_micro(image_size=64).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if not name.startswith("norm."):
                parameter.normal_(std=0.2)
    state = sparse_names(dict(encoder.state_dict()))
    assert state["encoder.stages.0.0.dwconv.kernel"].shape == (49, 16)
    assert state["encoder.downsample_layers.1.1.kernel"].ndim == 3
    state |= {"mask_token": torch.zeros(1, 8, 1, 1), "proj.weight": torch.zeros(8, 8, 1, 1)}
    state |= {"decoder.0.dwconv.weight": torch.zeros(8, 1, 7, 7), "pred.bias": torch.zeros(8)}
    loaded = load_foreign(save(tmp_path / "fcmae.pt", {"model": state}))
    assert loaded.weights.format == "ConvNeXt V2 of FCMAE"
    assert set(loaded.weights.beside) == {n for n in state if not n.startswith("encoder.")}
    for name, tensor in loaded.encoder.state_dict().items():
        assert torch.equal(tensor, encoder.state_dict()[name]), name
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(loaded.encoder(images), encoder(images))

    assert "has no final norm" in " ".join(loaded.weights.notes)

    # The same with dense layers, as it is published, and behind `encoder.`.
    plain = {n: t for n, t in encoder.state_dict().items() if not n.startswith("norm.")}
    for name, content in {
        "plain": plain,
        "behind": {f"encoder.{n}": t for n, t in plain.items()},
    }.items():
        again = load_foreign(save(tmp_path / f"{name}.pt", {"model": content}))
        assert torch.equal(again.encoder(images), encoder(images))

    state["encoder.stages.0.0.dwconv.kernel"] = torch.zeros(48, 16)
    with pytest.raises(CheckpointError, match=r"dwconv\.kernel of shape \(48, 16\) is no kernel"):
        load_foreign(save(tmp_path / "odd.pt", {"model": state}))
    for name, words in (
        (f"encoder.stages.{'9' * 5000}.0.pwconv2.bias", "another architecture"),
        ("encoder.stages.0.0.norm.weight", "two tensors that are stages.0.0.norm.weight"),
    ):
        odd = sparse_names(dict(encoder.state_dict())) | {name: torch.zeros(16)}
        with pytest.raises(CheckpointError, match=words):
            load_foreign(save(tmp_path / "odd.pt", {"model": odd}))


def test_a_checkpoint_of_moco_v2_is_not_called_moby(tmp_path: Path) -> None:
    state = {f"{name}.conv1.weight": torch.ones(2, 3, 7, 7) for name in ("encoder_q", "encoder_k")}
    with pytest.raises(CheckpointError, match="no encoder that is known"):
        load_foreign(save(tmp_path / "moco_v2.pth", state))
