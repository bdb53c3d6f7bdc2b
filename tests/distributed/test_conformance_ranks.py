"""Every objective on two ranks is that on one: under DDP, under FSDP2, at once and in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmoco.distributed import World
from fastmoco.objectives.build import OBJECTIVES
from fastmoco.recipes.supervised import SupervisedConfig
from tests.distributed.run_conformance import CASES, FROZEN, STEPS, run_steps
from tests.distributed.test_ranks import launch
from tests.fastmoco.objectives.test_conformance import TRUNKS

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of all cases on two ranks."""
    return launch(
        2,
        tmp_path_factory.mktemp("conformance"),
        *CASES,
        module="tests.distributed.run_conformance",
    )


@pytest.fixture(scope="module")
def alone(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The same steps on the whole batch in this process."""
    kind, trunk = request.param
    return run_steps(World(), kind, trunk=trunk)


def gap(ours: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference, over the largest number where that exceeds 1."""
    assert ours.keys() == other.keys()
    return max(
        float((ours[n].double() - t.double()).abs().max()) / max(1.0, float(t.double().abs().max()))
        for n, t in other.items()
    )


@pytest.mark.parametrize(
    ("alone", "case"),
    [
        pytest.param((kind, trunk), case, id=case)
        for kind in OBJECTIVES
        for trunk in TRUNKS
        for case in CASES
        if case.startswith(f"{kind.kind} {trunk} ")
    ],
    indirect=["alone"],
)
def test_two_ranks_are_one(ranks: Results, alone: dict[str, Any], case: str) -> None:
    require_one([rank[case] for rank in ranks], alone, case)


@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp chunked"])
def test_a_frozen_trunk_on_two_ranks_is_that_on_one(ranks: Results, way: str) -> None:
    """Its blocks have no gradient, so nothing but the head is sharded and averaged."""
    alone = run_steps(World(), SupervisedConfig, changes=FROZEN)
    assert set(alone["gradients"]) == {"encoder.head.weight", "encoder.head.bias"}
    require_one([rank[f"frozen {way}"] for rank in ranks], alone, way)


def require_one(cases: Results, alone: dict[str, Any], way: str) -> None:
    """The losses, first gradients and last state of one process."""
    for step in range(STEPS):
        mean = sum(case["losses"][step] for case in cases) / len(cases)
        assert abs(mean - alone["losses"][step]) <= 1e-12
    for case in cases:
        assert gap(case["gradients"], alone["gradients"]) <= 1e-12
        assert gap(case["state"], alone["state"]) <= 1e-10
        assert case["sharded"] == ("fsdp" in way)
        assert all(torch.equal(case["state"][n], t) for n, t in cases[0]["state"].items())
