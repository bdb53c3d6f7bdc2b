"""The encoders: golden features and gradients, initialisation, and the class-token path against the
plain one."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmoco.config.model import Pooling, Positions
from fastmoco.models import (
    ARCHITECTURES,
    VisionTransformer,
    sincos_positions,
    vit_conv_small,
    vit_huge,
    vit_large,
    vit_micro,
    vit_small,
    vit_tiny,
)
from fastmoco.models.encoder import Coupling
from fastmoco.models.positions import resized_positions
from fastmoco.objectives import MoCoV3
from tests.golden_objective import read_sibling

Golden = Callable[[str], dict[str, np.ndarray]]


def build_golden(data: dict[str, np.ndarray], tag: str) -> VisionTransformer:
    """The encoder of vit.npz in float64, weights loaded under their golden names."""
    image_size, patch_size, embed_dim, depth, num_heads = data[f"{tag}/cfg"].tolist()
    encoder = VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        stem="conv" if tag == "conv" else "patch",
    ).double()
    prefix = f"{tag}/sd/"
    weights = {
        k.removeprefix(prefix): torch.from_numpy(v) for k, v in data.items() if k.startswith(prefix)
    }
    missing, unexpected = encoder.load_state_dict(weights, strict=False)
    assert missing == ["pos_embed"]
    assert unexpected == []
    return encoder


def relative(ours: Tensor, golden: np.ndarray) -> float:
    """Largest error over the largest golden magnitude."""
    return float(np.abs(ours.detach().numpy() - golden).max() / np.abs(golden).max())


@pytest.mark.parametrize(("grid", "width"), [(14, 384), (7, 192)])
def test_positions_match_golden_and_not_their_transpose(
    golden: Golden, grid: int, width: int
) -> None:
    table = golden("posembed")[f"pos_{grid}x{grid}_{width}"]
    ours = sincos_positions(grid, width).numpy()
    assert np.abs(ours - table).max() <= 1e-7
    columns_first = np.concatenate([table[:, width // 2 :], table[:, : width // 2]], axis=1)
    assert np.abs(ours - columns_first).max() > 0.5


@pytest.mark.parametrize("path", ["fast", "plain"])
@pytest.mark.parametrize("tag", ["patch", "conv"])
def test_features_gradients_and_buffers_match_golden(golden: Golden, tag: str, path: str) -> None:
    data = golden("vit")
    encoder = build_golden(data, tag)
    images = torch.from_numpy(data[f"{tag}/x"]).double().requires_grad_()
    encode = encoder.encode if path == "fast" else encoder.encode_plain
    encoder.eval()
    assert relative(encode(encoder.patch_tokens(images)), data[f"{tag}/feat_eval"]) <= 1e-6
    encoder.train()
    feature = encode(encoder.patch_tokens(images))
    assert relative(feature, data[f"{tag}/feat_train"]) <= 1e-6
    (feature * torch.from_numpy(data[f"{tag}/w"])).sum().backward()
    assert relative(images.grad, data[f"{tag}/dx_train"]) <= 1e-6
    assert relative(encoder.blocks[0].attn.qkv.weight.grad, data[f"{tag}/dqkv0_train"]) <= 1e-6
    prefix = f"{tag}/after_train_forward/"
    buffers = dict(encoder.named_buffers())
    expected = {k.removeprefix(prefix): v for k, v in data.items() if k.startswith(prefix)}
    assert len(expected) == (12 if tag == "conv" else 0)
    for name, value in expected.items():
        assert np.abs(buffers[name].numpy() - value).max() <= 1e-6, name


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("stem", "image_size", "patch_size"), [("patch", 28, 7), ("conv", 48, 16)])
def test_class_token_path_equals_plain_path_in_value_and_every_gradient(
    stem: str, image_size: int, patch_size: int, depth: int
) -> None:
    torch.manual_seed(0)
    encoder = VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        embed_dim=48,
        depth=depth,
        num_heads=3,
        stem=stem,  # type: ignore[arg-type]
        freeze_patch_embed=False,
    ).double()
    with torch.no_grad():  # biases, norms and class token away from their special starting values
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    images = torch.randn(5, 3, image_size, image_size, dtype=torch.float64)
    weight = torch.randn(5, 48, dtype=torch.float64)
    trainable = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    results = []
    for encode in (encoder.encode, encoder.encode_plain):
        feature = encode(encoder.patch_tokens(images))
        gradients = torch.autograd.grad((feature * weight).sum(), list(trainable.values()))
        results.append((feature, dict(zip(trainable, gradients, strict=True))))
    (fast, fast_gradients), (plain, plain_gradients) = results
    assert (fast - plain).abs().max() <= 1e-12
    for name, gradient in plain_gradients.items():
        assert (fast_gradients[name] - gradient).abs().max() <= 1e-12, name
    assert plain_gradients["blocks.0.attn.qkv.weight"].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("build", "name"), [(vit_small, "vit_small"), (vit_conv_small, "vit_conv_small")]
)
def test_fresh_model_matches_golden_names_shapes_and_spread(
    golden: Golden, build: Callable[[], VisionTransformer], name: str
) -> None:
    torch.manual_seed(0)
    data = {
        k.removeprefix(f"{name}/"): v
        for k, v in golden("init_stats").items()
        if k.startswith(f"{name}/")
    }
    objective = MoCoV3(build)
    parameters = list(objective.named_parameters())
    for key, found in (("names", parameters), ("buffers", list(objective.named_buffers()))):
        ours = [f"base_{n}" if n.startswith("encoder.") else n for n, _ in found]
        assert ours == data[key].tolist()
    assert ["x".join(map(str, p.shape)) for _, p in parameters] == data["shapes"].tolist()
    assert [p.requires_grad for _, p in parameters] == data["requires_grad"].tolist()
    for (parameter_name, p), mean, std, absmax in zip(
        parameters, data["mean"], data["std"], data["absmax"], strict=True
    ):
        # Both means are of random draws around one centre.
        spread = 6 * std / math.sqrt(p.numel())
        assert abs(p.mean().item() - mean) <= spread + 1e-7, parameter_name
        if (
            p.numel() >= 4096
        ):  # a draw of n uniform numbers has a spread within 4 / sqrt(n) of its expectation
            assert p.std().item() == pytest.approx(std, rel=4 / math.sqrt(p.numel())), (
                parameter_name
            )
            assert p.abs().max().item() == pytest.approx(absmax, rel=2e-2), parameter_name
        elif std == 0:
            assert p.abs().max().item() == absmax, parameter_name
        else:
            assert 0.3 * absmax < p.abs().max().item() < 3 * absmax, parameter_name


@pytest.mark.parametrize("build", [vit_small, vit_conv_small])
def test_uniform_draws_stay_within_their_analytic_bounds(
    build: Callable[[], VisionTransformer],
) -> None:
    encoder = build()
    E, hidden = 384, 4 * 384
    bounds = {
        "qkv": 6 / (E + E),
        "proj": 6 / (E + E),
        "fc1": 6 / (E + hidden),
        "fc2": 6 / (E + hidden),
    }
    for name, parameter in encoder.blocks.named_parameters():
        layer, kind = name.split(".")[-2:]
        if kind == "weight" and layer in bounds:
            bound = math.sqrt(bounds[layer])
            assert 0.99 * bound < parameter.abs().max().item() <= bound, name
    if encoder.coupling is Coupling.NONE:
        bound = math.sqrt(6 / (3 * 16 * 16 + E))
        assert 0.99 * bound < encoder.patch_embed.proj.weight.abs().max().item() <= bound


@pytest.mark.parametrize(
    ("build", "count"), [(vit_small, 21_665_664), (vit_conv_small, 20_617_392)]
)
def test_trunk_sizes(build: Callable[[], VisionTransformer], count: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in build().parameters()) == count


# 304 M and 632 M as usually given: with a classifier of 1000 classes; ViT-H has patches of 14
# pixels there.
@pytest.mark.parametrize(("build", "count"), [(vit_large, 304_326_632), (vit_huge, 632_045_800)])
def test_large_trunks_have_the_published_sizes(
    build: Callable[[], VisionTransformer], count: int
) -> None:
    with torch.device("meta"):
        encoder = build()
    assert sum(p.numel() for p in encoder.parameters()) + 1000 * (encoder.embed_dim + 1) == count


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_takes_the_same_arguments(name: str) -> None:
    with torch.device("meta"):
        encoder = ARCHITECTURES[name](image_size=64, patch_size=16, freeze_patch_embed=False)
    assert encoder.pos_embed.shape == (1, 17, encoder.embed_dim)
    assert all(p.requires_grad for p in encoder.patch_embed.parameters())


def test_frozen_by_default() -> None:
    encoder = vit_micro(image_size=28, patch_size=7)
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 30}, "image_size=30: must be a multiple of patch_size=8"),
        ({"num_heads": 5}, "embed_dim=32: must be a multiple of num_heads=5"),
        (
            {"embed_dim": 6, "num_heads": 2},
            "embed_dim=6: must be a multiple of 4, because sine-cosine positions",
        ),
        ({"stem": "conv"}, "patch_size=8: the conv stem shrinks images by 16"),
        (
            {"stem": "conv", "patch_size": 16, "embed_dim": 36, "num_heads": 2},
            "embed_dim=36: must be a multiple of 8, because the conv stem",
        ),
        ({"stem": "swin"}, "stem='swin'"),
        ({"depth": 0}, "depth=0: needs at least 1 block"),
        ({"patch_size": 0}, "patch_size=0"),
    ],
)
def test_wrong_sizes_are_named(change: dict[str, object], message: str) -> None:
    sizes: dict[str, object] = {
        "image_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 1,
        "num_heads": 2,
    }
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**(sizes | change))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(2, 3, 30, 30), (2, 3, 28, 32), (2, 1, 32, 32), (3, 32, 32)])
def test_wrong_images_are_named(shape: tuple[int, ...]) -> None:
    message = (
        f"images shape={shape}: this encoder takes [B, 3, S, S], S a multiple of patch_size=4, "
        "such as image_size=32"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        vit_micro()(torch.zeros(shape))


def test_positions_of_other_sizes_match_golden() -> None:
    data = read_sibling("dino")
    tables = [key for key in data if key.startswith("pos") and key.endswith("_table")]
    assert len(tables) >= 2
    for key in tables:
        table = torch.from_numpy(data[key]).double()
        prefix = key.removesuffix("table")
        for name in (name for name in data if name.startswith(prefix) and name != key):
            own = resized_positions(table[:, 1:], int(name.removeprefix(prefix)))
            ours = torch.cat([table[:, :1], own], dim=1)
            expected = data[name]
            tolerance = 1e-7 if expected.dtype == np.float32 else 1e-12
            assert relative(ours, expected.reshape(ours.shape)) < tolerance, name


@pytest.mark.parametrize("positions", ["learned", "sincos", "sincos_columns", "none"])
@pytest.mark.parametrize("pooling", ["class", "norm_mean"])
def test_a_small_crop_has_interpolated_positions_and_their_gradient(
    positions: Positions, pooling: Pooling
) -> None:
    torch.manual_seed(0)
    encoder = vit_micro(image_size=32, patch_size=8, positions=positions, pooling=pooling).double()
    small = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    feature = encoder(small)
    torch.testing.assert_close(feature, encoder.plain(small))

    # By hand: an encoder of that size whose table is the interpolated one.
    other = vit_micro(image_size=16, patch_size=8, positions=positions, pooling=pooling).double()
    weights = encoder.state_dict()
    if positions != "none":
        own = int(pooling == "class")
        first, rest = weights["pos_embed"].tensor_split([own], dim=1)
        weights["pos_embed"] = torch.cat([first, resized_positions(rest, 2)], dim=1)
    other.load_state_dict(weights)
    torch.testing.assert_close(feature, other(small), rtol=1e-12, atol=1e-12)
    assert encoder.forward_flops(16) == other.forward_flops(16) < encoder.forward_flops(32)
    assert encoder.most_numbers(16) == other.most_numbers() < encoder.most_numbers()

    if positions == "learned":
        feature.square().sum().backward()
        assert encoder.pos_embed is not None
        assert encoder.pos_embed.grad is not None
        assert (encoder.pos_embed.grad != 0).any(dim=-1).all()


def test_bf16_autocast_keeps_parameters_and_comes_close() -> None:
    torch.manual_seed(0)
    encoder = vit_micro(image_size=28, patch_size=7)
    images = torch.randn(4, 3, 28, 28)
    exact = encoder(images)
    with torch.autocast("cpu", torch.bfloat16):
        feature = encoder(images)
        feature.float().square().sum().backward()
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in encoder.parameters() if p.grad is not None} == {torch.float32}
    assert (feature - exact).norm() / exact.norm() < 0.02  # a few bf16 roundings of 2^-9 each


def test_tiny_has_the_heads_of_deit() -> None:
    with torch.device("meta"):
        assert vit_tiny().blocks[0].attn.num_heads == 3


@pytest.mark.parametrize("pooling", ["class", "class_attention"])
def test_the_attention_of_the_class_token_is_that_which_makes_the_feature(pooling: Pooling) -> None:
    torch.manual_seed(0)
    encoder = vit_micro(image_size=32, pooling=pooling).double().eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs: list[Tensor] = []
    last = (encoder.blocks_token or encoder.blocks)[-1]
    last.norm1.register_forward_hook(lambda module, given, out: inputs.append(out))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        weights = encoder.class_attention(images)
        normed = inputs[-1]
        wanted = last.attn(normed)[:, 0]

        # The values weighted by this attention, and what the token itself adds.
        B, L, E = normed.shape
        heads = weights.shape[1]
        values = last.attn.keys_values(normed)[..., E:].view(B, L, heads, E // heads)
        own = 1 - weights.sum(-1, keepdim=True)
        whole = torch.cat([own, weights], dim=-1).to(values)
        mixed = torch.einsum("bal,blad->bad", whole, values).reshape(B, E)
        torch.testing.assert_close(last.attn.proj(mixed), wanted, atol=1e-6, rtol=1e-5)
    assert weights.shape == (2, heads, encoder.patch_tokens(images).shape[1])
    assert (weights > 0).all()


def test_a_mean_of_tokens_has_no_attention_of_a_class_token() -> None:
    encoder = vit_micro(image_size=32, pooling="mean_norm")
    with pytest.raises(ValueError, match="pooling='mean_norm'"):
        encoder.class_attention(torch.zeros(1, 3, 32, 32))
