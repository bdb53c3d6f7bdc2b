"""Choices that depend on the machine."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch

from fastmoco.distributed.mesh import World
from fastmoco.models.precision import choose_precision
from fastmoco.objectives.build import build_objective
from fastmoco.optim.build import build_optimizer
from fastmoco.recipes import get_recipe
from fastmoco.training import setup
from fastmoco_pipelines import SyntheticLoader

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [
        ({"avx512_bf16": True}, "bf16"),
        ({"avx512_bf16": False, "bf16": False}, "fp32"),
        ({}, "fp32"),
    ],
)
def test_auto_takes_bf16_where_the_cpu_multiplies_it(monkeypatch, capabilities, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision("auto", CPU) == chosen


def test_a_torch_that_cannot_be_asked_computes_in_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert choose_precision("auto", CPU) == "fp32"
    assert choose_precision("bf16", CPU) == "bf16"


def test_the_seed_decides_every_weight():
    config = get_recipe("quickstart_digits")
    one, two = (build_objective(config, CPU).state_dict() for _ in range(2))
    other = build_objective(replace(config, seed=1), CPU).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_every_number_of_the_config_reaches_the_objective():
    recipe = get_recipe("quickstart_digits")
    model = replace(recipe.model, projection_dim=24, hidden_dim=40, image_size=16, patch_size=4)
    views = [replace(view, size=16) for view in (recipe.data.view1, recipe.data.view2)]
    config = replace(
        recipe,
        precision="fp64",
        model=model,
        data=replace(recipe.data, view1=views[0], view2=views[1]),
        objective=replace(recipe.objective, temperature=0.37),
    )
    objective = build_objective(config, CPU)
    assert objective.temperature == 0.37
    assert objective.encoder.image_size == 16
    assert objective.encoder.patch_size == 4
    assert objective.encoder.head[0].weight.shape == (40, objective.encoder.embed_dim)
    assert objective.predictor[-1].num_features == 24

    # The temperature is that of the loss, not of the record alone.
    view = torch.rand(2, 6, 3, 16, 16, dtype=torch.float64)
    output = objective(*view)
    (q1, q2), (k1, k2) = output.watch["queries"], output.watch["keys"]
    expected = 0.0
    for q, k in ((q1, k2), (q2, k1)):
        logits = torch.nn.functional.normalize(q) @ torch.nn.functional.normalize(k).T / 0.37
        expected += 2 * 0.37 * torch.nn.functional.cross_entropy(logits, torch.arange(6)).item()
    assert output.loss.item() == pytest.approx(expected, rel=1e-12)


def _optimizer(config, objective):
    return build_optimizer(config, objective.named_parameters(), objective.averages())


@pytest.mark.parametrize("backend", ["torch", "fastmoco"])
def test_every_number_of_the_config_reaches_the_optimizer(backend):
    recipe = get_recipe("quickstart_digits")
    numbers = {"betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.33}
    config = replace(recipe, optim=replace(recipe.optim, fused_backend=backend, **numbers))
    objective = build_objective(config, CPU)
    (group,) = _optimizer(config, objective).param_groups
    assert {name: group[name] for name in numbers} == numbers

    numbers = {"sgd_momentum": 0.7, "trust_coefficient": 0.02, "weight_decay": 0.33}
    lars = replace(config.optim, name="lars", fused_backend="auto", **numbers)
    (group,) = _optimizer(replace(config, optim=lars), objective).param_groups
    found = group["momentum"], group["trust_coefficient"], group["weight_decay"]
    assert found == (0.7, 0.02, 0.33)


@pytest.mark.parametrize(
    ("own", "processes", "variable", "threads"),
    [
        (0, "1", "", 4),
        (1, "1", "", 1),
        (0, "1", "2", 2),  # said by the user
        (3, "1", "2", 3),
        (0, "1", "9", 4),
        (0, "1", "0", 4),
        (0, "1", "2,1", 4),  # of nested regions: not understood
        (0, "2", "1", 2),  # said by torchrun
        (0, "100000", "", 1),
    ],
)
def test_processes_share_the_cores(monkeypatch, own, processes, variable, threads):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setenv("OMP_NUM_THREADS", variable)
    config = replace(get_recipe("quickstart_digits"), threads=own)
    assert setup.share_cores(config) == threads
    assert torch.get_num_threads() == threads


def test_synthetic_images_need_no_shards():
    config = get_recipe("quickstart_digits")
    synthetic = replace(config, data=replace(config.data, synthetic=True))
    loader = setup.build_train_loader(synthetic, World(), threads=1, start_step=5)
    assert isinstance(loader, SyntheticLoader)
    assert loader.next().step == 5
    with pytest.raises(ValueError, match=r"--data\.shards"):
        setup.build_train_loader(config, World(), threads=1)
