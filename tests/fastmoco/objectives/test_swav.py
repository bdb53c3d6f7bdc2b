"""SwAV against golden numbers: assignment on one and several ranks, traces on a ViT and on a conv
trunk with small crops and a queue. Two real ranks: tests/distributed/test_siblings_ranks.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmoco.config import Config, OptimConfig
from fastmoco.config.serial import from_json, to_json
from fastmoco.distributed import World, parallelize
from fastmoco.models.heads import HeadForm, build_head
from fastmoco.objectives import swav
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.interface import Progress
from fastmoco.objectives.swav import SwAV, sinkhorn, sinkhorn_reference
from fastmoco.optim import build_adamw
from fastmoco.optim.averaged import AveragedOptimizer, AveragedSGD, FusedAdamW
from fastmoco.optim.groups import split_groups
from fastmoco.optim.larc import build_larc
from fastmoco.recipes import RECIPES, get_recipe
from fastmoco.recipes.swav import SwAVConfig, swav_r50_e400_b4096
from fastmoco.training.trainer import Trainer
from tests.distributed.run_trainer import CONFIG
from tests.distributed.thread_ranks import ThreadRanks
from tests.fastmoco.objectives import test_conformance as conformance
from tests.golden_objective import ConvTrunk, Data, error, read_sibling, sibling_vit


@pytest.fixture(scope="module")
def data() -> Data:
    return read()


def read() -> Data:
    return read_sibling("swav")


def our_name(golden_name: str) -> str:
    """The files of the conv trunk have the projector beside the trunk, where ours is its head."""
    if golden_name.startswith(("encoder.", "prototypes.")):
        return golden_name
    if golden_name in ("projection_head.weight", "projection_head.bias"):  # a single layer
        return f"encoder.head.0.{golden_name.rpartition('.')[2]}"
    if golden_name.startswith("projection_head."):
        return f"encoder.head.{golden_name.removeprefix('projection_head.')}"
    return f"encoder.{golden_name}"


def load(objective: SwAV, data: Data, prefix: str) -> SwAV:
    """The objective in float64 with the golden start."""
    start = f"{prefix}init/"
    weights = {
        our_name(k.removeprefix(start)): torch.from_numpy(v)
        for k, v in data.items()
        if k.startswith(start)
    }
    missing, unexpected = objective.double().load_state_dict(weights, strict=False)
    assert unexpected == []
    assert set(missing) <= {"encoder.pos_embed", "queue", "queue_used"}
    return objective


def vit_case(data: Data) -> tuple[SwAV, AveragedOptimizer]:
    """The objective and the optimizer of `vit/`."""
    hidden, out = data["vit/cfg"].tolist()[-2:]
    build = sibling_vit(data)
    objective = SwAV(
        build,
        projection_dim=out,
        hidden_dim=hidden,
        prototypes=7,
        temperature=float(data["vit/T"]),
        epsilon=float(data["vit/eps"]),
        sinkhorn_iterations=int(data["vit/sinkhorn_iterations"]),
        freeze_prototypes_steps=int(data["vit/freeze_steps"]),
    )
    load(objective, data, "vit/")
    assert np.array_equal(objective.encoder.pos_embed.numpy(), data["vit/pos"])
    adamw = build_adamw(objective.named_parameters(), lr=0.0, weight_decay=float(data["vit/wd"]))
    split_groups(adamw, objective.named_parameters(), objective.parameter_group)
    return objective, FusedAdamW(adamw, objective.averages())


def conv_case(data: Data, prefix: str) -> tuple[SwAV, AveragedOptimizer]:
    """The objective and the optimizer of `tr/` and `mt/`, which has no batch norms."""
    ranks, *_, width1, width2, hidden, out, count, iterations, freeze, rows = data[
        f"{prefix}cfg"
    ].tolist()
    objective = SwAV(
        partial(ConvTrunk, width1, width2),
        projection_dim=out,
        hidden_dim=hidden or 1,
        prototypes=count,
        temperature=float(data[f"{prefix}T"]),
        epsilon=float(data[f"{prefix}eps"]),
        sinkhorn_iterations=iterations,
        freeze_prototypes_steps=freeze,
        queue=ranks * rows,
        decay_prototypes=True,
    )
    if not hidden:
        form = HeadForm(layers=1, last_bias=True, last_norm=False)
        objective.encoder.head = build_head(width2, 1, out, form)
        objective.encoder.bn1 = objective.encoder.bn2 = nn.Identity()
    load(objective, data, prefix)
    larc = build_larc(objective.named_parameters(), lr=0.0, weight_decay=float(data[f"{prefix}wd"]))
    split_groups(larc, objective.named_parameters(), objective.parameter_group)
    return objective, AveragedSGD(larc, objective.averages())


CASES: dict[str, Callable[[Data], tuple[SwAV, AveragedOptimizer]]] = {
    "vit/": vit_case,
    "tr/": partial(conv_case, prefix="tr/"),
    "mt/": partial(conv_case, prefix="mt/"),
}


def crops_of(data: Data, prefix: str, step: int, world: World) -> list[Tensor]:
    """All crops of a step, of this rank."""
    if prefix == "vit/":
        crops = [data["vit/x1"][step], data["vit/x2"][step]]
    else:
        crops = [data[k] for k in sorted(data) if k.startswith(f"{prefix}x{step}_")]
    whole = [torch.from_numpy(crop).double() for crop in crops]
    if prefix == "mt/":
        return [crop[world.rank] for crop in whole]
    return [crop.chunk(world.world_size)[world.rank] for crop in whole]


def run(data: Data, prefix: str, world: World) -> dict[str, Any]:
    """All steps on this rank's part of the batch: losses, codes, queues, states, gradients."""
    objective, optimizer = CASES[prefix](data)
    forward = parallelize(objective, world)
    names = ("losses", "codes", "queues", "states", "assigned_rows")
    found: dict[str, Any] = {name: [] for name in names}
    steps = len(data[f"{prefix}lr"])
    for step in range(steps):
        at = Progress(step, steps)
        objective.zero_grad(set_to_none=True)
        objective.before_step(at)
        assigned: list[Tensor] = []
        assign = objective.assign

        def keep(*scores: Tensor, assign: Any = assign, assigned: Any = assigned) -> Tensor:
            assigned.append(assign(*scores))
            return assigned[0]

        queued = objective.queue.shape[1] * objective._in_use() if prefix != "vit/" else 0
        with mock.patch.object(objective, "assign", keep):
            loss = forward(*crops_of(data, prefix, step, world), at=at).loss
        loss.backward()
        named = dict(objective.named_parameters())
        for name in objective.frozen(at):
            named[name].grad = None
        if step == 0:
            found["gradients"] = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        for group in optimizer.param_groups:
            group["lr"] = float(data[f"{prefix}lr"][step])
        optimizer.step(skip=torch.zeros(()))
        objective.after_step(torch.zeros(()), at)
        found["losses"].append(loss.detach())
        found["codes"].append(assigned[0])
        found["assigned_rows"].append(assigned[0].shape[1] + queued / world.world_size)
        found["states"].append({n: t.detach().clone() for n, t in objective.state_dict().items()})
        found["queues"].append(getattr(objective, "queue", torch.zeros(())).clone())
    return found


def check_trace(ranks: list[dict[str, Any]], data: Data, prefix: str) -> None:
    """Everything that the file holds of a trace, from what all ranks have found."""
    losses = torch.stack([torch.stack(rank["losses"]) for rank in ranks], dim=-1)
    codes = [torch.stack(rank["codes"]) for rank in ranks]
    if prefix == "mt/":
        assert error(losses, data["mt/loss"]) <= 1e-9
        assert error(torch.stack(codes, dim=1), data["mt/q"]) <= 1e-7
    else:
        key = "vit/codes" if prefix == "vit/" else "tr/q"
        assert error(losses.mean(-1), data[f"{prefix}loss"]) <= 1e-9
        assert error(torch.cat(codes, dim=2), data[key]) <= 1e-7

    # The queue of each rank in the file is a part of ours.
    if prefix != "vit/":
        if len(ranks) == data[f"{prefix}cfg"][0]:
            rows = torch.stack(ranks[0]["assigned_rows"])
            assert np.array_equal(rows.numpy(), data[f"{prefix}sinkhorn_rows"])
        world, images = (int(n) for n in data[f"{prefix}cfg"][:2])
        for rank in ranks:
            queues = torch.stack(rank["queues"])
            steps, views, _, width = queues.shape
            parts = queues.view(steps, views, -1, world, images, width)
            for number in range(world):
                part = parts[:, :, :, number].flatten(2, 3)
                golden = data[f"{prefix}queue"]
                assert error(part, golden if world == 1 else golden[:, number]) <= 1e-9

    for found in ranks:
        gradients = [k for k in data if k.startswith(f"{prefix}step0/grad/")]
        assert len(gradients) == len(found["gradients"])
        for name in gradients:
            ours = found["gradients"][our_name(name.rpartition("/")[2])]
            assert error(ours, data[name]) <= 1e-7, name
        compared = 0
        for step, number in (("step0", 0), ("step2", 2), ("final", -1)):
            for kind in ("param", "buf"):
                start = f"{prefix}{step}/{kind}/"
                for golden_name in (k for k in data if k.startswith(start)):
                    if golden_name.endswith("projection_head.0.bias") and prefix == "tr/":
                        continue  # without a true gradient: LARC enlarges its rounding
                    loose = golden_name.endswith("projection_head.1.running_mean")
                    ours = found["states"][number][our_name(golden_name.removeprefix(start))]
                    assert error(ours, data[golden_name]) <= (1e-2 if loose else 1e-7), golden_name
                    compared += 1
        assert compared > 10


@pytest.mark.parametrize("prefix", ["vit/", "tr/"])
def test_traces_match_golden(data: Data, prefix: str) -> None:
    check_trace([run(data, prefix, World())], data, prefix)


def codes_of(data: Data, case: str, scores: Tensor, dtype: torch.dtype) -> Tensor:
    return sinkhorn(
        scores.to(dtype),
        epsilon=float(data[f"{case}_eps"]),
        iterations=int(data[f"{case}_iterations"]),
    )


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 6e-6)])
def test_codes_match_golden(data: Data, dtype: torch.dtype, tolerance: float) -> None:
    for i in range(int(data["num_sinkhorn"])):
        scores = torch.from_numpy(data[f"k{i}_scores"])
        assert error(codes_of(data, f"k{i}", scores, dtype), data[f"k{i}_codes"]) <= tolerance
        plain = sinkhorn_reference(
            scores.to(dtype), float(data[f"k{i}_eps"]), int(data[f"k{i}_iterations"])
        )
        assert error(plain, data[f"k{i}_codes"]) <= tolerance


def on_ranks(parts: list[Tensor], run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Results of threads that stand for ranks."""
    ranks = ThreadRanks(len(parts))
    with (
        mock.patch.object(swav, "total", ranks.total),
        mock.patch.object(swav, "largest", ranks.largest),
        mock.patch.object(swav, "group_size", ranks.size),
    ):
        return ranks.run(lambda rank: run(parts[rank]))


def test_codes_of_several_ranks_match_golden(data: Data) -> None:
    for i in range(int(data["num_mr"])):
        parts = list(torch.from_numpy(data[f"mr{i}_scores"]))
        for ours, expected in zip(
            on_ranks(parts, lambda part, i=i: codes_of(data, f"mr{i}", part, torch.float64)),
            data[f"mr{i}_codes"],
            strict=True,
        ):
            assert error(ours, expected) <= 1e-9


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_codes_do_not_depend_on_the_number_of_ranks(ranks: int) -> None:
    noise = torch.Generator().manual_seed(0)
    scores = 2 * torch.rand(8, 5, generator=noise, dtype=torch.float64) - 1
    expected = sinkhorn_reference(scores, 0.05, 3)
    found = on_ranks(
        list(scores.chunk(ranks)), lambda part: sinkhorn(part, epsilon=0.05, iterations=3)
    )
    assert (torch.cat(found) - expected).abs().max() <= 1e-13
    alone = torch.cat([sinkhorn_reference(part, 0.05, 3) for part in scores.chunk(2)])
    assert (alone - expected).abs().max() > 0.05  # otherwise this would show nothing


def test_codes_never_overflow_and_rows_without_weight_take_no_part() -> None:
    """exp of scores that are not of unit vectors is infinite in float32."""
    noise = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 6, 5, generator=noise)
    far = sinkhorn(scores + 9.0, epsilon=0.05, iterations=3)
    assert (far - sinkhorn(scores, epsilon=0.05, iterations=3)).abs().max() <= 1e-3
    assert (far.sum(-1) - 1).abs().max() <= 1e-6

    weights = torch.tensor([[1.0] * 6, [1, 1, 1, 1, 0, 0]])
    rows = torch.tensor([6.0, 4.0])
    weighed = sinkhorn(scores, epsilon=0.05, iterations=3, weights=weights, rows=rows)
    assert (weighed[0] - sinkhorn_reference(scores[0], 0.05, 3)).abs().max() <= 1e-5
    assert (weighed[1, :4] - sinkhorn_reference(scores[1, :4], 0.05, 3)).abs().max() <= 1e-5


def test_a_second_normalisation_changes_no_bit() -> None:
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        prototypes = swav.Prototypes(128, 3000).to(dtype)
        with torch.no_grad():
            prototypes.weight.add_(0.01 * torch.randn_like(prototypes.weight))
        prototypes.normalise_()
        once = prototypes.weight.detach().clone()
        prototypes.normalise_()
        assert torch.equal(once, prototypes.weight)
        assert (once.double().norm(dim=1) - 1).abs().max() <= max(torch.finfo(dtype).eps, 4e-15)


def test_scores_are_multiplied_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    prototypes = swav.Prototypes(16, 9)
    rows = torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = prototypes(rows)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, rows @ prototypes.weight.T)


def with_queue(rows: int = 32, **numbers: Any) -> Config:
    """A run whose queue is full after two steps of its six, and then in use."""
    own = SwAVConfig(prototypes=12, queue=rows, queue_start_epoch=0, **numbers)
    return replace(CONFIG, objective=own)


def test_a_queue_passes_the_suite_of_every_objective(tmp_path: Path) -> None:
    config = with_queue()
    conformance.check_reference(config)
    conformance.check_chunks(config)
    conformance.check_skip(config, tmp_path)


def test_a_resnet_with_larc_passes_the_suite(tmp_path: Path) -> None:
    """Both views are one batch of its batch norms, in the reference too."""
    config = with_queue()
    model = replace(config.model, architecture="resnet_nano", patch_size=16)
    larc = OptimConfig(name="larc", lr=0.5, weight_decay=1e-6, warmup_epochs=0)
    config = replace(config, model=model, optim=larc)
    conformance.check_reference(config)
    conformance.check_chunks(config)
    conformance.check_skip(config, tmp_path)


def test_small_crops_on_a_vit_pass_the_suite(tmp_path: Path) -> None:
    small = replace(CONFIG.data.view1, size=4, copies=2)
    model = replace(CONFIG.model, positions="learned", drop_path=0.1)
    config = replace(with_queue(), model=model, data=replace(CONFIG.data, more_views=(small,)))
    conformance.check_reference(config)
    conformance.check_chunks(config)
    conformance.check_skip(config, tmp_path)


def test_a_queue_is_saved_and_continues_to_the_same_bits(tmp_path: Path) -> None:
    config = with_queue(freeze_prototypes_steps=4)
    conformance.run_whole(config, tmp_path / "whole")
    trainer = Trainer.build(config, tmp_path / "run", World())
    try:
        used = []
        for _ in range(3):
            trainer.step(trainer.loader.next())
            used.append(bool(trainer.objective.queue_used.all()))
        assert used == [False, False, True]
        trainer._save(force=True)
    finally:
        trainer.close()
    conformance.run_whole(config, tmp_path / "run")
    conformance.assert_same_end(tmp_path / "run", tmp_path / "whole")


def test_a_queue_changes_codes_once_it_is_full_and_not_before() -> None:
    """And it does not start before its epoch."""
    torch.manual_seed(0)
    config = with_queue()
    plain = build_objective(with_queue(0), torch.device("cpu"))
    queued = build_objective(config, torch.device("cpu"))
    begins = replace(config, epochs=4, objective=replace(config.objective, queue_start_epoch=1))
    late = build_objective(begins, torch.device("cpu"))
    losses = []
    for step in range(4):
        at = Progress(step, 8, 2)
        views = torch.randn(2, 16, 3, 8, 8, dtype=torch.float64)
        losses.append([o(*views, at=at).loss.item() for o in (plain, queued, late)])
        for objective in (queued, late):
            objective.after_step(torch.zeros(()), at)
    differs = [[abs(loss - row[0]) > 1e-9 for loss in row[1:]] for row in losses]
    assert differs == [[False, False], [False, False], [True, False], [True, False]]
    assert bool((late.queue[:, :16] == queued.queue[:, :16]).all())
    kept = copy.deepcopy(queued.state_dict())
    queued(*views, at=at)
    queued.after_step(torch.ones(()), at)  # a skipped step
    assert all(torch.equal(kept[n], t) for n, t in queued.state_dict().items() if "queue" in n)


CROPS = replace(CONFIG.data.view1, size=4, copies=2)
LATER = 3
"""The step at which a run with a queue is continued, when the queue is in use."""


def steps_with_queue(world: World, *, start: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Six steps with two large and two small crops of each image, or the last three from a state;
    losses, codes of all ranks' images in their order and states."""
    config = replace(with_queue(), data=replace(CONFIG.data, more_views=(CROPS,)))
    torch.manual_seed(0)
    objective = build_objective(config, torch.device("cpu"))
    assert isinstance(objective, SwAV)
    if start is not None:
        objective.load_state_dict(start)
    forward = parallelize(objective, world)
    found: dict[str, Any] = {name: [] for name in ("losses", "codes", "states")}
    for step in range(0 if start is None else LATER, 6):
        noise = torch.Generator().manual_seed(step)
        crops = [
            torch.randn(16, 3, side, side, generator=noise, dtype=torch.float64)
            for side in (8, 8, 4, 4)
        ]
        at = Progress(step, 6)
        objective.zero_grad(set_to_none=True)
        objective.before_step(at)
        assign, codes = objective.assign, []
        with mock.patch.object(
            objective, "assign", lambda *rows, a=assign, c=codes: c.append(a(*rows)) or c[-1]
        ):
            loss = forward(*(c.chunk(world.world_size)[world.rank] for c in crops), at=at).loss
        loss.backward()
        with torch.no_grad():
            for parameter in objective.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
        objective.after_step(torch.zeros(()), at)
        found["losses"].append(loss.detach())
        found["codes"].append(codes[0])
        found["states"].append({n: t.detach().clone() for n, t in objective.state_dict().items()})
    return found


def check_queue_of_ranks(ranks: list[dict[str, Any]]) -> None:
    """Codes, losses and states of one process with the same images, at every step; the state of two
    ranks continues in one process as it would have on them."""
    alone = steps_with_queue(World())
    assert bool(alone["states"][LATER - 1]["queue_used"].all())
    continued = steps_with_queue(World(), start=ranks[0]["states"][LATER - 1])
    for step, expected in enumerate(alone["states"]):
        codes = torch.cat([rank["codes"][step] for rank in ranks], dim=1)
        assert (codes - alone["codes"][step]).abs().max() <= 1e-10
        loss = sum(rank["losses"][step] for rank in ranks) / len(ranks)
        assert abs(loss - alone["losses"][step]) <= 1e-11
        states = [rank["states"][step] for rank in ranks]
        if step >= LATER:
            states.append(continued["states"][step - LATER])
        for state in states:
            assert state.keys() == expected.keys()
            assert all(error(t, expected[n].numpy()) <= 1e-9 for n, t in state.items()), step


def test_a_collapse_is_visible() -> None:
    """Equal embeddings of all images: codes contain nothing, and the loss is that of an encoder that
    knows nothing."""
    objective = build_objective(with_queue(0), torch.device("cpu"))
    views = torch.randn(2, 16, 3, 8, 8, dtype=torch.float64)
    healthy = objective(*views).watch
    with torch.no_grad():
        objective.encoder.head[-1].weight.zero_()
    output = objective(*views)
    assert output.watch["code_entropy"].item() == pytest.approx(math.log(12))
    assert healthy["code_entropy"].item() < 0.9 * math.log(12)
    assert output.watch["used_prototypes"].item() <= 12
    assert output.watch["mean_code_entropy"].item() == pytest.approx(math.log(12))
    assert healthy["code_entropy"] < healthy["mean_code_entropy"] <= math.log(12) + 1e-9


def test_prototypes_are_frozen_at_first_and_decay_with_larc_only() -> None:
    objective = build_objective(with_queue(freeze_prototypes_steps=2), torch.device("cpu"))
    frozen = [objective.frozen(Progress(step, 4)) for step in range(3)]
    assert frozen == [{"prototypes.weight"}, {"prototypes.weight"}, set()]
    config = with_queue()
    larc = replace(config, optim=replace(config.optim, name="larc"))
    scales = []
    for kind in (config, larc):
        own = build_objective(kind, torch.device("cpu"))
        scales.append(
            [own.parameter_group(n, p).weight_decay_scale for n, p in own.named_parameters()]
        )
    assert [min(row) for row in scales] == [0.0, 1.0]
    assert sum(scale == 0.0 for scale in scales[0]) == 1


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ({"epsilon": 0.02}, r"epsilon=0.02: must be at least 0.025"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations=0"),
        ({"prototypes": 1}, "prototypes=1"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"queue": -1}, "queue=-1"),
    ],
)
def test_wrong_numbers_are_named(numbers: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        SwAVConfig(**numbers)


def test_a_queue_of_broken_batches_or_after_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective.queue=20: must be a multiple of"):
        build_objective(with_queue(20), torch.device("cpu"))
    config = with_queue()
    late = replace(config, epochs=9, objective=replace(config.objective, queue_start_epoch=9))
    with pytest.raises(ValueError, match=r"queue_start_epoch=9: the run has epochs=9, so its"):
        build_objective(late, torch.device("cpu"))


def test_recipes_carry_the_official_numbers_and_travel_through_json() -> None:
    config = swav_r50_e400_b4096()
    optim = config.optim
    assert (optim.name, optim.lr_scaling, optim.schedule) == ("larc", "none", "cosine_inclusive")
    assert (optim.lr, optim.final_lr, optim.warmup_lr, optim.warmup_epochs) == (
        4.8,
        0.0048,
        0.3,
        10,
    )
    assert optim.weight_decay == 1e-6
    assert not config.model.zero_residual
    view = config.data.view1
    assert (view.brightness, view.contrast, view.saturation, view.hue) == (0.8, 0.8, 0.8, 0.2)
    assert (view.crop_scale, view.blur_probability, view.std[0]) == ((0.14, 1.0), 0.5, 0.228)
    names = [name for name in RECIPES if name.startswith("swav_")]
    steps = {"swav_r50_e400_b256": 5005}
    for name in names:
        assert from_json(to_json(get_recipe(name))) == get_recipe(name)
        own = get_recipe(name).objective
        assert isinstance(own, SwAVConfig)
        if "vit" in name or "r50" in name:
            assert own.freeze_prototypes_steps == steps.get(name, 313)
    assert len(names) == 10


@pytest.mark.parametrize("name", ["swav_r50_e800_b4096", "swav_r50_e400_b256"])
def test_recipes_with_small_crops_have_the_official_numbers(name: str) -> None:
    """Of `swav_800ep_pretrain.sh` and `swav_400ep_bs256_pretrain.sh`."""
    config = get_recipe(name)
    optim, own = config.optim, config.objective
    assert isinstance(own, SwAVConfig)
    large, other, small = config.data.views
    assert large == other
    assert (large.size, large.crop_scale, large.copies) == (224, (0.14, 1.0), 1)
    assert (small.size, small.crop_scale, small.copies) == (96, (0.05, 0.14), 6)
    assert replace(small, size=224, crop_scale=(0.14, 1.0), copies=1) == large
    numbers = (config.epochs, config.global_batch_size, optim.lr, optim.final_lr)
    if name == "swav_r50_e800_b4096":
        assert numbers == (800, 4096, 4.8, 0.0048)
        assert (optim.warmup_epochs, optim.warmup_lr, own.queue) == (10, 0.3, 0)
    else:
        assert numbers == (400, 256, 0.6, 0.0006)
        assert (optim.warmup_epochs, own.queue, own.queue_start_epoch) == (0, 3840, 15)
    assert (optim.weight_decay, own.epsilon, own.temperature) == (1e-6, 0.05, 0.1)
