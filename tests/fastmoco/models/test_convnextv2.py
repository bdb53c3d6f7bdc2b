"""ConvNeXt V2: golden numbers, published names and counts, its reference, passes that compute
again, what a planner is told, and the encoder of FCMAE."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastmoco.checkpoint import CheckpointError
from fastmoco.config import Config, DataConfig, MoCoV3Config, ModelConfig
from fastmoco.distributed.mesh import World
from fastmoco.models.convnextv2 import (
    CONVNEXTS,
    ConvNeXtV2,
    ConvNeXtV2Block,
    convnextv2_atto,
    convnextv2_micro,
    convnextv2_tiny,
)
from fastmoco.models.drop_path import PathDraws
from fastmoco.models.encoder_file import ConvNeXtV2Description, load_encoder
from fastmoco.models.grn import GRN, Scope
from fastmoco.models.map_decoder import MapDecoder
from fastmoco.models.masks import kept_count, mask_of, shuffled
from fastmoco.models.weights.building import load_foreign
from fastmoco.models.weights.fitting import fit_encoder
from fastmoco.models.weights.writing import plain_encoder, refusal, write_encoder
from fastmoco.objectives.build import build_model, build_objective
from fastmoco.objectives.masked import masked_mean, normalised_patches, pixel_patches, square_errors
from fastmoco.recipes.supervised import SupervisedConfig
from fastmoco.training.initial_weights import start_from
from fastmoco_pipelines.spec import EvalSpec, ViewSpec
from tests.fastmoco.objectives.test_conformance import CONVNEXT, config_of

GOLDEN = Path(__file__).parents[2] / "golden" / "siblings_b" / "convnextv2.npz"
FLOAT64, FLOAT32 = 1e-9, 1.1e-7
"""Largest errors of arrays stored in these types, over the largest entry."""


@pytest.fixture
def data() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


def wide(data: dict[str, np.ndarray], name: str) -> Tensor:
    return torch.from_numpy(data[name]).double()


def filled(data: dict[str, np.ndarray], module: nn.Module, start: str) -> nn.Module:
    """A module in float64 with the golden weights of a beginning, no more and no fewer."""
    state = {k.removeprefix(start): wide(data, k) for k in data if k.startswith(start)}
    module.double().load_state_dict(state)
    return module


def require_close(ours: Tensor | None, data: dict[str, np.ndarray], name: str) -> None:
    stored = data[name]
    assert ours is not None, name
    assert ours.shape == stored.shape, name
    error = np.abs(ours.detach().numpy() - stored).max()
    assert error <= (FLOAT64 if stored.dtype == np.float64 else FLOAT32) * np.abs(stored).max(), (
        name
    )


def require_gradients(module: nn.Module, data: dict[str, np.ndarray], start: str) -> None:
    """All gradients that are stored under a beginning."""
    names = [name for name in data if name.startswith(start)]
    assert names
    parameters = dict(module.named_parameters())
    for name in names:
        require_close(parameters[name.removeprefix(start)].grad, data, name)


def golden_encoder(data: dict[str, np.ndarray], tag: str) -> ConvNeXtV2:
    depths, widths = (tuple(data[f"{tag}/{name}"].tolist()) for name in ("depths", "dims"))
    return ConvNeXtV2(depths=depths, widths=widths, image_size=96)


def rough(recompute: str = "none") -> ConvNeXtV2:
    """A small encoder in float64 with every parameter off its start."""
    torch.manual_seed(3)
    encoder = convnextv2_micro().double()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    encoder.recompute(recompute)  # type: ignore[arg-type]
    return encoder


def test_global_response_normalization_matches_golden(data: dict[str, np.ndarray]) -> None:
    layer = GRN(6).double()
    with torch.no_grad():
        layer.gamma.copy_(wide(data, "grn/gamma"))
        layer.beta.copy_(wide(data, "grn/beta"))
    x = wide(data, "grn/x").requires_grad_()
    y = layer(x)
    (y * wide(data, "grn/w")).sum().backward()
    require_close(y, data, "grn/y")
    require_close(layer.plain(x), data, "grn/y")
    require_close(x.grad, data, "grn/dx")
    require_close(layer.gamma.grad, data, "grn/dgamma")
    require_close(layer.beta.grad, data, "grn/dbeta")
    # A channel of zeros has a norm, and a gradient, of zero. bf16 has its norms in float32.
    zeros = torch.zeros(1, 2, 2, 6, dtype=torch.float64, requires_grad=True)
    layer(zeros).sum().backward()
    assert zeros.grad is not None
    assert bool(torch.isfinite(zeros.grad).all())
    assert layer(x.bfloat16()).dtype == torch.bfloat16


def test_a_block_matches_golden(data: dict[str, np.ndarray]) -> None:
    block = filled(data, ConvNeXtV2Block(6), "block/sd/")
    x = wide(data, "block/x").requires_grad_()
    y = block(x)
    (y * wide(data, "block/w")).sum().backward()
    require_close(y, data, "block/y")
    require_close(x.grad, data, "block/dx")
    require_gradients(block, data, "block/grad/")


def test_features_and_gradients_match_golden(data: dict[str, np.ndarray]) -> None:
    encoder = golden_encoder(data, "trunk")
    filled(data, encoder, "trunk/sd/")
    features = encoder(wide(data, "trunk/x"))
    (features * wide(data, "trunk/w")).sum().backward()
    require_close(features, data, "trunk/feat")
    require_close(encoder.plain(wide(data, "trunk/x")), data, "trunk/feat")
    require_gradients(encoder, data, "trunk/grad/")


@pytest.mark.parametrize("scope", ["image", "batch"])
@pytest.mark.parametrize("plain", [False, True])
def test_fcmae_matches_golden(data: dict[str, np.ndarray], scope: Scope, plain: bool) -> None:
    encoder = golden_encoder(data, "fcmae")
    encoder.norm = nn.Identity()
    filled(data, encoder, "fcmae/sd/encoder.")
    size, patch, width = data["fcmae/cfg"].tolist()
    decoder = MapDecoder(in_dim=encoder.embed_dim, width=width, depth=1, out_dim=3 * patch**2)
    start = "fcmae/sd/"
    state = {k.removeprefix(start): wide(data, k) for k in data if k.startswith(start)}
    own = {n: t for n, t in state.items() if not n.startswith("encoder.")}
    decoder.double().load_state_dict(own)

    # The mask by the golden noise.
    count = (size // patch) ** 2
    kept = shuffled(wide(data, "fcmae/noise"), kept_count(count, float(data["fcmae/mask_ratio"])))
    mask = mask_of(kept, count)
    assert torch.equal(mask.int(), torch.from_numpy(data["fcmae/mask"]))

    # The pass, and its loss.
    images = wide(data, "fcmae/x")
    latents = encoder.masked(images, ~mask, scope)
    predictions = (decoder.plain if plain else decoder)(latents, mask)
    targets = normalised_patches(pixel_patches(images, patch))
    masked = count - kept.shape[1]
    loss = masked_mean(square_errors(predictions, targets), mask, masked).mean()
    loss.backward()
    at = f"fcmae/{scope}"
    require_close(latents, data, f"{at}/enc")
    rows = predictions.transpose(1, 2).unflatten(2, latents.shape[2:])
    require_close(rows[:, :32], data, f"{at}/pred_first")
    require_close(rows.sum(1), data, f"{at}/pred_sum")
    require_close(loss, data, f"{at}/loss")
    both = nn.ModuleDict({"encoder": encoder})
    for name, parameter in [*both.named_parameters(), *decoder.named_parameters()]:
        if (stored := f"{at}/grad/{name}") in data:
            require_close(parameter.grad, data, stored)
            del data[stored]
    assert not [name for name in data if name.startswith(f"{at}/grad/")]


def published(first: int, depths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published file's trunk, from the spec alone."""
    shapes: dict[str, tuple[int, ...]] = {}

    def layer(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    widths = [first * 2**stage for stage in range(4)]
    layer("downsample_layers.0.0", widths[0], 3, 4, 4)
    layer("downsample_layers.0.1", widths[0])
    for stage in (1, 2, 3):
        layer(f"downsample_layers.{stage}.0", widths[stage - 1])
        layer(f"downsample_layers.{stage}.1", widths[stage], widths[stage - 1], 2, 2)
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for at in (f"stages.{stage}.{i}" for i in range(depth)):
            layer(f"{at}.dwconv", width, 1, 7, 7)
            layer(f"{at}.norm", width)
            layer(f"{at}.pwconv1", 4 * width, width)
            layer(f"{at}.pwconv2", width, 4 * width)
            shapes[f"{at}.grn.gamma"] = shapes[f"{at}.grn.beta"] = (1, 1, 1, 4 * width)
    layer("norm", widths[3])
    return shapes


@pytest.mark.parametrize(
    ("size", "first", "depths", "millions"),
    [
        ("atto", 40, (2, 2, 6, 2), 3.7),
        ("femto", 48, (2, 2, 6, 2), 5.2),
        ("pico", 64, (2, 2, 6, 2), 9.1),
        ("nano", 80, (2, 2, 8, 2), 15.6),
        ("tiny", 96, (3, 3, 9, 3), 28.6),
        ("base", 128, (3, 3, 27, 3), 89),
        ("large", 192, (3, 3, 27, 3), 198),
        ("huge", 352, (3, 3, 27, 3), 660),
    ],
)
def test_published_files_load_without_a_missing_or_surplus_key(
    size: str, first: int, depths: tuple[int, ...], millions: float
) -> None:
    shapes = published(first, depths)
    architecture = CONVNEXTS[f"convnextv2_{size}"]
    with torch.device("meta"):
        encoder = architecture()
        file = {name: torch.empty(shape) for name, shape in shapes.items()}
    encoder.load_state_dict(file, assign=True)
    assert {n: tuple(t.shape) for n, t in encoder.state_dict().items()} == shapes
    assert architecture.width == encoder.embed_dim == 8 * first
    classifier = 1000 * (8 * first + 1)
    count = sum(p.numel() for p in encoder.parameters()) + classifier
    assert round(count / 1e6, 0 if millions > 80 else 1) == millions


def test_a_published_file_is_an_encoder_with_its_classifier_left_out(tmp_path: Path) -> None:
    own = convnextv2_atto().state_dict()
    more = {"head.weight": torch.zeros(1000, 320), "head.bias": torch.zeros(1000)}
    path = tmp_path / "convnextv2_atto_1k_224.pt"
    torch.save({"model": own | more}, path)
    loaded = load_foreign(path)
    assert loaded.description.architecture == "convnextv2_atto"
    assert loaded.weights.beside == dict.fromkeys(more, "classifier")
    assert loaded.description.image.size == 224
    state = loaded.encoder.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in own.items())

    # Into an encoder of its size alone.
    fit = fit_encoder(own, loaded.weights, positions="sincos")
    assert fit.counts()["matched"] == len(own)
    with torch.device("meta"):
        tiny = convnextv2_tiny().state_dict()
    with pytest.raises(CheckpointError, match="another ConvNeXt V2"):
        fit_encoder(tiny, loaded.weights, positions="sincos")
    resnet = {"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="a ConvNeXt V2, the encoder of the run a ResNet"):
        fit_encoder(resnet, loaded.weights, positions="sincos")
    assert "safetensors by these names" in refusal("timm", loaded.description)
    assert refusal("onnx", loaded.description) == ""


def test_an_exported_encoder_starts_both_encoders_of_a_run(tmp_path: Path) -> None:
    description = ConvNeXtV2Description(
        architecture="convnextv2_micro", image=EvalSpec(size=16, resize=16)
    )
    encoder = plain_encoder(rough().float(), description)
    path = tmp_path / "encoder.safetensors"
    write_encoder("safetensors", path, encoder, description, description.to_metadata())
    loaded = load_encoder(path, description)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded.encoder(images), encoder(images))
    assert "pooling" in loaded.header
    config = replace(CONVNEXT, model=replace(CONVNEXT.model, init=str(path)))
    objective = build_objective(config, torch.device("cpu"))
    assert start_from(config, objective, World()) is not None
    for network in (objective.encoder, objective.momentum_encoder):
        for name, tensor in encoder.state_dict().items():
            assert torch.equal(network.state_dict()[name], tensor), name


def test_layers_start_as_in_the_official_code() -> None:
    torch.manual_seed(0)
    encoder = convnextv2_atto()
    for name, tensor in encoder.named_parameters():
        if tensor.ndim > 1 and "grn" not in name:
            expected = pytest.approx(0.02, rel=0.2 if tensor.numel() < 4000 else 0.05)
            assert tensor.std().item() == expected, name
        else:
            norm = name.endswith("weight")
            assert torch.equal(tensor, torch.full_like(tensor, float(norm))), name


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_features_are_those_of_the_reference_and_images_do_not_see_each_other(
    recompute: str,
) -> None:
    encoder, plain = rough(recompute), rough()
    images = torch.randn(5, 3, 37, 32, dtype=torch.float64)
    paths = PathDraws(0.6, 4, seed=3)(5, 1, 0, torch.device("cpu"))[:, 0]
    assert (paths[..., 0] == 0).any()
    assert (paths[..., 0] > 1).any()
    features = encoder(images, paths)
    ours, theirs = features, plain.plain(images, paths)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    for one in (ours, theirs):
        one.square().sum().backward()
    for mine, other in zip(encoder.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-10, atol=1e-11)
    alone = torch.cat([encoder(images[i : i + 1], paths[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(features, alone, rtol=1e-12, atol=1e-13)
    with pytest.raises(ValueError, match="use full or none"):
        encoder.recompute("selective")


def test_hidden_pixels_change_nothing_and_all_kept_is_the_whole_image() -> None:
    encoder = rough()
    torch.manual_seed(1)
    images = torch.randn(3, 3, 48, 32, dtype=torch.float64)
    keep = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0]]).bool()
    found = encoder.masked(images, keep)
    hidden = (~keep).view(3, 1, 3, 2)
    noise = 9 * torch.randn_like(images) * hidden.repeat_interleave(16, 2).repeat_interleave(16, 3)
    assert torch.equal(encoder.masked(images + noise, keep), found)
    assert torch.equal(found * hidden, torch.zeros_like(found))
    assert torch.equal(found.abs().amax(1, keepdim=True) == 0, hidden)

    # Norms of the batch couple its images; those of an image do not.
    alone = torch.cat([encoder.masked(images[i : i + 1], keep[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-13)
    assert not torch.allclose(encoder.masked(images, keep, "batch"), found, rtol=1e-3)
    whole = encoder.masked(images, torch.ones(3, 6))
    torch.testing.assert_close(encoder.norm(whole.mean((2, 3))), encoder(images))
    with pytest.raises(ValueError, match="multiples of 16 pixels"):
        encoder.masked(images[..., :40, :], keep)
    with pytest.raises(ValueError, match=r"keep shape=\(3, 4\): must be \(3, 6\)"):
        encoder.masked(images, keep[:, :4])


def test_it_is_built_without_memory_as_a_plan_needs() -> None:
    with FakeTensorMode():
        objective = build_model(CONVNEXT)
        assert objective.encoder(torch.empty(2, 3, 16, 16)).shape == (2, 128)


def test_flops_are_those_that_torch_counts() -> None:
    with torch.device("meta"):
        encoder = convnextv2_atto(image_size=75)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(torch.empty(2, 3, 75, 75))
    assert 2 * encoder.forward_flops(75) == counter.get_total_flops()


def test_the_bound_on_kept_numbers_is_at_least_twice_what_is_kept() -> None:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    encoder = convnextv2_micro()
    weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = encoder(torch.randn(8, 3, 32, 32))
    numbers = sum(size for place, size in kept.items() if place not in weights) / 4 / 8
    assert 2 * numbers <= encoder.most_numbers() <= 6 * numbers
    assert features.shape == (8, 128)


def test_what_it_cannot_take_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"depths=\(1, 1\): needs 4 numbers"):
        ConvNeXtV2(depths=(1, 1), widths=(4, 4, 4, 4))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"takes \[B, 3, H, W\]"):
        convnextv2_micro()(torch.zeros(2, 1, 16, 16))
    with pytest.raises(ValueError, match="12 x 16 pixels: this encoder takes at least 16"):
        convnextv2_micro()(torch.zeros(2, 3, 12, 16))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"patch_size": 4}, "patch_size=4: has no effect on convnextv2_tiny"),
        ({"zero_residual": False}, "take --model.zero-residual True, or a ResNet"),
        ({"attention": "sdpa"}, "it has no attention"),
        ({"keep_tokens": "0.5"}, "it has no tokens"),
        ({"checkpointing": "selective"}, "use full or none"),
        ({"image_size": 31}, "image_size=31: must be at least 32 for convnextv2_tiny"),
    ],
)
def test_a_config_refuses_what_it_would_not_read(fields: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ModelConfig(architecture="convnextv2_tiny", **fields)  # type: ignore[arg-type]


def test_fine_tuning_decays_no_response_normalization_but_pre_training_does() -> None:
    decayed = {}
    for kind in (MoCoV3Config, SupervisedConfig):
        objective = build_objective(config_of(kind, CONVNEXT), torch.device("cpu"))
        groups = {n: objective.parameter_group(n, p) for n, p in objective.named_parameters()}
        name = "encoder.stages.1.0.grn.gamma"
        decayed[kind] = [
            0.0 if group is not None and group.weight_decay_scale == 0 else 1.0
            for group in (groups[name], groups["encoder.stages.1.0.pwconv1.weight"])
        ]
    assert decayed == {MoCoV3Config: [1.0, 1.0], SupervisedConfig: [0.0, 1.0]}


def test_a_config_takes_images_and_small_views_that_leave_a_position() -> None:
    model = ModelConfig(architecture="convnextv2_micro", image_size=40, drop_path=0.1)
    view = ViewSpec(size=40)
    Config(model=model, data=DataConfig(view1=view, view2=view, more_views=(ViewSpec(size=17),)))
    small = DataConfig(view1=view, view2=view, more_views=(ViewSpec(size=15),))
    with pytest.raises(ValueError, match=r"more_views.0.size=15: must be at least 16"):
        Config(model=model, data=small)
