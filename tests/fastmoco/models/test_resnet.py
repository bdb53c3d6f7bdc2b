"""ResNets: an independent plain reference, torchvision's names and counts, initialisation,
checkpointing, and what a planner is told."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastmoco.models.resnet import (
    RESNETS,
    BasicBlock,
    Bottleneck,
    Convolution,
    ResidualBlock,
    ResNet,
    resnet50,
    resnet_nano,
)
from fastmoco.objectives.byol import BYOL
from fastmoco.objectives.moco_v3 import MoCoV3

DEPTHS, WIDTHS = (2, 1, 2, 1), (4, 8, 6, 5)


def rough(block: type[ResidualBlock], stem: str = "full") -> ResNet:
    """A narrow ResNet in float64 with every norm and running average off its start."""
    torch.manual_seed(3)
    encoder = ResNet(block=block, depths=DEPTHS, widths=WIDTHS, stem=stem).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if ("bn" in name or "downsample.1" in name) and tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor))
    return encoder


def written_out(state: dict[str, Tensor], x: Tensor, stem: str, training: bool) -> Tensor:
    """A ResNet as functions of the tensors of its state, by their names alone."""

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        if training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    x = norm("bn1", conv("conv1", x, 2)).clamp(min=0)
    if stem == "full":
        x = F.max_pool2d(x, 3, 2, 1)
    for stage, depth in enumerate(DEPTHS, start=1):
        for i in range(depth):
            at, stride = f"layer{stage}.{i}", 2 if stage > 1 and i == 0 else 1
            convs = [n for n in ("conv1", "conv2", "conv3") if f"{at}.{n}.weight" in state]
            strided = "conv1" if len(convs) == 2 else "conv2"
            out = x
            for n in convs:
                out = conv(f"{at}.{n}", out, stride if n == strided else 1)
                out = norm(f"{at}.bn{n[-1]}", out)
                out = out if n == convs[-1] else out.clamp(min=0)
            if f"{at}.downsample.0.weight" in state:
                x = norm(f"{at}.downsample.1", conv(f"{at}.downsample.0", x, stride))
            x = (out + x).clamp(min=0)
    return x.mean((2, 3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("stem", ["full", "small"])
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_features_and_gradients_are_those_written_out(
    block: type[ResidualBlock], stem: str, training: bool
) -> None:
    encoder = rough(block, stem).train(training)
    images = torch.randn(5, 3, 37, 37, dtype=torch.float64, requires_grad=True)
    again = images.detach().clone().requires_grad_()
    state = {n: t.detach().clone() for n, t in encoder.state_dict().items()}
    weights = dict(encoder.named_parameters())
    state |= {n: state[n].requires_grad_() for n in weights}
    ours, theirs = encoder(images), written_out(state, again, stem, training)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for features in (ours, theirs):
        (features * torch.linspace(-1, 1, features.numel()).view_as(features)).sum().backward()
    torch.testing.assert_close(images.grad, again.grad, rtol=1e-9, atol=1e-10)
    for name, weight in weights.items():
        torch.testing.assert_close(weight.grad, state[name].grad, rtol=1e-9, atol=1e-10)


def test_a_pass_in_training_moves_the_running_averages_once() -> None:
    encoder = rough(BasicBlock)
    before = copy.deepcopy(encoder.state_dict())
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    rows = encoder.conv1(images)
    encoder(images)
    n = rows.numel() / rows.shape[1]
    var = rows.var((0, 2, 3), unbiased=False) * n / (n - 1)
    torch.testing.assert_close(
        encoder.bn1.running_mean, 0.9 * before["bn1.running_mean"] + 0.1 * rows.mean((0, 2, 3))
    )
    torch.testing.assert_close(encoder.bn1.running_var, 0.9 * before["bn1.running_var"] + 0.1 * var)
    tracked = [t for n, t in encoder.state_dict().items() if n.endswith("num_batches_tracked")]
    assert {int(t) for t in tracked} == {1}


@pytest.mark.parametrize(
    ("name", "parameters", "tensors", "width"),
    [
        ("resnet18", 11_176_512, 120, 512),
        ("resnet34", 21_284_672, 216, 512),
        ("resnet50", 23_508_032, 318, 2048),
    ],
)
def test_names_shapes_and_counts_are_those_of_torchvision(
    name: str, parameters: int, tensors: int, width: int
) -> None:
    with torch.device("meta"):
        encoder = RESNETS[name]()
    shapes = {n: tuple(t.shape) for n, t in encoder.state_dict().items()}
    assert sum(p.numel() for p in encoder.parameters()) == parameters
    assert len(shapes) == tensors
    assert encoder.embed_dim == RESNETS[name].width == width
    last = "conv3" if name == "resnet50" else "conv2"
    expected = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.weight": (64,),
        "bn1.running_mean": (64,),
        "bn1.num_batches_tracked": (),
        "layer2.0.downsample.0.weight": (width // 4, width // 8, 1, 1),
        "layer2.0.downsample.1.running_var": (width // 4,),
        f"layer4.1.{last}.weight": (width, 512, 1, 1) if last == "conv3" else (512, 512, 3, 3),
        "layer4.1.bn2.bias": (512,),
    }
    assert expected.items() <= shapes.items()
    assert ("layer1.0.downsample.0.weight" in shapes) == (name == "resnet50")


def test_moco_v3_and_byol_on_resnet50_have_the_counts_and_heads_of_the_papers() -> None:
    with torch.device("meta"):
        moco, byol = MoCoV3(resnet50), BYOL(resnet50)
    assert sum(p.numel() for p in moco.parameters() if p.requires_grad) == 35_058_752
    assert sum(p.numel() for p in moco.momentum_encoder.parameters()) == 32_953_408
    kinds = {
        "moco": [[type(m).__name__ for m in h] for h in (moco.encoder.head, moco.predictor)],
        "byol": [[type(m).__name__ for m in h] for h in (byol.encoder.head, byol.predictor)],
    }
    layers = ["Linear", "BatchNorm", "ReLU", "Linear"]
    assert kinds == {"moco": [[*layers, "BatchNorm"], layers], "byol": [layers, layers]}
    assert moco.encoder.head[4].weight is None
    biases = [h[i].bias is not None for h in (moco.encoder.head, byol.encoder.head) for i in (0, 3)]
    assert biases == [False, False, True, False]
    assert moco.coupling == "trunk"


def test_weights_start_by_fan_out_and_each_branch_at_zero() -> None:
    torch.manual_seed(0)
    encoder = RESNETS["resnet18"]()
    for name, module in encoder.named_modules():
        if isinstance(module, Convolution):
            out, _, height, wide = module.weight.shape
            expected = math.sqrt(2 / (out * height * wide))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.05), name
    norms = {n: t for n, t in encoder.named_parameters() if ".bn" in n or n.startswith("bn")}
    for name, weight in norms.items():
        zero = name.endswith("bias") or ".bn2." in name
        assert torch.equal(weight, torch.full_like(weight, 0.0 if zero else 1.0)), name


@pytest.mark.parametrize("build", [MoCoV3, BYOL])
def test_checkpointing_keeps_every_bit_and_counts_a_batch_once(
    build: Callable[..., MoCoV3 | BYOL],
) -> None:
    torch.manual_seed(5)
    plain = build(resnet_nano, hidden_dim=16, projection_dim=8)
    views = torch.randn(2, 6, 3, 16, 16)
    saving = copy.deepcopy(plain)
    saving.encoder.recompute("full")
    losses = []
    for objective in (plain, saving):
        losses.append(objective(*views).loss)
        losses[-1].backward()
    assert torch.equal(*losses)
    for name, tensor in plain.state_dict(keep_vars=True).items():
        other = saving.state_dict(keep_vars=True)[name]
        assert torch.equal(tensor, other), name
        if tensor.grad is not None:
            assert torch.equal(tensor.grad, other.grad), name
    with pytest.raises(ValueError, match="use full or none"):
        plain.encoder.recompute("selective")


def test_a_gradient_on_a_single_position_is_whole_in_bf16() -> None:
    """torch left eight ninths of it uninitialised with a stride of 2."""
    torch.manual_seed(0)
    layer = Convolution(8, 16, 3, stride=2)
    for _ in range(3):
        junk = [torch.full((n,), 1e9) for n in (576, 1152, 2304)]
        del junk
        layer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(torch.randn(4, 8, 1, 1)).square().sum().backward()
        assert layer.weight.grad is not None
        outside = layer.weight.grad.flatten(2)[..., [0, 1, 2, 3, 5, 6, 7, 8]]
        assert torch.equal(outside, torch.zeros_like(outside))


@pytest.mark.parametrize("build", [resnet_nano, resnet50])
def test_flops_are_those_that_torch_counts(build: Callable[..., ResNet]) -> None:
    with torch.device("meta"):
        encoder = build(image_size=40)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            encoder(torch.empty(2, 3, 40, 40))
    assert 2 * encoder.forward_flops(40) == counter.get_total_flops()


def test_the_bound_on_kept_numbers_is_at_least_twice_what_is_kept() -> None:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    encoder = resnet_nano(image_size=32)
    weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = encoder(torch.randn(8, 3, 32, 32))
    numbers = sum(size for place, size in kept.items() if place not in weights) / 4 / 8
    assert 2 * numbers <= encoder.most_numbers() <= 6 * numbers
    assert features.shape == (8, 128)


def test_what_it_cannot_take_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"depths=\(1, 1\): needs 4 numbers"):
        ResNet(block=BasicBlock, depths=(1, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"takes \[B, 3, H, W\]"):
        resnet_nano()(torch.zeros(2, 1, 8, 8))
