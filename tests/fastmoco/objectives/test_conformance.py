"""What every objective must do, whatever it learns: each entry of `OBJECTIVES` passes all of this.

A new objective is tested without a line here. What needs several processes is in
tests/distributed/test_conformance_ranks.py. The checks are functions of a config, for an objective
that is in no table.
"""

from __future__ import annotations

import copy
import functools
import math
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastmoco.checkpoint import list_checkpoints, load_latest
from fastmoco.config import Config, MoCoV3Config, ModelConfig, ObjectiveConfig
from fastmoco.distributed.mesh import World
from fastmoco.objectives.build import OBJECTIVES, build_objective
from fastmoco.objectives.chunk_graphs import ChunkGraphs
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.objectives.interface import Coupling, Objective, Output, Progress
from fastmoco.objectives.reference import plain_forward
from fastmoco.planning.costs import StepCosts, measure_costs
from fastmoco.planning.plan import chunked_bytes, whole_bytes
from fastmoco.recipes import quickstart_digits
from fastmoco.recipes.supervised import SupervisedConfig
from fastmoco.training import state as training_state
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines.spec import each_view
from tests.checkpoint_content import assert_same
from tests.distributed.run_trainer import CONFIG
from tests.fastmoco.training import test_rollback as rollback
from tests.fastmoco.training.test_step_guard import steps
from tests.fault_runs import assert_same_end
from tests.killed_runs import PLACES, start_and_end
from tests.real_peaks import RealPeaks
from tests.spikes import LOGGED, ROLLING, SPIKE, skip

KINDS = [pytest.param(kind, id=kind.kind) for kind in OBJECTIVES]
every_objective = pytest.mark.parametrize("kind", KINDS)
SMALL = replace(CONFIG.data.view1, size=16)
RESNET = replace(
    CONFIG,
    model=replace(CONFIG.model, architecture="resnet_nano", patch_size=16, image_size=16),
    data=replace(CONFIG.data, view1=SMALL, view2=SMALL),
)
SWIN_MODEL = {"architecture": "swin_nano", "patch_size": 16, "window": 2, "drop_path": 0.5}
SWIN = replace(CONFIG, model=replace(CONFIG.model, **SWIN_MODEL))  # type: ignore[arg-type]
"""Maps of 4 x 4 and 2 x 2 tokens: the windows of the first stage are shifted."""
CONVNEXT = replace(
    RESNET, model=replace(RESNET.model, architecture="convnextv2_micro", drop_path=0.3)
)
TRUNKS = {"vit": CONFIG, "resnet": RESNET, "swin": SWIN, "convnext": CONVNEXT}
every_trunk = pytest.mark.parametrize("base", TRUNKS.values(), ids=TRUNKS)
AT = Progress(3, 12, 4)
IMAGES = 13

ENCODER = [
    "blocks.*.attn.proj.bias",
    "blocks.*.attn.proj.weight",
    "blocks.*.attn.qkv.bias",
    "blocks.*.attn.qkv.weight",
    "blocks.*.mlp.fc1.bias",
    "blocks.*.mlp.fc1.weight",
    "blocks.*.mlp.fc2.bias",
    "blocks.*.mlp.fc2.weight",
    "blocks.*.norm1.bias",
    "blocks.*.norm1.weight",
    "blocks.*.norm2.bias",
    "blocks.*.norm2.weight",
    "cls_token",
    "norm.bias",
    "norm.weight",
    "patch_embed.proj.bias",
    "patch_embed.proj.weight",
    "pos_embed",
]
PROJECTOR = [
    "head.0.weight",
    "head.1.bias",
    "head.1.weight",
    "head.3.weight",
    "head.4.bias",
    "head.4.weight",
]
PROJECTOR += ["head.6.weight"]
PREDICTOR = ["0.weight", "1.bias", "1.weight", "3.weight"]
RESNET_ENCODER = [
    "bn1.bias",
    "bn1.weight",
    "conv1.weight",
    "layer*.bn1.bias",
    "layer*.bn1.weight",
    "layer*.bn2.bias",
    "layer*.bn2.weight",
    "layer*.conv1.weight",
    "layer*.conv2.weight",
    "layer*.downsample.0.weight",
    "layer*.downsample.1.bias",
    "layer*.downsample.1.weight",
]
SWIN_ENCODER = [
    f"layers.{stage}.{name}"
    for stage in (0, 1)
    for name in (*ENCODER[:12], "blocks.*.attn.relative_position_bias_table")
]
SWIN_ENCODER += [f"layers.0.downsample.{name}" for name in ("norm.bias", "norm.weight")]
SWIN_ENCODER += [f"patch_embed.{name}" for name in ("norm.bias", "norm.weight")]
SWIN_ENCODER += ["layers.0.downsample.reduction.weight", *ENCODER[13:17]]
CONVNEXT_ENCODER = [
    f"stages.{stage}.0.{layer}.{kind}"
    for stage in range(4)
    for layer in ("dwconv", "norm", "pwconv1", "pwconv2")
    for kind in ("weight", "bias")
]
CONVNEXT_ENCODER += [
    f"stages.{stage}.0.grn.{kind}" for stage in range(4) for kind in ("gamma", "beta")
]
CONVNEXT_ENCODER += [
    f"downsample_layers.{stage}.{layer}.{kind}"
    for stage in range(4)
    for layer in (0, 1)
    for kind in ("weight", "bias")
]
CONVNEXT_ENCODER += ["norm.bias", "norm.weight"]
NAMES: dict[str, dict[str, list[str]]] = {
    kind: {
        "encoder": ENCODER + PROJECTOR,
        "momentum_encoder": ENCODER + PROJECTOR,
        "predictor": PREDICTOR,
    }
    for kind in ("moco_v3", "byol")
}
NAMES["swav"] = {
    "encoder": ENCODER + [f"head.{name}" for name in ("0.bias", "3.bias", *PREDICTOR)],
    "prototypes": ["weight"],
}
RESNET_NAMES: dict[str, dict[str, list[str]]] = {
    kind: {
        "encoder": RESNET_ENCODER + [f"head.{name}" for name in head],
        "momentum_encoder": RESNET_ENCODER + [f"head.{name}" for name in head],
        "predictor": head,
    }
    for kind, head in (("moco_v3", PREDICTOR), ("byol", ["0.bias", *PREDICTOR]))
}
DINO_HEAD = [f"head.mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")]
DINO_HEAD += ["head.last_layer.weight_g", "head.last_layer.weight_v"]
for known, trunk in ((NAMES, ENCODER), (RESNET_NAMES, RESNET_ENCODER)):
    known["dino"] = dict.fromkeys(("encoder", "momentum_encoder"), trunk + DINO_HEAD)
REGION_HEAD = [name.removeprefix("head.") for name in DINO_HEAD]
NAMES["esvit"] = {**NAMES["dino"], "region_head": REGION_HEAD, "momentum_region_head": REGION_HEAD}
SIMSIAM_PREDICTOR = [*PREDICTOR, "3.bias"]
NAMES["simsiam"] = {"encoder": ENCODER + PROJECTOR, "predictor": SIMSIAM_PREDICTOR}
RESNET_NAMES["simsiam"] = {
    "encoder": RESNET_ENCODER + PROJECTOR + ["head.6.bias"],
    "predictor": SIMSIAM_PREDICTOR,
}
for names, trunk, head in (
    (NAMES, ENCODER, [name.removeprefix("head.") for name in PROJECTOR]),
    (RESNET_NAMES, RESNET_ENCODER, PREDICTOR),
):
    names["projector_momentum"] = {
        "encoder": trunk + [f"head.{name}" for name in head],
        "momentum_projector": head,
        "predictor": PREDICTOR,
    }
NAMES["sdssl"] = {
    **NAMES["moco_v3"],
    "projectors": [name.removeprefix("head.") for name in PROJECTOR],
}
NAMES["sdssl"]["predictors"] = NAMES["sdssl"].pop("predictor")
NAMES["simclr"] = {"encoder": ENCODER + PROJECTOR}
NAMES["moco"] = {
    network: ENCODER + [f"head.{name}" for name in ("0.bias", "0.weight", "2.bias", "2.weight")]
    for network in ("encoder", "momentum_encoder")
}
TRUNK_BLOCK = [name.removeprefix("blocks.*.") for name in ENCODER if name.startswith("blocks.")]
NAMES["mae"] = {
    "encoder": ENCODER,
    "decoder": [
        *(f"blocks.*.{name}" for name in TRUNK_BLOCK),
        *(f"{layer}.{kind}" for layer in ("embed", "norm", "pred") for kind in ("weight", "bias")),
        "mask_token",
        "pos_embed",
    ],
}
NAMES["supmae"] = {
    **NAMES["mae"],
    "class_head": [f"{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias")],
}
NAMES["cmae"] = {
    **dict.fromkeys(
        ("encoder", "momentum_encoder"),
        ENCODER + [f"head.{name}" for name in ("0.bias", *PREDICTOR)],
    ),
    **dict.fromkeys(("decoder", "feature_decoder"), NAMES["mae"]["decoder"]),
    "predictor": ["0.bias", *PREDICTOR],
}
NAMES["maskfeat"] = {
    "encoder": [*ENCODER, "mask_token"],
    "decoder": [f"{layer}.{kind}" for layer in ("norm", "pred") for kind in ("weight", "bias")],
}
NAMES["mp3"] = {
    "encoder": [name for name in ENCODER if name not in ("cls_token", "pos_embed")],
    "decoder": NAMES["maskfeat"]["decoder"],
}
NAMES["fcmae"] = {
    "encoder": CONVNEXT_ENCODER,
    "decoder": [
        "mask_token",
        *(f"{layer}.{kind}" for layer in ("proj", "pred") for kind in ("weight", "bias")),
        *(
            name.replace("stages.0.0.", "decoder.0.")
            for name in CONVNEXT_ENCODER
            if name.startswith("stages.0.0.")
        ),
    ],
}
CLASS_BLOCKS = [
    f"blocks_token.{number}.{name}"
    for number in (0, 1)
    for name in (*TRUNK_BLOCK, "gamma_1", "gamma_2")
]
LAYER_NORM_HEAD = [f"{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias")]
LAYER_NORM_PROJECTOR = [
    f"head.{name}" for name in (*LAYER_NORM_HEAD, "4.weight", "4.bias", "6.weight", "6.bias")
]
NAMES["extrema"] = {
    **dict.fromkeys(("encoder", "momentum_encoder"), ENCODER + CLASS_BLOCKS + LAYER_NORM_PROJECTOR),
    "predictor": LAYER_NORM_HEAD,
}
MOBY_HEAD = ["0.bias", *SIMSIAM_PREDICTOR]
NAMES["macrl"] = {
    **dict.fromkeys(
        ("encoder", "momentum_encoder"), ENCODER + [f"head.{name}" for name in MOBY_HEAD]
    ),
    "decoder": NAMES["mae"]["decoder"],
    "predictor": MOBY_HEAD,
}
for known, trunk in ((NAMES, ENCODER), (RESNET_NAMES, RESNET_ENCODER)):
    known["moby"] = {
        **dict.fromkeys(
            ("encoder", "momentum_encoder"), trunk + [f"head.{name}" for name in MOBY_HEAD]
        ),
        "predictor": MOBY_HEAD,
    }
NAMES["supervised"] = {"encoder": [*ENCODER, "head.bias", "head.weight"]}
SWIN_NAMES, CONVNEXT_NAMES = (
    {
        kind: {
            network: trunk + names[len(ENCODER) :] if "cls_token" in names else names
            for network, names in known.items()
        }
        for kind, known in NAMES.items()
    }
    for trunk in (SWIN_ENCODER, CONVNEXT_ENCODER)
)
"""Parameters of each network in a checkpoint, a block's number as *: an old checkpoint must load
for good."""


SETTINGS: dict[str, dict[str, Any]] = {
    "dino": {"prototypes": 128, "freeze_last_layer_epochs": 0.0},
    "esvit": {"prototypes": 128, "freeze_last_layer_epochs": 0.0},
    "supervised": {"classes": 5, "label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0},
    "mae": {"decoder_width": 32, "decoder_depth": 2, "decoder_heads": 4},
    "supmae": {"decoder_width": 32, "decoder_heads": 4, "classes": 5},
    "cmae": {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4},
    "macrl": {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4, "queue": 768},
    "fcmae": {"decoder_width": 16, "mask_ratio": 0.5},
    "maskfeat": {"cell": 2, "mask_ratio": 0.94},  # images differ in masked patches
    "moco": {"queue": 768, "batch_norm_groups": 4},
    "moby": {"queue": 768},
}
"""What an objective cannot have by default, or has to be tested with."""
MODELS: dict[str, dict[str, Any]] = {
    "mp3": {"positions": "none", "pooling": "norm_mean"},
    "extrema": {"pooling": "class_attention"},
}
"""What an objective asks of its ViT."""
ONLY_VIT = {"sdssl", "mae", "supmae", "cmae", "macrl", "maskfeat", "mp3", "extrema"}
"""Objectives that read every block of a ViT, or leave out tokens; on other trunks they are
refused."""
REGIONS = {"esvit"}
"""Objectives that compare tokens; a ResNet and a ConvNeXt V2 give none, and are refused."""
ONLY_CONVNEXT = {"fcmae"}
"""Objectives that hide patches from a ConvNeXt V2; other trunks are refused."""
OWN_MASKS = {"mae", "supmae", "cmae", "macrl", "maskfeat", "mp3", "extrema"}
"""Objectives that leave out tokens themselves; other rules for them are refused."""


def config_of(kind: type[ObjectiveConfig], base: Config = CONFIG) -> Config:
    """A small run of an objective with the numbers that it has by default, and its views."""
    if kind.kind in ONLY_VIT and base in (RESNET, SWIN, CONVNEXT):
        with pytest.raises(ValueError, match="must be a ViT"):
            build_objective(replace(base, objective=kind()), torch.device("cpu"))
        pytest.skip(f"{kind.kind} needs a ViT")
    if kind.kind in REGIONS and base in (RESNET, CONVNEXT):
        with pytest.raises(ValueError, match="must be a ViT or a Swin"):
            build_objective(replace(base, objective=kind()), torch.device("cpu"))
        pytest.skip(f"{kind.kind} needs tokens")
    if kind.kind in ONLY_CONVNEXT:
        base = on_convnext(kind, base)
    view2 = base.data.view2
    if _class_of(kind).view_count == 1:
        view2 = replace(view2, copies=0)
    return replace(
        base,
        model=replace(base.model, **MODELS.get(kind.kind, {})),
        objective=kind(**SETTINGS.get(kind.kind, {})),
        data=replace(base.data, view2=view2),
    )


def on_convnext(kind: type[ObjectiveConfig], base: Config) -> Config:
    """A run with a ConvNeXt V2 in place of its ViT, on images of four patches."""
    if base in (RESNET, SWIN):
        with pytest.raises(ValueError, match="must be a ConvNeXt V2"):
            build_objective(replace(base, objective=kind()), torch.device("cpu"))
    if base in (RESNET, SWIN, CONVNEXT):
        pytest.skip(f"{kind.kind} takes a ConvNeXt V2 in place of a ViT")
    trunk = {"architecture": "convnextv2_micro", "image_size": 32, "drop_path": 0.0}
    view1, view2 = (replace(view, size=32) for view in (base.data.view1, base.data.view2))
    model = ModelConfig(**trunk, hidden_dim=32, projection_dim=8)  # type: ignore[arg-type]
    return replace(base, model=model, data=replace(base.data, view1=view1, view2=view2))


def _class_of(kind: type[ObjectiveConfig]) -> type[Objective]:
    """The class of an objective."""
    found = OBJECTIVES[kind].__self__  # type: ignore[attr-defined]
    assert issubclass(found, Objective)
    return found


def rough(config: Config) -> Objective:
    """The objective of a config in float64, with averages apart from their weights and all buffers
    off their start."""
    objective = build_objective(replace(config, precision="fp64"), torch.device("cpu"))
    noise = torch.Generator().manual_seed(5)
    frozen_averages = {
        id(average) for own, average in objective.averages().items() if not own.requires_grad
    }
    averages = {id(average) for average in objective.averages().values()} - frozen_averages
    with torch.no_grad():
        for parameter in objective.parameters():
            if parameter.requires_grad or id(parameter) in averages:
                parameter.add_(
                    0.1 * torch.randn(parameter.shape, generator=noise, dtype=torch.float64)
                )
        for buffer in objective.buffers():
            if buffer.is_floating_point():
                buffer.add_(torch.rand(buffer.shape, generator=noise, dtype=torch.float64))
    return objective


def views_of(config: Config, images: int = IMAGES) -> tuple[Tensor, ...]:
    noise = torch.Generator().manual_seed(6)
    sides = [view.size for view in each_view(config.data.views)]
    return tuple(
        torch.randn(images, 3, side, side, generator=noise, dtype=torch.float64) for side in sides
    )


def rest_of(objective: Objective, images: int = IMAGES) -> dict[str, Any]:
    """What an objective takes of images beside their views."""
    if not objective.needs_labels:
        return {}
    return {"labels": torch.arange(images) * 7 % 5}


def gap(ours: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest number where that exceeds 1."""
    ours, other = ours.detach(), other.detach()
    return float((ours - other).abs().max() / max(1.0, float(other.abs().max())))


def require_equal(
    ours: tuple[Objective, Output], other: tuple[Objective, Output], tolerance: float
) -> None:
    """Loss, what telemetry sees, every gradient and every buffer."""
    assert gap(ours[1].loss, other[1].loss) <= tolerance
    assert ours[1].watch.keys() == other[1].watch.keys()
    for name, rows in ours[1].watch.items():
        if rows.shape == other[1].watch[name].shape:
            assert gap(rows, other[1].watch[name]) <= tolerance, name
            assert not rows.requires_grad, name
    for (name, mine), theirs in zip(ours[0].named_parameters(), other[0].parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if mine.grad is not None and theirs.grad is not None:
            assert gap(mine.grad, theirs.grad) <= tolerance, name
    for (name, mine), theirs in zip(ours[0].named_buffers(), other[0].buffers(), strict=True):
        assert gap(mine.double(), theirs.double()) <= tolerance, name


def check_reference(config: Config) -> None:
    fast, views = rough(config), views_of(config)
    plain = copy.deepcopy(fast)
    rest = {**rest_of(fast), "at": AT, "accuracy": True}
    outputs = fast(*views, **rest), plain_forward(plain, *views, **rest)
    for output in outputs:
        output.loss.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in fast.parameters())
    require_equal((fast, outputs[0]), (plain, outputs[1]), 1e-12)


def check_chunks(config: Config) -> None:
    objective, views = rough(config), views_of(config)
    whole = copy.deepcopy(objective)
    rest = {**rest_of(objective), "at": AT}
    output = whole(*views, **rest, accuracy=True)
    output.loss.backward()
    if objective.coupling is Coupling.TRUNK:
        with pytest.raises(ValueError, match=re.escape(objective.coupling_reason)):
            ChunkedStep(objective, chunk=4)
        return
    for how in ({"chunk": 4}, {"chunk": 5, "kept": 1}, {"chunk": 99}):
        ours = copy.deepcopy(objective)
        require_equal(
            (ours, ChunkedStep(ours, **how)(*views, **rest, accuracy=True)), (whole, output), 1e-12
        )
    if objective.coupling is Coupling.HEADS:
        # The second pass of a chunk computes no constants again.
        counted = copy.deepcopy(objective)
        with mock.patch.object(counted, "features", wraps=counted.features) as features:
            ChunkedStep(counted, chunk=5)(*views, **rest)
        wanted = [call.kwargs.get("target", True) for call in features.call_args_list]
        assert wanted == [True] * 3 + [False] * 3

        replayed, plain = copy.deepcopy(objective), copy.deepcopy(objective)
        graphs = ChunkGraphs(replayed, 4, capture=False)
        ours_output = ChunkedStep(replayed, chunk=4, graphs=graphs)(*views, **rest)
        require_equal(
            (replayed, ours_output), (plain, ChunkedStep(plain, chunk=4)(*views, **rest)), 0.0
        )


def check_features(config: Config) -> None:
    """The second pass of a chunk gives the online features of the first, writes nothing, and rows
    are images."""
    objective, views = rough(config), views_of(config)
    before = {name: tensor.clone() for name, tensor in objective.state_dict().items()}
    objective.choices(AT)
    inputs = objective.inputs(views, at=AT, **rest_of(objective))
    with torch.no_grad():
        first = objective.features(inputs, AT)
        second = objective.features(inputs, AT, target=False)
    assert second.target == ()
    assert all(torch.equal(a, b) for a, b in zip(first.online, second.online, strict=True))
    assert {len(rows) for rows in (*first.online, *first.target)} == {IMAGES}
    if objective.coupling is not Coupling.TRUNK:
        assert all(
            torch.equal(tensor, before[name]) for name, tensor in objective.state_dict().items()
        )


def check_names(config: Config, known: dict[str, list[str]] | None) -> None:
    objective = rough(config)
    networks, averages = objective.networks(), objective.averages()
    names = {
        n: {re.sub(r"\b(blocks\.|layer)[\d.]+\.", r"\1*.", p) for p, _ in net.named_parameters()}
        for n, net in networks.items()
    }
    if known is not None:
        assert names == {network: set(parameters) for network, parameters in known.items()}
    # All that trains has a gradient and a place of its own in the state; an average has the shape
    # of its weight.
    assert all(
        own.shape == average.shape and not average.requires_grad
        for own, average in averages.items()
    )
    places = objective.places()
    assert set(places) <= {name for name, p in objective.named_parameters() if p.requires_grad}
    assert {place for found in places.values() for place in found} >= {"first_block", "last_block"}
    assert objective.frozen(AT) <= {name for name, _ in objective.named_parameters()}
    assert objective.per_rank <= {name for name, _ in objective.named_buffers()}
    assert objective.encoder is not None


def check_skip(config: Config, out: Path) -> None:
    """Two poisoned steps of six leave the bits of a run that never took them."""
    fed, losses = steps(config, out / "fed", bad={2, 3}, fed=True)
    never, expected = steps(config, out / "never", bad={2, 3}, fed=False)
    assert losses == expected
    assert all(map(math.isfinite, losses))
    assert_same(fed, never)


def check_rollback(config: Config, out: Path) -> None:
    """A spike's steps are taken back."""
    never = Trainer.build(config, out / "never", World())
    try:
        skip(never, 25, LOGGED)
        expected = {
            n: t.clone()
            for n, t in training_state.collect(never.objective, never.optimizer).items()
        }
    finally:
        never.close()
    assert rollback.run(config, out / "run", SPIKE) == 0
    tensors, state = rollback.ending(out / "run")
    assert state["rollback"]["last"] == [LOGGED, 24]
    assert_same(tensors, expected)


def run_whole(config: Config, out: Path, *, trust: bool = False) -> None:
    trainer = Trainer.build(config, out, World(), trust=trust)
    try:
        assert trainer.run() == 0
    finally:
        trainer.close()


def check_resume(config: Config, out: Path) -> None:
    """Killed with -9 in three places and started again, a run ends in the bits of one that was
    never stopped."""
    assert start_and_end(config, out / "whole") == 0
    for place in PLACES:
        assert start_and_end(config, out / "killed", place) == -signal.SIGKILL, place
    assert start_and_end(config, out / "killed") == 0
    assert_same_end(out / "killed", out / "whole")

    # The end of a run says whether its averages have moved after the last step.
    end = load_latest(out / "whole" / "checkpoints")
    assert end is not None
    last = Progress(end.step - 1, end.step, 10**6, config.epochs)
    assert end.state["twin_advanced"] == (rough(config).ema_momentum(last) is not None)


def check_continued(config: Config, out: Path) -> None:
    """A run that continues from the middle of another one ends in its bits."""
    run_whole(config, out / "whole")
    middle = list_checkpoints(out / "whole" / "checkpoints")[0]
    shutil.copytree(middle, out / "again" / "checkpoints" / middle.name)
    run_whole(config, out / "again", trust=True)
    assert_same_end(out / "again", out / "whole")


@functools.cache
def costs_of(config: Config) -> StepCosts:
    return measure_costs(config, "fp32")


def check_peak(real_peaks: RealPeaks, config: Config, images: int, chunk: int) -> None:
    costs = costs_of(config)
    planned = chunked_bytes(costs, images, chunk, 0) if chunk else whole_bytes(costs, images)
    assert real_peaks.peak(config, images, chunk, 0) == pytest.approx(planned, rel=0.15)


def wide(kind: type[ObjectiveConfig]) -> Config:
    """Activations of a quarter of a gigabyte at 256 images."""
    base = config_of(kind, quickstart_digits())
    if kind.kind in ONLY_CONVNEXT:
        return replace(base, precision="fp32")
    model: dict[str, Any] = {"architecture": "vit_micro", "hidden_dim": 128, "projection_dim": 32}
    return replace(base, precision="fp32", model=replace(base.model, **model))


@every_trunk
@every_objective
def test_fast_is_the_reference(kind: type[ObjectiveConfig], base: Config) -> None:
    check_reference(config_of(kind, base))


@every_trunk
@every_objective
def test_chunks_are_the_whole_or_refused(kind: type[ObjectiveConfig], base: Config) -> None:
    check_chunks(config_of(kind, base))


@every_objective
def test_stochastic_depth_leaves_out_the_same_branches_in_every_pass(
    kind: type[ObjectiveConfig],
) -> None:
    plain = config_of(kind)
    config = replace(plain, model=replace(plain.model, drop_path=0.5))
    check_reference(config)
    check_chunks(config)

    # The draws reach the encoder, and are others in the next step; nothing is left out in
    # evaluation.
    def loss(config: Config, at: Progress, *, training: bool = True) -> Tensor:
        objective, views = rough(config), views_of(config)
        objective.train(training)
        return objective(*views, **rest_of(objective), at=at).loss.detach()

    later = Progress(AT.step + 1, AT.total_steps, AT.steps_per_epoch)
    assert len({float(loss(c, at)) for c, at in ((plain, AT), (config, AT), (config, later))}) == 3
    assert torch.equal(loss(config, AT, training=False), loss(plain, AT, training=False))


@every_objective
def test_tokens_are_dropped_alike_in_every_pass(kind: type[ObjectiveConfig]) -> None:
    """With stochastic depth, and in a phase with larger patches."""
    plain = config_of(kind)
    patch = plain.model.patch_size

    def having(**model: Any) -> Config:
        return replace(plain, model=replace(plain.model, **model))

    if kind.kind in ONLY_CONVNEXT:
        pytest.skip(f"the trunk of {kind.kind} has no tokens")
    if plain.objective.kind in OWN_MASKS:
        for name, value in (
            ("keep_tokens", "0.5"),
            ("patch_schedule", f"{2 * patch}@0,{patch}@0.5"),
        ):
            with pytest.raises(ValueError, match=rf"model\.{name}=.*by its own ratio"):
                build_objective(having(**{name: value}), torch.device("cpu"))
        pytest.skip(f"{plain.objective.kind} masks patches itself")

    dropping = having(keep_tokens="0.5", drop_path=0.5)
    for config in (dropping, having(patch_schedule=f"{2 * patch}@0,{patch}@0.5")):
        check_reference(config)
        check_chunks(config)

    # The encoder sees fewer tokens, others in the next step, and all in evaluation and at the end.
    def loss(config: Config, step: int, *, training: bool = True) -> float:
        objective, views = rough(config), views_of(config)
        objective.train(training)
        at = Progress(step, AT.total_steps, AT.steps_per_epoch)
        return float(objective(*views, **rest_of(objective), at=at).loss.detach())

    config = having(keep_tokens="0.5")
    assert len({loss(c, step) for c, step in ((plain, 3), (config, 3), (config, 4))}) == 3
    assert loss(config, 11) == loss(plain, 11)
    assert loss(config, 3, training=False) == loss(plain, 3, training=False)


@every_trunk
@every_objective
def test_a_second_pass_repeats_the_first(kind: type[ObjectiveConfig], base: Config) -> None:
    check_features(config_of(kind, base))


@every_trunk
@every_objective
def test_names_in_checkpoints_are_stable(kind: type[ObjectiveConfig], base: Config) -> None:
    others = {id(RESNET): RESNET_NAMES, id(SWIN): SWIN_NAMES, id(CONVNEXT): CONVNEXT_NAMES}
    known = others.get(id(base), NAMES)
    check_names(config_of(kind, base), known.get(kind.kind))


@every_objective
def test_a_skipped_step_leaves_no_trace(kind: type[ObjectiveConfig], tmp_path: Path) -> None:
    check_skip(config_of(kind), tmp_path)


@every_objective
def test_a_rollback_takes_steps_back(kind: type[ObjectiveConfig], tmp_path: Path) -> None:
    check_rollback(config_of(kind, ROLLING), tmp_path)


@every_objective
def test_a_killed_run_continues_to_the_same_bits(
    kind: type[ObjectiveConfig], tmp_path: Path
) -> None:
    check_resume(config_of(kind), tmp_path)


@every_objective
def test_a_run_of_a_resnet_continues_to_the_same_bits(
    kind: type[ObjectiveConfig], tmp_path: Path
) -> None:
    check_continued(config_of(kind, RESNET), tmp_path)


@every_objective
def test_the_planned_peak_is_the_measured_one(
    real_peaks: RealPeaks, kind: type[ObjectiveConfig]
) -> None:
    check_peak(real_peaks, wide(kind), 128, 0)


@pytest.mark.parametrize("kind", [MoCoV3Config, SupervisedConfig])
def test_the_planned_peak_of_chunks_is_the_measured_one(
    real_peaks: RealPeaks, kind: type[ObjectiveConfig]
) -> None:
    """Of those whose heads see the whole batch, and of those that go in chunks with their loss."""
    check_peak(real_peaks, wide(kind), 256, 64)


@every_objective
def test_the_loss_of_knowing_nothing_is_that_of_unrelated_features(
    kind: type[ObjectiveConfig],
) -> None:
    """Random weights and noise as images: no view is like another, in 512 dimensions."""
    config = config_of(kind)
    config = replace(config, model=replace(config.model, projection_dim=512, hidden_dim=256))
    objective = build_objective(config, torch.device("cpu"))
    value = objective.uninformed_loss(256)
    assert value is None or 0 < value < math.inf
    if value is None:
        return
    size = config.model.image_size
    torch.manual_seed(0)
    dtype = next(objective.parameters()).dtype
    views = [torch.randn(256, 3, size, size, dtype=dtype) for _ in range(objective.view_count or 2)]
    with torch.no_grad():
        # A queue is of features too, once it is full.
        for _ in range(3):
            loss = objective(*views, **rest_of(objective, 256)).loss.item()
            objective.after_step(None, AT)
    assert loss == pytest.approx(value, rel=0.15)
