"""The tables of names: every name of an encoder has one in each format, and back to the same bits."""

from __future__ import annotations

import pytest
import torch

from fastmoco.models.convnextv2 import convnextv2_micro
from fastmoco.models.resnet import resnet18
from fastmoco.models.swin import swin_nano
from fastmoco.models.vit import vit_nano
from fastmoco.models.weights import names as tables
from fastmoco.models.weights.names import find_format, to_ours, to_theirs, unwrapped


@pytest.mark.parametrize("known", tables.FORMATS, ids=lambda known: known.name)
def test_an_encoder_has_all_its_names_in_a_format_and_gets_its_bits_back(known) -> None:
    torch.manual_seed(0)
    build = {"vit": vit_nano, "resnet": resnet18, "swin": swin_nano, "convnextv2": convnextv2_micro}
    encoder = build[known.family]()
    state = encoder.state_dict()
    theirs = to_theirs(state, known)
    assert sum(tensor.numel() for tensor in theirs.values()) == sum(
        tensor.numel() for tensor in state.values()
    )
    for prefix in known.prefixes:
        assert find_format(prefix + name for name in theirs) == (known, prefix)
    back = to_ours(theirs, known)
    assert (back.unknown, back.beside) == ([], {})
    assert list(back.trunk) == list(state)
    assert all(torch.equal(back.trunk[name], tensor) for name, tensor in state.items())


def test_names_of_hugging_face_are_those_of_its_files() -> None:
    vit = to_theirs(vit_nano().state_dict(), tables.HF_VIT)
    assert vit["encoder.layer.1.attention.attention.key.bias"].shape == (64,)
    resnet = to_theirs(resnet18().state_dict(), tables.HF_RESNET)
    assert "encoder.stages.1.layers.0.shortcut.convolution.weight" in resnet
    assert "encoder.stages.0.layers.0.layer.1.normalization.running_var" in resnet


def test_a_tensor_without_a_name_is_an_error_and_one_of_another_model_is_unknown() -> None:
    state = vit_nano().state_dict()
    with pytest.raises(ValueError, match=r"has no name for blocks.0.ls1.gamma"):
        to_theirs(state | {"blocks.0.ls1.gamma": torch.ones(64)}, tables.HF_VIT)
    theirs = to_theirs(state, tables.HF_VIT)
    odd = {"encoder.layer.0.lambda": torch.ones(1), f"encoder.layer.{'9' * 5000}.x": torch.ones(1)}
    assert to_ours(theirs | odd, tables.HF_VIT).unknown == list(odd)
    del theirs["encoder.layer.0.attention.attention.key.bias"]
    assert to_ours(theirs, tables.HF_VIT).unknown == [
        "encoder.layer.0.attention.attention.query.bias",
        "encoder.layer.0.attention.attention.value.bias",
    ]


def test_what_is_no_part_of_an_encoder_is_named() -> None:
    found = to_ours(
        {"head.weight": torch.ones(2), "head.4.running_mean": torch.ones(2)}, tables.TIMM_VIT
    )
    assert found.beside == {"head.weight": "classifier", "head.4.running_mean": "projector"}


def test_wrappers_are_taken_off_where_all_names_have_them() -> None:
    one, two = torch.ones(1), torch.ones(2)
    assert unwrapped({"module._orig_mod.a": one, "module._orig_mod.b": two}) == {"a": one, "b": two}
    assert list(unwrapped({"module.a": one, "b": two})) == ["module.a", "b"]
