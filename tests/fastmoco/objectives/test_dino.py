"""DINO against golden numbers: loss and centre on one and several ranks, heads, schedules, clipping
and three steps with small crops. Two real ranks: tests/distributed/test_siblings_ranks.py.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from fastmoco.checkpoint import CheckpointError
from fastmoco.config import Config, ObjectiveConfig, OptimConfig
from fastmoco.config.serial import from_json, to_json
from fastmoco.distributed import World, parallelize
from fastmoco.models import VisionTransformer
from fastmoco.models.encoder import Coupling
from fastmoco.models.encoder_file import load_encoder
from fastmoco.objectives import dino
from fastmoco.objectives.build import OBJECTIVES, build_model, build_objective
from fastmoco.objectives.chunked import ChunkedStep
from fastmoco.objectives.dino import DINO, DINOHead, HeadRows, scores
from fastmoco.objectives.interface import Features, Objective, Progress
from fastmoco.optim import build_adamw, learning_rate
from fastmoco.optim.averaged import FusedAdamW
from fastmoco.optim.clipping import clip_each_
from fastmoco.optim.groups import set_weight_decays, split_groups
from fastmoco.optim.schedule import ema_momentum, weight_decay
from fastmoco.recipes import get_recipe
from fastmoco.recipes.dino import DINOConfig, InitialWeights
from fastmoco.recipes.swav import SwAVConfig
from fastmoco.run.folder import RunFolder
from fastmoco.training.encoder_source import load_source
from fastmoco.training.load_run import load_run
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines.spec import each_view
from tests.command_line import main
from tests.distributed.run_trainer import CONFIG
from tests.distributed.thread_ranks import ThreadRanks
from tests.fastmoco.objectives import test_conformance as conformance
from tests.golden_objective import Data, error, read_sibling


@pytest.fixture(scope="module")
def data() -> Data:
    return read()


def read() -> Data:
    return read_sibling("dino")


def with_crops(**numbers: Any) -> Config:
    """A small run with two small crops, stochastic depth and learned positions."""
    own = DINOConfig(prototypes=24, freeze_last_layer_epochs=0, **numbers)
    small = replace(CONFIG.data.view1, size=4, copies=2)
    model = replace(CONFIG.model, positions="learned", freeze_patch_embed=False, drop_path=0.1)
    optim = replace(CONFIG.optim, final_weight_decay=0.4, clip_tensor_norm=0.05)
    return replace(
        CONFIG,
        objective=own,
        model=model,
        optim=optim,
        data=replace(CONFIG.data, more_views=(small,)),
    )


class Outputs(nn.Module):
    """A head whose outputs are its rows."""

    def forward(self, rows: Tensor) -> HeadRows:
        return HeadRows(rows, torch.eye(rows.shape[-1], dtype=rows.dtype), rows)


class Rows(nn.Linear):
    """An encoder for features that are given."""

    family = "vit"
    coupling = Coupling.NONE
    coupling_reason = ""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.embed_dim = width
        self.head: nn.Module = nn.Identity()


def on_outputs(data: Data, case: str, outputs: int) -> DINO:
    """The objective of a case, which takes outputs of the heads in place of features."""
    start, final, warmup, _ = data[f"{case}temp_cfg"].tolist()
    objective = DINO(
        partial(Rows, outputs),
        projection_dim=2,
        hidden_dim=2,
        prototypes=outputs,
        teacher_temperature=final,
        teacher_temperature_start=start,
        teacher_warmup_epochs=int(warmup),
        center_momentum=float(data[f"{case}center_momentum"]),
    ).double()
    for encoder in (objective.encoder, objective.momentum_encoder):
        encoder.head = Outputs()
    objective.center.copy_(torch.from_numpy(data[f"{case}center0"]))
    return objective


def epochs_of(
    objective: DINO, student: Tensor, teacher: Tensor, views: int, *, chunk: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, gradient and centre of one call in each epoch; arrays [epochs, views * B, K]."""
    found = []
    for epoch, (s, t) in enumerate(zip(student, teacher, strict=True)):
        at = Progress(epoch * 3 + 1, 1000, 3)
        online = s.double().unflatten(0, (views, -1)).transpose(0, 1).contiguous().requires_grad_()
        target = t.double().unflatten(0, (2, -1)).transpose(0, 1)
        objective.before_step(at)
        rows = [slice(None)]
        if chunk:
            rows = [slice(i, i + chunk) for i in range(0, len(online), chunk)]
        losses = []
        for part in rows:
            loss = objective.compare(Features((online[part],), (target[part],)), at).loss
            losses.append(loss * len(online[part]) / len(online))
        total = torch.stack(losses).sum()
        total.backward()
        objective.after_step(torch.zeros(()), at)
        assert online.grad is not None
        gradient = online.grad.transpose(0, 1).flatten(0, 1)
        found.append((total.detach(), gradient, objective.center.clone()))
    losses, gradients, centers = (torch.stack(part) for part in zip(*found, strict=True))
    return losses, gradients, centers


@pytest.mark.parametrize("chunk", [0, 2])
def test_loss_gradient_and_centre_match_golden(data: Data, chunk: int) -> None:
    for i in range(int(data["num_cases"])):
        case = f"c{i}_"
        _, views, outputs = data[f"{case}cfg"].tolist()
        student, teacher = (torch.from_numpy(data[case + name]) for name in ("student", "teacher"))
        found = epochs_of(on_outputs(data, case, outputs), student, teacher, views, chunk=chunk)
        for ours, name in zip(found, ("loss", "ds", "center"), strict=True):
            assert error(ours, data[case + name]) <= 1e-7, (i, name)


def test_loss_gradient_and_centre_of_several_ranks_match_golden(data: Data) -> None:
    ranks = ThreadRanks(int(data["mr_cfg"][0]))
    with (
        mock.patch.object(dino, "total", ranks.total),
        mock.patch.object(dino, "group_size", ranks.size),
    ):
        check_ranks(ranks.run(partial(on_rank, data)), data)


def on_rank(data: Data, rank: int) -> tuple[Tensor, ...]:
    """Losses, gradients and centres of a rank of the file that was made on several."""
    _, _, views, outputs = data["mr_cfg"].tolist()
    student, teacher = (
        torch.from_numpy(data[f"mr_{name}"][:, rank]) for name in ("student", "teacher")
    )
    return epochs_of(on_outputs(data, "mr_", outputs), student, teacher, views)


def check_ranks(found: list[tuple[Tensor, ...]], data: Data) -> None:
    for number, (losses, gradients, centers) in enumerate(found):
        assert error(losses, data["mr_loss"][:, number]) <= 1e-7
        assert error(gradients, data["mr_ds"][:, number]) <= 1e-7
        assert error(centers, data["mr_center"]) <= 1e-7


@pytest.mark.parametrize("case", [0, 1])
def test_heads_match_golden(data: Data, case: int) -> None:
    start = f"head{case}_"
    weights = {
        key.removeprefix(f"{start}sd/"): torch.from_numpy(value).double()
        for key, value in data.items()
        if key.startswith(f"{start}sd/")
    }
    hidden, width = weights["mlp.0.weight"].shape
    outputs, projection = weights["last_layer.weight_v"].shape
    head = DINOHead(width, hidden, projection, outputs, train_norm=bool(case)).double()
    head.load_state_dict(weights)
    x, w = (torch.from_numpy(data[start + name]).double() for name in ("x", "w"))
    x.requires_grad_()
    found = head(x)
    y = scores(found.unit, found.weight)
    (y * w).sum().backward()
    assert error(y.detach(), data[f"{start}y"]) <= 1e-9
    assert found.projected.shape == (len(x), projection)
    assert x.grad is not None
    assert error(x.grad, data[f"{start}dx"]) <= 1e-7
    gradients = {name for name, p in head.named_parameters() if p.grad is not None}
    assert gradients == {k.partition("grad/")[2] for k in data if k.startswith(f"{start}grad/")}
    for name, parameter in head.named_parameters():
        if parameter.grad is not None:
            assert error(parameter.grad, data[f"{start}grad/{name}"]) <= 1e-7, name


def test_schedules_and_temperatures_match_golden(data: Data) -> None:
    for i in range(int(data["num_schedules"])):
        base, final, epochs, steps, warmup, start = data[f"s{i}_cfg"].tolist()
        total = int(epochs * steps)
        for step, expected in enumerate(data[f"s{i}_values"].tolist()):
            rate = learning_rate(
                step,
                peak=base,
                epochs=epochs,
                warmup_epochs=warmup,
                steps_per_epoch=int(steps),
                schedule="cosine_inclusive",
                warmup_lr=start,
                final_lr=final,
            )
            found = [rate]
            if not warmup:
                found.append(weight_decay(step, first=base, last=final, total=total))
            if final == 1:
                found.append(
                    ema_momentum(step, start=base, epochs=epochs, steps_per_epoch=int(steps))
                )
            assert found == pytest.approx([expected] * len(found), rel=1e-12, abs=1e-15)
    for i in range(int(data["num_temps"])):
        start, final, warmup, epochs = data[f"t{i}_cfg"].tolist()
        objective = DINO(
            partial(Rows, 2),
            projection_dim=2,
            hidden_dim=2,
            prototypes=2,
            teacher_temperature=final,
            teacher_temperature_start=start,
            teacher_warmup_epochs=int(warmup),
        )
        for step in range(0, int(epochs) * 4, 3):
            expected = data[f"t{i}_values"][step // 4]
            at = Progress(step, int(epochs) * 4, 4)
            assert objective.teacher_temperature(at) == pytest.approx(expected, rel=1e-12)
            assert objective.schedules(at)["teacher_temperature"] == pytest.approx(expected)


def test_clipping_of_each_tensor_matches_golden(data: Data) -> None:
    names = sorted(key for key in data if key.startswith("clip_in/"))
    gradients = [torch.from_numpy(data[name]).double() for name in names]
    clip_each_(gradients, float(data["clip_max"]))
    for ours, name in zip(gradients, names, strict=True):
        assert error(ours, data[name.replace("_in", "_out")]) <= 1e-12, name


def our_name(golden_name: str) -> str:
    network = {"student": "encoder", "teacher": "momentum_encoder"}
    name = golden_name.replace("backbone.", "")
    first, _, rest = name.partition(".")
    return f"{network[first]}.{rest}" if first in network else f"encoder.{name}"


def build_golden(data: Data) -> tuple[DINO, FusedAdamW]:
    """The objective and the optimizer of `tr/`."""
    _, size, _, _, patch, width, depth, heads, hidden, projection, outputs = data["tr/cfg"].tolist()
    build = partial(
        VisionTransformer,
        image_size=size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        positions="learned",
        freeze_patch_embed=False,
    )
    objective = DINO(
        build,
        projection_dim=projection,
        hidden_dim=hidden,
        prototypes=outputs,
        train_last_norm=bool(data["tr/train_g"]),
        freeze_last_layer_epochs=float(data["tr/freeze_last_layer_epochs"]),
        teacher_temperature_start=float(data["tr/teacher_temp"][0]),
        teacher_temperature=float(data["tr/teacher_temp"][-1]),
        teacher_warmup_epochs=len(data["tr/teacher_temp"]),
    ).double()
    start = "tr/init/"
    weights = {
        our_name(k.removeprefix(start)) if k != "tr/init/center" else "center": torch.from_numpy(v)
        for k, v in data.items()
        if k.startswith(start)
    }
    objective.load_state_dict(weights)
    adamw = build_adamw(objective.named_parameters(), lr=0.0, weight_decay=1.0)
    split_groups(adamw, list(objective.named_parameters()), objective.parameter_group)
    return objective, FusedAdamW(adamw, objective.averages())


def run(data: Data, world: World, *, chunk: int = 0, strategy: str = "ddp") -> dict[str, Any]:
    """Three steps on this rank's part of the batch."""
    objective, optimizer = build_golden(data)
    if chunk:
        forward: Any = None
    else:
        forward = parallelize(objective, world, strategy=strategy)  # type: ignore[arg-type]
    if strategy != "ddp" and world.world_size > 1:
        adamw = build_adamw(objective.named_parameters(), lr=0.0, weight_decay=1.0)
        split_groups(adamw, list(objective.named_parameters()), objective.parameter_group)
        optimizer = FusedAdamW(adamw, objective.averages())
    named = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    crops = sum(key.startswith("tr/x0_") for key in data)
    found: dict[str, Any] = {"losses": [], "states": [], "centers": []}

    def whole(tensor: Tensor) -> Tensor:
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        return full.detach().clone()

    for step in range(len(data["tr/lr"])):
        at = Progress(step, len(data["tr/lr"]), 1)
        views = [torch.from_numpy(data[f"tr/x{step}_{v}"]).double() for v in range(crops)]
        views = [view.chunk(world.world_size)[world.rank] for view in views]
        objective.zero_grad(set_to_none=True)
        objective.before_step(at)
        if chunk:
            loss = ChunkedStep(objective, chunk=chunk)(*views, at=at).loss
        else:
            loss = forward(*views, at=at).loss
            loss.backward()
        if step == 0:
            found["gradients"] = {n: whole(p.grad) for n, p in named.items()}
        clip_each_([p.grad for p in named.values()], float(data["tr/clip"]))
        if step == 0:
            found["clipped"] = {n: whole(p.grad) for n, p in named.items()}
        for name in objective.frozen(at) & named.keys():
            named[name].grad = None
        for group in optimizer.param_groups:
            group["lr"] = float(data["tr/lr"][step])
        set_weight_decays(optimizer.param_groups, float(data["tr/wd"][step]))
        assert objective.teacher_temperature(at) == pytest.approx(data["tr/teacher_temp"][step])
        optimizer.step(ema_momentum=float(data["tr/m"][step]), skip=torch.zeros(()))
        objective.after_step(torch.zeros(()), at)
        found["losses"].append(loss.detach())
        found["centers"].append(objective.center.clone())
        found["states"].append({n: whole(t) for n, t in objective.state_dict().items()})
    return found


def check_trace(found: dict[str, Any], data: Data) -> None:
    """Everything that the file holds of three steps."""
    assert error(torch.stack(found["losses"]), data["tr/loss"]) <= 1e-7
    assert error(torch.stack(found["centers"]), data["tr/center"]) <= 1e-7
    for key, kind in (("grad", "gradients"), ("clipped", "clipped")):
        start = f"tr/step0/{key}/"
        names = [name for name in data if name.startswith(start)]
        assert len(names) == len(found[kind])
        for name in names:
            ours = found[kind][our_name(name.removeprefix(start))]
            assert error(ours, data[name]) <= 1e-7, name
    compared = 0
    for place, state in (("step0", 0), ("step1", 1), ("final", -1)):
        start = f"tr/{place}/param/"
        for name in (name for name in data if name.startswith(start)):
            ours = found["states"][state][our_name(name.removeprefix(start))]
            assert error(ours, data[name]) <= 1e-7, name
            compared += 1
    assert compared > 100


@pytest.mark.parametrize("chunk", [0, 4])
def test_trace_matches_golden(data: Data, chunk: int) -> None:
    check_trace(run(data, World(), chunk=chunk), data)


def test_decayed_parameters_are_those_of_the_file(data: Data) -> None:
    objective, optimizer = build_golden(data)
    names = {id(p): name for name, p in objective.named_parameters()}
    found = {
        bool(group["weight_decay_scale"]): {names[id(p)] for p in group["params"]}
        for group in optimizer.param_groups
    }
    assert found[True] == {our_name(name) for name in data["tr/decayed"].tolist()}
    assert found[False] == {our_name(name) for name in data["tr/not_decayed"].tolist()}


def test_small_crops_pass_the_suite_of_every_objective(tmp_path: Path) -> None:
    config = with_crops(teacher_warmup_epochs=3, teacher_temperature=0.07)
    conformance.check_reference(config)
    conformance.check_chunks(config)
    conformance.check_features(config)
    conformance.check_skip(config, tmp_path / "skip")


def test_norms_in_the_head_pass_the_suite_of_every_objective(tmp_path: Path) -> None:
    config = with_crops(head_norm=True)
    assert conformance.rough(config).coupling is Coupling.HEADS
    conformance.check_reference(config)
    conformance.check_chunks(config)
    conformance.check_features(config)
    conformance.check_skip(config, tmp_path / "skip")


def test_norms_of_the_head_take_the_rows_of_all_crops_together() -> None:
    """The layers of the official option, under its names, in torch's own modules."""
    head = DINOHead(6, 10, 4, 8, norm=True).double()
    plain = nn.Sequential(
        nn.Linear(6, 10),
        nn.BatchNorm1d(10),
        nn.GELU(),
        nn.Linear(10, 10),
        nn.BatchNorm1d(10),
        nn.GELU(),
        nn.Linear(10, 4),
    ).double()
    plain.load_state_dict(head.mlp.state_dict())
    rows = torch.randn(3, 5, 6, dtype=torch.float64)
    rows[2] += 1  # one crop has another mean
    torch.testing.assert_close(
        head(rows).projected.flatten(0, 1), plain(rows.flatten(0, 1)), rtol=1e-10, atol=1e-12
    )
    for name, running in plain.state_dict().items():
        torch.testing.assert_close(head.mlp.state_dict()[name], running)


def test_the_centre_of_chunks_is_that_of_the_whole() -> None:
    config = with_crops()
    views, at = conformance.views_of(config), conformance.AT
    centers = []
    for chunk in (0, 4, 5):
        objective = conformance.rough(config)
        objective.before_step(at)
        if chunk:
            ChunkedStep(objective, chunk=chunk)(*views, at=at)
        else:
            objective(*views, at=at)
        objective.after_step(None, at)
        centers.append(objective.center.clone())
    for center in centers[1:]:
        torch.testing.assert_close(center, centers[0], rtol=1e-12, atol=1e-12)


def test_a_run_is_evaluated_and_exported_by_its_momentum_encoder(tmp_path: Path) -> None:
    """In the run, from its checkpoint, from its file; weights and centre are saved."""
    config = replace(with_crops(ema_momentum=0.5), precision="fp32")
    trainer = Trainer.build(config, tmp_path / "run", World())
    try:
        assert trainer.objective.evaluation_encoder is trainer.objective.momentum_encoder
        assert trainer.run() == 0
        trained = trainer.objective
    finally:
        trainer.close()
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        wanted, other = (
            encoder.eval()(images) for encoder in (trained.momentum_encoder, trained.encoder)
        )
    assert not torch.allclose(wanted, other, atol=1e-4)

    loaded = load_run(tmp_path / "run")[0]
    torch.testing.assert_close(loaded.center, trained.center)
    assert loaded.center.abs().max() > 0
    source = load_source(tmp_path / "run")
    source.encoder.eval()
    assert source.facts["encoder"] == "momentum"
    assert load_source(tmp_path / "run", which="base").facts["encoder"] == "base"
    file, words = tmp_path / "encoder.safetensors", ["checkpoint", "consolidate"]
    words.append(str(tmp_path / "run"))
    assert main([*words, "--out", str(file), "--encoder"]) == 0
    assert load_source(file).facts["encoder"] == "momentum"
    with pytest.raises(CheckpointError, match="is a momentum encoder; leave out --which base"):
        load_source(file, which="base")
    state = tmp_path / "state.safetensors"
    assert main([*words, "--out", str(state)]) == 0
    heads = trained.encoder.blocks[0].attn.num_heads
    of_state = load_source(state, heads=heads)
    assert of_state.facts["encoder"] == "momentum"
    assert load_source(state, which="base", heads=heads).facts["encoder"] == "base"
    with torch.no_grad():
        for encoder in (source.encoder, load_encoder(file).encoder, of_state.encoder.eval()):
            torch.testing.assert_close(encoder(images), wanted)


def test_every_objective_names_the_encoder_of_its_config() -> None:
    for kind, build in OBJECTIVES.items():
        objective = build.__self__  # type: ignore[attr-defined]
        assert issubclass(objective, Objective)
        assert objective.evaluated == kind.evaluated


def test_what_is_logged_shows_a_collapse() -> None:
    config = with_crops()
    objective = conformance.rough(config)
    watch = objective(*conformance.views_of(config), accuracy=True).watch
    assert 0 < watch["target_entropy"] < math.log(24)
    assert watch["target_divergence"] >= 0
    torch.testing.assert_close(watch["center_norm"], objective.center.norm())
    assert objective.uninformed_loss(16) == math.log(24)

    # Equal outputs: targets have no information, and predictions are the targets.
    for encoder in (objective.encoder, objective.momentum_encoder):
        nn.init.zeros_(encoder.head.last_layer.weight_g)
    objective.center.zero_()
    output = objective(*conformance.views_of(config), accuracy=True)
    assert output.loss.item() == pytest.approx(math.log(24))
    assert output.watch["target_entropy"].item() == pytest.approx(math.log(24))
    assert output.watch["target_divergence"].item() == pytest.approx(0, abs=1e-9)


def test_the_last_layer_waits_for_whole_epochs() -> None:
    objective = conformance.rough(replace(CONFIG, objective=DINOConfig(prototypes=24)))
    names = {"encoder.head.last_layer.weight_g", "encoder.head.last_layer.weight_v"}
    assert objective.frozen(Progress(3, 40, 4)) == names
    assert objective.frozen(Progress(4, 40, 4)) == frozenset()


def test_a_view_alone_is_refused() -> None:
    objective = conformance.rough(with_crops())
    with pytest.raises(ValueError, match="views: 1 of them; this objective compares at least 2"):
        objective(torch.zeros(2, 3, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("small", [0, 1])
@pytest.mark.parametrize("own", [DINOConfig(prototypes=8), SwAVConfig(prototypes=8)])
def test_a_config_with_one_large_view_is_refused(own: ObjectiveConfig, small: int) -> None:
    config = replace(with_crops(), objective=own)
    data = config.data
    few = replace(data, view2=replace(data.view2, copies=0), more_views=data.more_views[:small])
    with pytest.raises(ValueError, match=r"data: 1 of the first 2 views .*; set data.view2.copies"):
        build_objective(replace(config, data=few), torch.device("cpu"))


def test_recipes_carry_the_official_numbers_and_travel_through_json() -> None:
    short, long = get_recipe("dino_vit_s16_e100_b512"), get_recipe("dino_vit_s16_e300_b1024")
    for config in (short, long):
        assert from_json(to_json(config)) == config
        assert config.peak_lr == pytest.approx(5e-4 * config.global_batch_size / 256)
        optim, model = config.optim, config.model
        assert (optim.weight_decay, optim.final_weight_decay) == (0.04, 0.4)
        assert (optim.warmup_epochs, optim.final_lr, optim.clip_tensor_norm) == (10, 1e-6, 3.0)
        assert (model.positions, model.freeze_patch_embed, model.drop_path) == (
            "learned",
            False,
            0.1,
        )
        sizes = [(v.size, v.interpolation) for v in each_view(config.data.views)]
        assert sizes == [(224, "bicubic")] * 2 + [(96, "bicubic")] * 8
    with torch.device("meta"):
        objective = build_model(replace(short, model=replace(short.model, drop_path=0.0)))
    assert objective.encoder.blocks[0].attn.num_heads == 6
    assert objective.encoder.head.last_layer.weight_v.shape == (65536, 256)
    assert not objective.encoder.head.last_layer.weight_g.requires_grad
    assert isinstance(long.objective, DINOConfig)
    assert (long.objective.teacher_temperature, long.objective.teacher_warmup_epochs) == (0.07, 30)
    assert long.objective.train_last_norm


@pytest.mark.parametrize("initial", ["dino", "xavier"])
def test_initial_weights_are_those_that_are_asked_for(initial: InitialWeights) -> None:
    model = replace(CONFIG.model, positions="learned", freeze_patch_embed=False)
    own = DINOConfig(prototypes=24, initial_weights=initial)
    objective = build_objective(replace(CONFIG, model=model, objective=own), torch.device("cpu"))
    weights = dict(objective.named_parameters())
    spread = {
        "encoder.blocks.0.mlp.fc1.weight": math.sqrt(2 / (64 + 256)),
        "encoder.head.mlp.2.weight": math.sqrt(2 / (32 + 32)),
        "encoder.pos_embed": 0.02,
    }
    for name, xavier in spread.items():
        wanted = 0.02 if initial == "dino" else xavier
        assert weights[name].std().item() == pytest.approx(wanted, rel=0.1), name
    for own_weight, average in objective.averages().items():
        assert torch.equal(own_weight, average)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ({"prototypes": 1}, "prototypes=1: must be at least 2"),
        ({"teacher_temperature": 0.0}, "teacher_temperature=0.0: must be positive"),
        ({"teacher_warmup_epochs": -1}, "teacher_warmup_epochs=-1: must not be negative"),
        ({"center_momentum": 1.5}, "center_momentum=1.5"),
        ({"initial_weights": "kaiming"}, "initial_weights='kaiming'"),
    ],
)
def test_wrong_numbers_are_named(numbers: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        DINOConfig(**numbers)


def test_two_ways_of_clipping_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="clip_tensor_norm=3"):
        OptimConfig(clip_norm=1.0, clip_tensor_norm=3.0)
    with pytest.raises(ValueError, match="final_weight_decay=-1"):
        OptimConfig(final_weight_decay=-1.0)


def test_weight_decay_and_clipping_of_a_run_are_those_of_its_config(tmp_path: Path) -> None:
    config = replace(with_crops(), precision="fp32")
    trainer = Trainer.build(config, tmp_path, World())
    try:
        trainer.run()
        groups = trainer.optimizer.param_groups
        total = trainer.resolved.total_steps
        last = weight_decay(total - 1, first=config.optim.weight_decay, last=0.4, total=total)
        assert {group["weight_decay"] for group in groups} == {0.0, last}
        norms = [p.grad.norm() for p in trainer.objective.parameters() if p.grad is not None]
        assert max(norms) == pytest.approx(0.05, rel=1e-3)
        logged = RunFolder(tmp_path).read_metric("weight_decay")
        assert [value for _, value in logged][-1] == pytest.approx(last)
    finally:
        trainer.close()
