"""Objectives with golden weights, shared by the tests of one process and of several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastmoco.distributed import BatchNorm
from fastmoco.models import VisionTransformer
from fastmoco.models.encoder import Coupling, Family, Parts
from fastmoco.objectives import MoCoV3

SIBLINGS = Path(__file__).parent / "golden" / "siblings"
Data = dict[str, np.ndarray]


def read_sibling(name: str) -> Data:
    """The arrays of a golden file of another method."""
    with np.load(SIBLINGS / f"{name}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def read_sibling_b(name: str) -> Data:
    """The arrays of a golden file of the second set."""
    with np.load(SIBLINGS.with_name("siblings_b") / f"{name}.npz", allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def sibling_vit(data: Data) -> Callable[[], VisionTransformer]:
    """What builds the ViT of `vit/` of such a file."""
    _, size, patch, width, depth, heads, _, _ = data["vit/cfg"].tolist()
    return partial(
        VisionTransformer,
        image_size=size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
    )


def error(ours: Tensor, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest number; absolute where all are rounding noise."""
    largest = np.abs(expected).max()
    return float(
        np.abs(ours.double().numpy() - expected).max() / (largest if largest > 1e-12 else 1.0)
    )


@dataclass(frozen=True)
class Gates:
    """Largest errors of a trace of three steps, relative to the largest entry of an array.

    The float32 ones are three times what a second implementation had. Under AdamW they leave out
    what has no true gradient: noise moves it by up to the learning rate.

    Args:
        loss: of the losses.
        parameter: of parameters, buffers and what is named in `found`; None: not compared.
        gradient: of the first gradients.
    """

    loss: float = 1e-7
    parameter: float | None = 1e-7
    gradient: float = 1e-7
    adamw_noise: bool = False
    """Whether to leave out what only noise moves under AdamW."""


FLOAT64 = Gates()


def same_trace(
    found: dict[str, Any],
    data: Data,
    prefix: str,
    our_name: Callable[[str], str],
    gates: Gates = FLOAT64,
) -> None:
    """Everything that a golden file has of three steps.

    Args:
        found: "losses", "gradients" of the first step and "states" after each one, by our names;
            what else the file has of step 0 ("p1", "z2") by its name.
        data: the file.
        prefix: of the trace.
        our_name: from a name in the file.
        gates: the largest errors.
    """
    assert error(torch.stack(found["losses"]), data[f"{prefix}loss"]) <= gates.loss

    # Exactly the trained parameters have a gradient.
    start = f"{prefix}step0/grad/"
    names = {our_name(key[len(start) :]): key for key in data if key.startswith(start)}
    assert names.keys() == found["gradients"].keys()
    for name, key in names.items():
        wider = 3 if name.endswith("qkv.bias") and gates.adamw_noise else 1
        assert error(found["gradients"][name], data[key]) <= wider * gates.gradient, key

    # What step 0 computed, and the state after each step.
    if gates.parameter is None:
        return
    for key in (key for key in data if key.startswith(f"{prefix}step0/") and key.count("/") < 3):
        name = key.rpartition("/")[2]
        if name in found:
            assert error(found[name], data[key]) <= gates.parameter, key
    compared = 0
    for step, state in zip(("step0", "step1", "final"), found["states"], strict=True):
        for kind in ("param", "buf"):
            start = f"{prefix}{step}/{kind}/"
            for key in (key for key in data if key.startswith(start)):
                name = our_name(key[len(start) :])
                ours, expected = state[name].double(), data[key]
                if gates.adamw_noise and name.endswith(NOISE):
                    continue
                if gates.adamw_noise and name.endswith("qkv.bias"):  # the third of the keys
                    parts = ours.chunk(3)
                    first, _, last = np.split(expected, 3)
                    ours, expected = torch.cat([parts[0], parts[2]]), np.concatenate([first, last])
                assert error(ours, expected) <= gates.parameter, key
                compared += 1
    assert compared > 25


NOISE = ("encoder.norm.bias", "head.1.running_mean", "momentum_projector.1.running_mean")
"""Without a true gradient where a batch norm follows, and the running mean behind it."""


class ConvTrunk(nn.Module):
    """The stand-in for a ResNet of the golden files: an encoder whose batch norms couple images."""

    family: Family = "resnet"
    coupling = Coupling.TRUNK
    coupling_reason = "its trunk has batch norms"

    def __init__(self, width1: int, width2: int) -> None:
        super().__init__()
        self.embed_dim = width2
        self.conv1 = nn.Conv2d(3, width1, 3, stride=2, padding=1, bias=False)
        self.bn1 = BatchNorm(width1)
        self.conv2 = nn.Conv2d(width1, width2, 3, stride=2, padding=1, bias=False)
        self.bn2 = BatchNorm(width2)
        self.head: nn.Module = nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(images)).relu())).relu().mean((2, 3))

    plain = forward

    def parts(self) -> Parts:
        return Parts(stem={"conv1": self.conv1}, heads={"head": self.head})


def our_name(golden_name: str) -> str:
    """Golden files call the query side base_encoder, and the projector of a ResNet fc."""
    name = golden_name.removeprefix("base_" if golden_name.startswith("base_encoder.") else "")
    return name.replace("encoder.fc.", "encoder.head.")


def build_golden(data: dict[str, np.ndarray]) -> MoCoV3:
    """The float64 objective of step.npz or trace.npz; without a stored momentum
    encoder it is the encoder's copy.
    """
    image_size, patch_size, embed_dim, depth, num_heads, hidden_dim, projection_dim = data[
        "cfg"
    ].tolist()
    build = partial(
        VisionTransformer,
        image_size=image_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
    )
    objective = MoCoV3(
        build, projection_dim=projection_dim, hidden_dim=hidden_dim, temperature=float(data["T"])
    ).double()
    weights = {
        our_name(k[5:]): torch.from_numpy(v) for k, v in data.items() if k.startswith("init/")
    }
    if not any(name.startswith("momentum_encoder.") for name in weights):
        weights |= {f"momentum_{n}": v for n, v in weights.items() if n.startswith("encoder.")}
    missing, unexpected = objective.load_state_dict(weights, strict=False)
    assert missing == ["encoder.pos_embed", "momentum_encoder.pos_embed"]
    assert unexpected == []
    return objective


def rough_objective(*, stem: str = "patch", freeze: bool = True, depth: int = 2) -> MoCoV3:
    """A small float64 objective, encoders apart, with every norm, bias and
    running average off its starting value.
    """
    build = partial(
        VisionTransformer,
        image_size=32 if stem == "conv" else 16,
        patch_size=16 if stem == "conv" else 4,
        embed_dim=32,
        depth=depth,
        num_heads=4,
        stem=stem,
        freeze_patch_embed=freeze,
    )
    objective = MoCoV3(build, projection_dim=12, hidden_dim=40).double()
    move_apart_(objective, 0.1)
    with torch.no_grad():
        for name, buffer in objective.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))
    return objective


def move_apart_(objective: MoCoV3, scale: float) -> None:
    """Add normal noise to all parameters of both encoders and the predictor, but for frozen stems,
    which stay equal."""
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            if "pos_embed" not in name and (parameter.requires_grad or "patch_embed" not in name):
                parameter.add_(torch.randn_like(parameter) * scale)


def random_views(objective: MoCoV3, batch: int = 6) -> tuple[Tensor, Tensor]:
    """Two float64 views of the size the objective takes."""
    side = objective.encoder.image_size
    view1, view2 = torch.randn(2, batch, 3, side, side, dtype=torch.float64).unbind()
    return view1, view2


def features_of(encoder: VisionTransformer, views: tuple[Tensor, Tensor]) -> Tensor:
    """[2, B, E] class features of two views by one encoder."""
    return encoder.encode(encoder.patch_tokens(torch.cat(views))).view(2, len(views[0]), -1)


def train_step(
    objective: MoCoV3,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor],
    *,
    lr: float,
    ema_momentum: float,
    forward: torch.nn.Module | None = None,
) -> Tensor:
    """One step in the order of the method, through `forward` if it is a
    wrapper; returns the loss.
    """
    optimizer.param_groups[0]["lr"] = lr
    objective.update_momentum_encoder(ema_momentum)
    loss: Tensor = (forward or objective)(*batch).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()
