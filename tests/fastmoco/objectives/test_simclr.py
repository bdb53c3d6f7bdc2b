"""SimCLR against golden numbers: loss on one and several ranks, three steps on a conv trunk and on
a ViT. Two real ranks: tests/distributed/test_siblings_ranks.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmoco.config.serial import from_json, may_change, to_json
from fastmoco.distributed import World, parallelize
from fastmoco.models.heads import FORMS
from fastmoco.objectives import simclr
from fastmoco.objectives.build import build_objective
from fastmoco.objectives.interface import Coupling, Inputs
from fastmoco.objectives.reference import plain_forward
from fastmoco.objectives.simclr import SimCLR, nt_xent_loss, nt_xent_reference
from fastmoco.optim import build_adamw, build_lars
from fastmoco.recipes import RECIPES, get_recipe, quickstart_digits
from fastmoco.recipes.simclr import SimCLRConfig, simclr_view
from fastmoco.training.load_run import load_run
from fastmoco_pipelines.spec import Resume
from tests.command_line import main
from tests.distributed.thread_ranks import ThreadRanks
from tests.golden_objective import (
    FLOAT64,
    ConvTrunk,
    Data,
    Gates,
    error,
    read_sibling,
    same_trace,
    sibling_vit,
)

FLOAT32 = Gates(loss=6e-5, parameter=1.2e-4, gradient=6e-5, adamw_noise=True)
OFFICIAL = {"loss_scale": 2.0, "projector": FORMS["simclr"]}


@pytest.fixture(scope="module")
def data() -> Data:
    return read()


def read() -> Data:
    return read_sibling("simclr")


def double(data: Data, *names: str) -> list[Tensor]:
    return [torch.from_numpy(data[name]).double() for name in names]


def loss_and_gradient(
    projections: Tensor, loss_of: Callable[..., tuple[Tensor, Any]] = nt_xent_loss, **options: float
) -> tuple[Tensor, Tensor]:
    """Of a copy of the projections, as a leaf."""
    leaf = projections.detach().clone().requires_grad_()
    loss = loss_of(leaf, **options)[0]
    loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


both_losses = pytest.mark.parametrize("loss_of", [nt_xent_loss, nt_xent_reference])


def on_ranks(
    monkeypatch: pytest.MonkeyPatch, projections: Tensor, **options: Any
) -> list[tuple[Tensor, Tensor]]:
    """Loss and gradient of each rank; `projections` [W, 2, B, D]."""
    ranks = ThreadRanks(len(projections))
    monkeypatch.setattr(simclr, "gather_keys", ranks.gather)
    monkeypatch.setattr(simclr, "group_rank", ranks.rank)
    monkeypatch.setattr(simclr, "group_size", ranks.size)
    return ranks.run(lambda rank: loss_and_gradient(projections[rank], **options))


@both_losses
def test_loss_and_gradient_match_golden(data: Data, loss_of: Callable[..., Any]) -> None:
    for i in range(int(data["num_cases"])):
        projections = torch.stack(double(data, f"c{i}_z1", f"c{i}_z2"))
        options = {"temperature": float(data[f"c{i}_T"]), "scale": 2.0}
        loss, gradient = loss_and_gradient(projections, loss_of, **options)
        assert abs(loss.item() - data[f"c{i}_loss"]) <= 1e-12 * data[f"c{i}_loss"]
        for ours, name in zip(gradient, ("dz1", "dz2"), strict=True):
            assert error(ours, data[f"c{i}_{name}"]) <= 1e-10, (i, name)


@both_losses
def test_several_ranks_match_golden(
    data: Data, loss_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of the sum of all ranks' losses, through the gathered rows too."""
    for j in range(int(data["num_mr"])):
        projections = torch.stack(double(data, f"mr{j}_z1", f"mr{j}_z2"), dim=1)
        options = {"temperature": float(data[f"mr{j}_T"]), "scale": 2.0}
        found = on_ranks(monkeypatch, projections, loss_of=loss_of, **options)
        for rank, (loss, gradient) in enumerate(found):
            assert abs(loss.item() - data[f"mr{j}_loss"][rank]) <= 1e-12 * loss.item()
            for ours, name in zip(gradient, ("dz1_sum", "dz2_sum"), strict=True):
                assert error(ours, data[f"mr{j}_{name}"][rank]) <= 1e-10, (j, rank, name)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("tile", [simclr.TILE_CPU, 100])
def test_ranks_and_tiles_change_nothing(
    count: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Averaged over ranks, loss and gradient are those of one process; also a few rows at a
    time."""
    torch.manual_seed(0)
    projections = torch.randn(count, 2, 6, 5, dtype=torch.float64)
    projections[0, 0, 3] *= 1e-14  # below the floor of a length
    whole = projections.transpose(0, 1).flatten(1, 2)
    loss, gradient = loss_and_gradient(whole, nt_xent_reference, temperature=0.3)
    monkeypatch.setattr(simclr, "TILE_CPU", tile)
    found = on_ranks(monkeypatch, projections, temperature=0.3)
    assert abs(sum(own for own, _ in found) / count - loss) <= 1e-13
    ours = torch.stack([own / count for _, own in found], dim=1).flatten(1, 2)
    assert ((ours - gradient).abs() <= 1e-13 * gradient.abs().amax(-1, keepdim=True)).all()


def test_a_small_loss_keeps_its_digits_and_low_precision_is_widened() -> None:
    torch.manual_seed(0)
    rows = torch.eye(8) + 1e-3 * torch.randn(2, 8, 8)
    options = {"temperature": 0.05}
    truth, true_gradient = loss_and_gradient(rows.double(), nt_xent_reference, **options)
    loss, gradient = loss_and_gradient(rows, **options)
    assert truth < 1e-6
    assert abs(loss - truth) <= 1e-4 * truth
    assert (gradient - true_gradient).abs().max() <= 1e-3 * true_gradient.abs().max()

    low = rows.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradient = loss_and_gradient(low, temperature=0.5)
    truth, _ = loss_and_gradient(low.double(), nt_xent_reference, temperature=0.5)
    assert (loss.dtype, gradient.dtype) == (torch.float32, torch.bfloat16)
    assert abs(loss - truth) <= 1e-6 * truth


def test_one_image_has_no_negatives() -> None:
    loss, gradient = loss_and_gradient(torch.randn(2, 1, 4), temperature=0.2)
    assert loss == 0
    assert (gradient == 0).all()


def test_positives_are_ranked_among_all_other_rows() -> None:
    """Row 0's positive is first, row 1's second, row 2's first; by both views."""
    angles = torch.tensor([[0.0, 1.0, 2.0], [0.1, 1.6, 2.1]])
    rows = torch.stack([angles.cos(), angles.sin()], dim=-1)
    _, hits = nt_xent_loss(rows, temperature=0.2, accuracy=True)
    assert hits is not None
    assert hits.tolist() == pytest.approx([5 / 6, 1.0])
    assert torch.equal(nt_xent_reference(rows, temperature=0.2)[1], hits)
    assert nt_xent_loss(rows, temperature=0.2)[1] is None


def load(objective: SimCLR, data: Data, prefix: str) -> SimCLR:
    """The objective in float64 with the golden start."""
    start = f"{prefix}init/"
    weights = {
        our_name(k[len(start) :]): torch.from_numpy(v)
        for k, v in data.items()
        if k.startswith(start)
    }
    missing, unexpected = objective.double().load_state_dict(weights, strict=False)
    assert unexpected == []
    buffers = ("running_mean", "running_var", "num_batches_tracked", "pos_embed")
    assert all(name.endswith(buffers) for name in missing), missing
    return objective


def our_name(golden_name: str) -> str:
    """In `tr/` the projector is beside its trunk; ours is its head."""
    return golden_name.replace("projector.", "encoder.head.")


def conv_case(data: Data, **options: Any) -> tuple[SimCLR, torch.optim.Optimizer]:
    """The objective and the optimizer of `tr/`."""
    _, _, width1, width2, out, layers = data["tr/cfg"].tolist()
    assert layers == FORMS["simclr"].layers
    objective = SimCLR(
        partial(ConvTrunk, width1, width2),
        projection_dim=out,
        hidden_dim=width2,
        temperature=float(data["tr/T"]),
        **{**OFFICIAL, **options},
    )
    load(objective, data, "tr/")
    lars = build_lars(
        objective.named_parameters(),
        lr=0.0,
        weight_decay=float(data["tr/wd"]),
        sgd_momentum=float(data["tr/mu"]),
        lr_in_buffer=True,
    )
    return objective, lars


def vit_case(data: Data) -> tuple[SimCLR, torch.optim.Optimizer]:
    """The objective and the optimizer of `vit/`."""
    hidden, out = data["vit/cfg"].tolist()[-2:]
    build = sibling_vit(data)
    temperature = float(data["vit/T"])
    objective = SimCLR(build, projection_dim=out, hidden_dim=hidden, temperature=temperature)
    load(objective, data, "vit/")
    assert np.array_equal(objective.encoder.pos_embed.numpy(), data["vit/pos"])
    named = objective.named_parameters()
    return objective, build_adamw(named, lr=0.0, weight_decay=float(data["vit/wd"]))


CASES: dict[str, Callable[[Data], tuple[SimCLR, torch.optim.Optimizer]]] = {
    "tr/": conv_case,
    "vit/": vit_case,
}


def run(
    data: Data, prefix: str, world: World, dtype: torch.dtype = torch.float64, **options: Any
) -> dict[str, Any]:
    """Three steps on this rank's part of the batch: losses, the first gradients and projections,
    and the state after each step."""
    objective, optimizer = CASES[prefix](data, **options)
    objective.to(dtype)
    forward = parallelize(objective, world)
    found: dict[str, Any] = {"losses": [], "states": []}
    for step in range(3):
        views = [torch.from_numpy(data[f"{prefix}{name}"][step]).to(dtype) for name in ("x1", "x2")]
        objective.zero_grad(set_to_none=True)
        output = forward(*(view.chunk(world.world_size)[world.rank] for view in views))
        output.loss.backward()
        if step == 0:
            named = objective.named_parameters()
            found["gradients"] = {n: p.grad.clone() for n, p in named if p.grad is not None}
            found["z1"], found["z2"] = output.watch["queries"]
        optimizer.param_groups[0]["lr"] = float(data[f"{prefix}lr"][step])
        optimizer.step()
        found["losses"].append(output.loss.detach())
        found["states"].append({n: t.detach().clone() for n, t in objective.state_dict().items()})
    return found


def check_trace(found: dict[str, Any], data: Data, prefix: str, gates: Gates = FLOAT64) -> None:
    """Everything that the file holds of three steps."""
    same_trace(found, data, prefix, our_name, gates)


@pytest.mark.parametrize("prefix", CASES)
def test_three_steps_match_golden(data: Data, prefix: str) -> None:
    check_trace(run(data, prefix, World()), data, prefix)
    check_trace(run(data, prefix, World(), torch.float32), data, prefix, FLOAT32)


def test_statistics_of_each_view_alone_are_far_from_golden(data: Data) -> None:
    found = run(data, "tr/", World(), joint_batch_statistics=False)
    assert error(torch.stack(found["losses"]), data["tr/loss"]) > 0.1


@pytest.mark.parametrize("joint", [True, False])
def test_a_trunk_with_batch_norms_equals_its_reference(joint: bool) -> None:
    """Whether its norms see both views as one batch or each alone; accuracy included."""
    torch.manual_seed(3)
    objectives = [
        SimCLR(
            partial(ConvTrunk, 4, 5),
            projection_dim=4,
            hidden_dim=6,
            joint_batch_statistics=joint,
        ).double()
        for _ in range(2)
    ]
    objectives[1].load_state_dict(objectives[0].state_dict())
    views = torch.randn(2, 7, 3, 8, 8, dtype=torch.float64)
    outputs = (
        objectives[0](*views, accuracy=True),
        plain_forward(objectives[1], *views, accuracy=True),
    )
    for output in outputs:
        output.loss.backward()
    assert abs(outputs[0].loss - outputs[1].loss) <= 1e-13
    assert torch.equal(outputs[0].watch["accuracy"], outputs[1].watch["accuracy"])
    for a, b in zip(objectives[0].parameters(), objectives[1].parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert (a.grad - b.grad).abs().max() <= 1e-12
    for a, b in zip(objectives[0].buffers(), objectives[1].buffers(), strict=True):
        assert (a.double() - b.double()).abs().max() <= 1e-12
    tracked = objectives[0].encoder.bn1.num_batches_tracked
    assert tracked == (1 if joint else 2)
    assert objectives[0].coupling is Coupling.TRUNK


def test_recipes_carry_the_numbers_and_travel_through_json() -> None:
    config = get_recipe("simclr_r50_e100_b4096")
    optim = config.optim
    assert (optim.name, optim.lr, optim.weight_decay, optim.warmup_epochs) == (
        "lars",
        0.3,
        1e-6,
        10,
    )
    assert (optim.lr_in_buffer, optim.schedule, config.peak_lr) == (True, "cosine_steps", 4.8)
    assert config.objective == SimCLRConfig(
        temperature=0.1, loss_scale=2.0, layers=3, last_norm_weight=True
    )
    assert config.data.view1 == config.data.view2 == simclr_view()
    assert config.data.view1.mean == (0.0, 0.0, 0.0)
    for name in (name for name in RECIPES if name.startswith("simclr")):
        assert from_json(to_json(get_recipe(name))) == get_recipe(name)
    vit = get_recipe("simclr_vit_b16_e300_b4096")
    assert (vit.optim.lr, vit.optim.weight_decay, vit.objective) == (2e-4, 0.1, SimCLRConfig())
    fields = ("temperature", "loss_scale", "layers", "joint_batch_statistics")
    allowed = [may_change(vit, f"objective.{name}", Resume.WITH_ALLOW) for name in fields]
    assert allowed == [True, True, False, False]
    for change in ({"temperature": 0.0}, {"loss_scale": -1.0}, {"layers": 0}):
        ((name, value),) = change.items()
        with pytest.raises(ValueError, match=f"{name}={value}"):
            SimCLRConfig(**change)  # type: ignore[arg-type]


def test_a_config_makes_its_projector() -> None:
    own = SimCLRConfig(layers=2, last_norm_weight=True, joint_batch_statistics=False)
    config = replace(quickstart_digits(), objective=own)
    objective = build_objective(config, torch.device("cpu"))
    assert isinstance(objective, SimCLR)
    head = objective.encoder.head
    assert sum(isinstance(layer, nn.Linear) for layer in head) == 2
    assert head[-1].weight is not None
    assert head[-1].bias is None
    views = torch.randn(2, 6, 3, 8, 8)
    objective(*views)
    assert head[-1].num_batches_tracked == 2
    with pytest.raises(ValueError, match="1 of them"):
        objective.features(Inputs((views[0],)), at=None)  # type: ignore[arg-type]


def test_the_command_line_trains_and_evaluates(
    digits: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    words = ["train", "simclr_digits", "--out", out, "--data.shards", digits[0], "--epochs", "2"]
    words += ["--objective.temperature", "0.3", "--threads", "1", "--knn.every-epochs", "0"]
    assert main(words) == 0
    objective, config, _ = load_run(tmp_path / "run")
    assert isinstance(objective, SimCLR)
    assert (config.objective, objective.temperature) == (SimCLRConfig(temperature=0.3), 0.3)
    capsys.readouterr()
    words = ["--train", digits[0], "--test", digits[1], "--json"]
    assert main(["eval", "knn", out, *words]) == 0
    assert 0 < json.loads(capsys.readouterr().out.splitlines()[-1])["knn"] <= 1
