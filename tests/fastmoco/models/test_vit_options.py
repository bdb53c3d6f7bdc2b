"""Variants of the ViT: pooling, positions, norm before the MLP, trained patch projection. Each is
compared with the plain path, and with its definition."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmoco.config import ModelConfig
from fastmoco.config.serial import from_json, to_json
from fastmoco.models import VisionTransformer
from fastmoco.models.drop_path import PathDraws
from fastmoco.models.encoder import Coupling
from fastmoco.models.encoder_file import EncoderDescription, load_encoder
from fastmoco.objectives.build import build_model, build_objective
from tests.distributed.run_trainer import CONFIG
from tests.fastmoco.objectives.test_conformance import check_chunks, check_features, check_reference

OPTIONS: list[dict[str, Any]] = [
    {"pooling": "mean"},
    {"pooling": "norm_mean"},
    {"pooling": "class_attention"},
    {"positions": "learned"},
    {"positions": "none"},
    {"positions": "learned", "pooling": "mean"},
    {"positions": "none", "pooling": "norm_mean"},
    {"mlp_norm": "batch"},
    {"mlp_norm": "batch", "pooling": "mean"},
    {"freeze_patch_embed": False},
]
every_option = pytest.mark.parametrize(
    "options", OPTIONS, ids=["-".join(map(str, options.values())) for options in OPTIONS]
)


def build(**options: Any) -> VisionTransformer:
    """A rough encoder in float64."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}
    encoder = VisionTransformer(**(sizes | options)).double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder


def images_of(encoder: VisionTransformer, count: int = 5) -> Tensor:
    noise = torch.Generator().manual_seed(1)
    side = encoder.image_size
    return torch.randn(count, 3, side, side, generator=noise, dtype=torch.float64)


def graded(encoder: VisionTransformer, path: str, *paths: Tensor) -> dict[str, Tensor]:
    """Feature, every gradient and every buffer after one forward and backward."""
    encoder = copy.deepcopy(encoder)
    encode = getattr(encoder, path)
    feature = encode(encoder.patch_tokens(images_of(encoder)), *paths)
    weight = torch.randn(feature.shape, generator=torch.Generator().manual_seed(2)).double()
    (feature * weight).sum().backward()
    gradients = {n: p.grad for n, p in encoder.named_parameters() if p.grad is not None}
    assert len(gradients) == sum(p.requires_grad for p in encoder.parameters())
    return {"feature": feature.detach(), **gradients, **dict(encoder.named_buffers())}


@every_option
def test_the_fast_path_is_the_plain_one(options: dict[str, Any]) -> None:
    encoder = build(**options)
    draws = PathDraws(0.6, 2, seed=0)(5, 1, 0, torch.device("cpu"))[:, 0]
    for paths in ((), (draws,)):
        fast, plain = (graded(encoder, name, *paths) for name in ("encode", "encode_plain"))
        assert fast.keys() == plain.keys()
        for name, tensor in plain.items():
            assert (fast[name] - tensor).abs().max() <= 1e-12, name


@every_option
def test_the_objective_is_its_reference_in_chunks_too(options: dict[str, Any]) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, **options))
    assert from_json(to_json(config)) == config
    check_reference(config)
    check_chunks(config)
    check_features(config)


@every_option
def test_a_plan_builds_it_without_memory(options: dict[str, Any]) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, **options))
    with FakeTensorMode():
        assert build_model(config).encoder.tokens in (16, 17)


@every_option
def test_recomputed_blocks_give_the_same_bits(options: dict[str, Any]) -> None:
    encoder = build(**options)
    whole = graded(encoder, "encode")
    for how in ("selective", "full"):
        encoder.recompute(how)  # type: ignore[arg-type]
        for name, tensor in graded(encoder, "encode").items():
            assert torch.equal(tensor, whole[name]), name


def test_mean_pooling_is_the_mean_of_patch_tokens() -> None:
    encoder = build(pooling="mean")
    assert encoder.cls_token is None
    assert isinstance(encoder.norm, nn.Identity)
    images = images_of(encoder)
    tokens = encoder.patch_tokens(images)
    assert tokens.shape == (5, encoder.tokens, 16) == (5, 16, 16)
    for block in encoder.blocks:
        stream, branch = block(tokens)
        tokens = stream + branch
    assert (encoder(images) - tokens.mean(1)).abs().max() <= 1e-12

    normed = build(pooling="norm_mean")
    after = nn.functional.layer_norm(tokens, (16,), normed.norm.weight, normed.norm.bias, 1e-6)
    normed.load_state_dict(encoder.state_dict(), strict=False)
    assert (normed(images) - after.mean(1)).abs().max() <= 1e-12


def test_positions_are_fixed_trained_or_absent() -> None:
    fixed, learned, none = (build(positions=kind) for kind in ("sincos", "learned", "none"))
    assert fixed.pos_embed is not None
    assert not fixed.pos_embed.requires_grad
    assert none.pos_embed is None
    assert "pos_embed" not in none.state_dict()
    assert learned.pos_embed is not None
    assert learned.pos_embed.requires_grad
    assert learned.pos_embed.shape == (1, 17, 16)
    start = VisionTransformer(
        image_size=64, patch_size=4, embed_dim=64, depth=1, num_heads=2, positions="learned"
    ).pos_embed
    assert start is not None
    assert float(start.detach().std()) == pytest.approx(0.02, rel=0.05)

    # Without positions an image with exchanged patches has the same feature.
    images = images_of(none)
    exchanged = images.roll(2, dims=3)
    assert (none(images) - none(exchanged)).abs().max() <= 1e-12
    assert (fixed(images) - fixed(exchanged)).abs().max() > 1e-3

    # The fixed table of a mean is the one of a class token without its row.
    mean = build(positions="sincos", pooling="mean").pos_embed
    assert mean is not None
    assert torch.equal(mean, fixed.pos_embed[:, 1:])


def test_batch_norm_is_over_all_tokens_of_the_batch() -> None:
    encoder = build(mlp_norm="batch", depth=1)
    assert encoder.coupling is Coupling.TRUNK
    norm = encoder.blocks[0].norm2
    theirs = nn.BatchNorm1d(16).double()
    theirs.load_state_dict(norm.state_dict())
    seen: list[Tensor] = []
    encoder.blocks[0].mlp.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    tokens = torch.randn(5, 17, 16, dtype=torch.float64)
    stream, _ = encoder.blocks[0](tokens)
    assert (seen[0] - theirs(stream.flatten(0, 1)).view(5, 17, 16)).abs().max() <= 1e-12
    assert torch.equal(norm.running_var, theirs.running_var)

    # An image depends on the others in training, and not in evaluation.
    images = images_of(encoder)
    assert (encoder(images)[:2] - encoder(images[:2])).abs().max() > 1e-3
    encoder.eval()
    assert (encoder(images)[:2] - encoder(images[:2])).abs().max() <= 1e-12


@pytest.mark.parametrize(
    ("options", "shared"),
    [
        ({}, True),
        ({"pooling": "mean"}, True),
        ({"positions": "none"}, True),
        ({"positions": "learned"}, True),  # `encode` adds them
        ({"freeze_patch_embed": False}, False),
        ({"mlp_norm": "batch"}, False),
    ],
)
def test_encoders_share_tokens_only_where_their_stems_cannot_differ(
    options: dict[str, Any], shared: bool
) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, **options))
    objective: Any = build_objective(config, torch.device("cpu"))
    assert objective.momentum.shares_tokens() is shared


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp_norm": "batch", "blocks": "fused"}, "mlp_norm='batch': .*use blocks=modules"),
        ({"mlp_norm": "batch", "compile": True}, "mlp_norm='batch': .*use compile=auto"),
        ({"mlp_norm": "batch", "linears": "float8"}, "mlp_norm='batch': .*use linears=native"),
        ({"pooling": "max"}, "pooling='max': must be one of"),
    ],
)
def test_what_an_option_excludes_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options)


def test_a_batch_norm_in_the_blocks_is_named_where_chunks_are_refused() -> None:
    encoder = build(mlp_norm="batch", stem="conv", image_size=32, patch_size=16)
    assert "convolutional stem" in encoder.coupling_reason
    assert "mlp_norm=batch" in encoder.coupling_reason
    with pytest.raises(ValueError, match="positions='rotary': must be one of"):
        build(positions="rotary")


def test_an_option_trains_its_own_parameters() -> None:
    def trained(**options: Any) -> int:
        return sum(p.numel() for p in build(**options).parameters() if p.requires_grad)

    assert trained(freeze_patch_embed=False) - trained() == 16 * (3 * 2 * 2 + 1)
    assert trained(positions="learned") - trained() == 17 * 16
    assert trained() - trained(pooling="norm_mean") == 16
    assert trained() - trained(pooling="mean") == 3 * 16


@every_option
def test_the_file_of_an_encoder_keeps_its_form(options: dict[str, Any], tmp_path: Path) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, **options))
    description = EncoderDescription.of(config)
    path = tmp_path / "e.safetensors"
    save_file(dict(description.build().state_dict()), path, metadata=description.to_metadata())
    with safe_open(path, "pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert EncoderDescription.from_metadata(header) == description
    ours = load_encoder(path).encoder
    assert {name: getattr(ours, name) for name in ("pooling", "mlp_norm")} == {
        name: getattr(config.model, name) for name in ("pooling", "mlp_norm")
    }
    assert ours.patch_embed.proj.weight.requires_grad is not config.model.freeze_patch_embed
    in_timm = config.model.mlp_norm == "layer" and config.model.pooling != "class_attention"
    assert ("timm_arguments" in header) is in_timm
    if "timm_arguments" not in header or importlib.util.find_spec("timm") is None:
        return

    from timm.models.vision_transformer import VisionTransformer as Theirs

    theirs = Theirs(**json.loads(header["timm_arguments"])).eval()
    theirs.load_state_dict(tensors)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-4)


def test_a_header_with_an_unknown_form_is_refused() -> None:
    header = EncoderDescription.of(CONFIG).to_metadata()
    for key in ("pooling", "position_embedding", "mlp_norm"):
        without = {name: value for name, value in header.items() if name != key}
        assert EncoderDescription.from_metadata(without) == EncoderDescription.from_metadata(header)
        with pytest.raises(ValueError, match=re.escape(f"{key}=other is not one of")):
            EncoderDescription.from_metadata(header | {key: "other"})
