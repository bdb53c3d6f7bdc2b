"""Swin against golden numbers, against its reference, and in the sizes that were published."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from fastmoco.checkpoint import CheckpointError
from fastmoco.config import ModelConfig
from fastmoco.models.encoder_file import SwinDescription, describe_run, description_of
from fastmoco.models.resnet import resnet_nano
from fastmoco.models.swin import (
    APART,
    SWINS,
    SwinBlock,
    SwinTransformer,
    relative_index,
    resampled_bias,
    swin_nano,
    windows_of,
)
from fastmoco.models.vit import vit_nano
from fastmoco.models.weights.building import describe, load_foreign
from fastmoco.models.weights.fitting import fit_encoder
from fastmoco.models.weights.foreign import find_encoder
from fastmoco.models.weights.reading import RawWeights
from fastmoco.models.weights.writing import refusal
from fastmoco.recipes import get_recipe
from fastmoco_pipelines.spec import EvalSpec

GOLDEN = Path(__file__).parents[2] / "golden" / "siblings_b" / "swin.npz"
FLOAT64, FLOAT32 = 1e-9, 1.1e-7
"""Largest errors of arrays stored in these types, over the largest entry."""


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


def golden(data: dict[str, np.ndarray], tag: str) -> SwinTransformer:
    """The encoder of a tag in float64."""
    size, patch, width, window = data[f"{tag}/cfg"].tolist()
    encoder = SwinTransformer(
        image_size=size,
        patch_size=patch,
        width=width,
        depths=tuple(data[f"{tag}/depths"].tolist()),
        heads=tuple(data[f"{tag}/heads"].tolist()),
        window=window,
        eps=float(data[f"{tag}/eps"]),
    )
    start = f"{tag}/sd/"
    state = {k.removeprefix(start): torch.from_numpy(data[k]) for k in data if k.startswith(start)}
    encoder.double().load_state_dict(state)
    return encoder


def require_close(ours: Tensor, stored: np.ndarray, name: str) -> None:
    gate = FLOAT64 if stored.dtype == np.float64 else FLOAT32
    largest, error = np.abs(stored).max(), np.abs(ours.detach().numpy() - stored).max()
    assert ours.shape == stored.shape, name
    assert error <= (1e-9 if largest < 1e-6 else gate * largest), name


@pytest.mark.parametrize(
    ("tag", "at"), [("a", "a"), ("b", "b"), *(("crop", f"crop/{size}") for size in (28, 20, 18))]
)
def test_features_tokens_and_gradients_are_the_golden_ones(
    data: dict[str, np.ndarray], tag: str, at: str
) -> None:
    encoder = golden(data, tag)
    images = torch.from_numpy(data[f"{at}/x"]).double().requires_grad_()
    features = encoder(images)
    (features * torch.from_numpy(data[f"{at}/w"])).sum().backward()
    require_close(features, data[f"{at}/feat"], "feat")
    require_close(encoder.token_features(images), data[f"{at}/tokens"], "tokens")
    assert images.grad is not None
    require_close(images.grad, data[f"{at}/dx"], "dx")
    gradients = {n: p.grad for n, p in encoder.named_parameters()}
    compared = [key for key in data if key.startswith(f"{at}/grad/")]
    assert compared
    for key in compared:
        gradient = gradients[key.removeprefix(f"{at}/grad/")]
        assert gradient is not None
        require_close(gradient, data[key], key)


@pytest.mark.parametrize("tag", ["a", "b"])
def test_windows_masks_and_offsets_are_the_golden_ones(
    data: dict[str, np.ndarray], tag: str
) -> None:
    encoder = golden(data, tag)
    for s, stage in enumerate(encoder.layers):
        for b, block in enumerate(stage.blocks):
            assert isinstance(block, SwinBlock)
            assert [block.window, block.shift] == data[f"{tag}/window_shift/{s}.{b}"].tolist()
    size, patch, _, window = data[f"{tag}/cfg"].tolist()
    apart = windows_of(size // patch, window, window // 2).apart
    assert apart is not None
    assert np.array_equal((apart * APART).numpy(), data[f"{tag}/attn_mask"])
    assert np.array_equal(relative_index(window).numpy(), data[f"{tag}/rel_index"])


def published(width: int, depths: tuple[int, ...], window: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published file without classifier, for images of 224 pixels."""
    norm = ("weight", "bias")
    shapes: dict[str, tuple[int, ...]] = {"patch_embed.proj.weight": (width, 3, 4, 4)}
    shapes |= {"patch_embed.proj.bias": (width,)}
    shapes |= {f"patch_embed.norm.{p}": (width,) for p in norm}
    for s, depth in enumerate(depths):
        C, M, heads = width * 2**s, min(window, 56 // 2**s), width * 2**s // 32
        for b in range(depth):
            at = f"layers.{s}.blocks.{b}"
            shapes |= {f"{at}.{n}.{p}": (C,) for n in ("norm1", "norm2") for p in norm}
            shapes[f"{at}.attn.relative_position_bias_table"] = ((2 * M - 1) ** 2, heads)
            for name, out, into in (
                ("attn.qkv", 3 * C, C),
                ("attn.proj", C, C),
                ("mlp.fc1", 4 * C, C),
                ("mlp.fc2", C, 4 * C),
            ):
                shapes |= {f"{at}.{name}.weight": (out, into), f"{at}.{name}.bias": (out,)}
        if s < 3:
            shapes |= {f"layers.{s}.downsample.norm.{p}": (4 * C,) for p in norm}
            shapes[f"layers.{s}.downsample.reduction.weight"] = (2 * C, 4 * C)
    return shapes | {f"norm.{p}": (8 * width,) for p in norm}


@pytest.mark.parametrize(
    ("name", "window", "width", "depths", "count"),
    [
        ("swin_tiny", 7, 96, (2, 2, 6, 2), 27_519_354),
        ("swin_tiny", 14, 96, (2, 2, 6, 2), 27_569_754),
        ("swin_small", 7, 96, (2, 2, 18, 2), 48_837_258),
        ("swin_small", 14, 96, (2, 2, 18, 2), 48_968_298),
        ("swin_base", 7, 128, (2, 2, 18, 2), 86_743_224),
        ("swin_base", 14, 128, (2, 2, 18, 2), 86_917_944),
    ],
)
def test_names_shapes_and_sizes_are_the_published_ones(
    name: str, window: int, width: int, depths: tuple[int, ...], count: int
) -> None:
    with torch.device("meta"):
        encoder = SWINS[name](window=window)
    found = {key: tuple(tensor.shape) for key, tensor in encoder.state_dict().items()}
    assert found == published(width, depths, window)
    assert sum(p.numel() for p in encoder.parameters()) == count
    assert (encoder.embed_dim, encoder.tokens) == (8 * width, 49)


@pytest.mark.parametrize("side", [56, 50, 40])
def test_blocks_are_their_reference_on_maps_of_any_size(side: int) -> None:
    """Values and gradients, with branches that are left out, and with blocks that are computed
    again."""
    torch.manual_seed(0)
    encoder = swin_nano(image_size=56).double()
    images = torch.randn(3, 3, side, side, dtype=torch.float64)
    paths = torch.rand(3, 4, 2, dtype=torch.float64).round() * 2
    again, plain = copy.deepcopy(encoder), copy.deepcopy(encoder)
    again.recompute("full")
    found = []
    for network, encode in ((encoder, encoder), (again, again), (plain, plain.plain)):
        features = encode(images, paths)
        features.square().sum().backward()
        gradients = [p.grad for p in network.parameters()]
        found.append((features, *(g for g in gradients if g is not None)))
    assert len(found[0]) == 1 + len(list(encoder.parameters()))
    for ours, same, other in zip(*found, strict=True):
        assert torch.equal(ours, same)
        assert (ours - other).abs().max() <= 1e-12 * max(1.0, other.abs().max().item())


def test_the_start_is_normal() -> None:
    torch.manual_seed(0)
    for name, parameter in SWINS["swin_nano"](image_size=56).named_parameters():
        if name.startswith("patch_embed.proj"):
            assert parameter.abs().max().item() <= 12**-0.5  # torch's, 1 / sqrt(fan-in)
        elif parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
        else:
            one = "norm" in name and name.endswith("weight")
            assert torch.equal(parameter, torch.full_like(parameter, float(one))), name


def test_a_bias_table_is_resampled_for_another_window() -> None:
    table = torch.randn(13**2, 3, generator=torch.Generator().manual_seed(0))
    assert resampled_bias(table, 7) is table
    wide = resampled_bias(table, 14)
    assert wide.shape == (27**2, 3)
    # The middle of either grid is the offset of a token to itself; heads stay apart.
    middle = table.view(13, 13, 3)[6, 6], wide.view(27, 27, 3)[13, 13]
    assert torch.allclose(*middle, atol=1e-6)
    exact = resampled_bias(table.double(), 14)
    picture = table.double().T.reshape(1, 3, 13, 13)
    bicubic = interpolate(picture, size=(27, 27), mode="bicubic", align_corners=False)
    assert torch.equal(exact, bicubic[0].flatten(1).T)
    assert 0 < (wide - exact).abs().max() <= 1e-5
    ramp = torch.arange(13.0).repeat(13)[:, None]
    found = resampled_bias(ramp, 14).view(27, 27)
    assert torch.allclose(
        found, ((torch.arange(27) + 0.5) * 13 / 27 - 0.5).expand(27, 27), atol=0.3
    )


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image_size=20: must be a multiple of .* 4 pixels"):
        SWINS["swin_tiny"](image_size=20)
    with pytest.raises(ValueError, match=r"images shape=\(2, 3, 9, 9\): .* patches of 2 pixels"):
        swin_nano()(torch.zeros(2, 3, 9, 9))
    with pytest.raises(ValueError, match="use full or none"):
        swin_nano().recompute("selective")


def release(tensors: dict[str, Tensor], window: int) -> RawWeights:
    """As the published files are: with the tables that follow from the sizes, and a classifier."""
    more: dict[str, Tensor] = {}
    for name in [name for name in tensors if name.endswith("attn.proj.bias")]:
        block = name.removesuffix(".attn.proj.bias")
        more[f"{block}.attn.relative_position_index"] = relative_index(window)
        if ".blocks.1" in block:
            more[f"{block}.attn_mask"] = torch.zeros(4, window**2, window**2)
    more["head.weight"] = torch.zeros(9, 4)
    return RawWeights(path=Path("swin.pth"), tensors=tensors | more, wrapped_in="model")


@pytest.mark.parametrize("window", [7, 14])
@pytest.mark.parametrize(
    ("name", "width", "depths"),
    [("swin_tiny", 96, (2, 2, 6, 2)), ("swin_base", 128, (2, 2, 18, 2))],
)
def test_a_published_file_is_known_by_its_names_and_shapes(
    name: str, width: int, depths: tuple[int, ...], window: int
) -> None:
    shapes = published(width, depths, window)
    tensors = {key: torch.zeros(1).expand(shape) for key, shape in shapes.items()}
    weights = find_encoder(release(tensors, 2))
    assert (weights.family, weights.format, weights.heads) == ("swin", "Swin", None)
    assert weights.trunk.keys() == shapes.keys()
    description = describe(weights)
    assert isinstance(description, SwinDescription)
    assert (description.architecture, description.window) == (name, window)
    del tensors["norm.bias"]
    with pytest.raises(CheckpointError, match=r"is none of swin_nano, swin_tiny"):
        describe(find_encoder(release(tensors, 2)))


def test_a_file_gives_the_features_of_its_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = swin_nano(image_size=56).eval()
    path = tmp_path / "swin_nano.pth"
    torch.save({"model": release(encoder.state_dict(), 7).tensors, "epoch": 300}, path)
    loaded = load_foreign(path)
    images = torch.randn(2, 3, 224, 224)
    whole = swin_nano(image_size=224).eval()
    whole.load_state_dict(encoder.state_dict())
    assert torch.equal(loaded.encoder(images), whole(images))
    description = loaded.description
    for to in ("timm", "torchvision", "hf", "moco-v3"):
        assert f"--to {to} has no Swin" in refusal(to, description)
    assert not any(refusal(to, description) for to in ("safetensors", "torch-export", "onnx"))


def test_a_run_takes_a_file_of_another_window() -> None:
    torch.manual_seed(0)
    ours = swin_nano(image_size=56, window=14)
    weights = find_encoder(release(swin_nano(image_size=56).state_dict(), 7))
    fit = fit_encoder(ours.state_dict(), weights, positions="sincos")
    assert fit.counts()["resampled"] == 4
    assert fit.tensors.keys() == ours.state_dict().keys()
    name = "layers.1.blocks.1.attn.relative_position_bias_table"
    assert fit.resampled[name] == "(window 7 to 14, bicubic)"
    assert torch.equal(fit.tensors[name], resampled_bias(weights.trunk[name], 14))
    for encoder, heads in ((vit_nano(), 4), (resnet_nano(), None), (SWINS["swin_tiny"](), None)):
        with pytest.raises(CheckpointError, match=r"The file is .* --model.architecture"):
            fit_encoder(encoder.state_dict(), weights, positions="learned", heads=heads)


def test_the_header_of_a_file_says_the_window() -> None:
    base = get_recipe("vit_s16_e300_b4096")
    config = replace(base, model=ModelConfig(architecture="swin_small", window=14))
    header = describe_run(config).to_metadata()
    assert (header["width"], header["depth"], header["window"]) == ("768", "24", "14")
    assert description_of(header) == describe_run(config)
    small = SwinDescription(architecture="swin_nano", image=EvalSpec(size=8, resize=8), window=2)
    assert description_of(small.to_metadata()) == small
    with pytest.raises(ValueError, match="its header cannot be read"):
        description_of(header | {"window": "seven"})
    with pytest.raises(ValueError, match="width=96, but swin_small has 768"):
        description_of(header | {"width": "96"})
