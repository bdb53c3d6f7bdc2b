"""Every objective on two ranks is that on one: under DDP, under FSDP2, at once and in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmoco.config import MoCoV3Config, ObjectiveConfig
from fastmoco.distributed import World
from fastmoco.objectives.build import OBJECTIVES
from tests.distributed.run_conformance import CASES, STEPS, VARIANTS, WAYS, run_steps
from tests.distributed.test_ranks import launch

Results = list[dict[str, Any]]
KINDS = [pytest.param(kind, id=kind.kind) for kind in OBJECTIVES]


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
    return run_steps(World(), request.param)


def gap(ours: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Largest difference, over the largest number where that exceeds 1."""
    assert ours.keys() == other.keys()
    return max(
        float((ours[n].double() - t.double()).abs().max()) / max(1.0, float(t.double().abs().max()))
        for n, t in other.items()
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("kind", "alone"),
    [(p.values[0], p.values[0]) for p in KINDS],
    ids=[p.id for p in KINDS],
    indirect=["alone"],
)
def test_two_ranks_are_one(
    ranks: Results, alone: dict[str, Any], kind: type[ObjectiveConfig], way: str
) -> None:
    require_one([rank[f"{kind.kind} {way}"] for rank in ranks], alone)
    assert ranks[0][f"{kind.kind} {way}"]["sharded"] == way.startswith("fsdp")


@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_are_one_for_each_variant(ranks: Results, variant: str) -> None:
    alone = run_steps(World(), MoCoV3Config, variant=variant)
    require_one([rank[variant] for rank in ranks], alone)


def require_one(cases: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Losses, gradients and state of two ranks are those of one process."""
    for step in range(STEPS):
        mean = sum(case["losses"][step] for case in cases) / len(cases)
        assert abs(mean - alone["losses"][step]) <= 1e-12
    for case in cases:
        assert gap(case["gradients"], alone["gradients"]) <= 1e-12
        assert gap(case["state"], alone["state"]) <= 1e-10
        assert all(torch.equal(case["state"][n], t) for n, t in cases[0]["state"].items())
