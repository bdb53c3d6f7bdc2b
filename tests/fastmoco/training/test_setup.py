"""Choices that depend on the machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastmoco.distributed.mesh import World
from fastmoco.models.precision import choose_precision
from fastmoco.objectives.build import build_objective
from fastmoco.recipes import get_recipe
from fastmoco.training import setup
from fastmoco_pipelines import SyntheticLoader

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "chosen"),
    [({"avx512_bf16": True}, "bf16"), ({"avx512_bf16": False, "bf16": False}, "fp32"), ({}, "fp32")],
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


def test_processes_share_the_cores(monkeypatch):
    config, before = get_recipe("quickstart_digits"), torch.get_num_threads()
    try:
        assert setup.share_cores(replace(config, threads=1)) == 1
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "100000")
        assert setup.share_cores(config) == 1
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_synthetic_images_need_no_shards():
    config = get_recipe("quickstart_digits")
    synthetic = replace(config, data=replace(config.data, synthetic=True))
    loader = setup.build_train_loader(synthetic, World(), threads=1, start_step=5)
    assert isinstance(loader, SyntheticLoader)
    assert loader.next().step == 5
    with pytest.raises(ValueError, match=r"--data\.shards"):
        setup.build_train_loader(config, World(), threads=1)
