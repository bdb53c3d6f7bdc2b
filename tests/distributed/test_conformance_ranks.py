"""Every objective on two ranks is that on one: under DDP, under FSDP2, at once and in chunks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmoco.distributed import World
from fastmoco.objectives.build import OBJECTIVES
from tests.distributed.launching import launch
from tests.distributed.run_conformance import CASES, STEPS, VARIANTS, run_steps
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
    return run_steps(World(), *request.param)


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
        pytest.param((kind, trunk), name, id=name)
        for kind in OBJECTIVES
        for trunk in TRUNKS
        for name in CASES
        if name.startswith(f"{kind.kind} {trunk} ")
    ],
    indirect=["alone"],
)
def test_two_ranks_are_one(ranks: Results, alone: dict[str, Any], case: str) -> None:
    require_one([rank[case] for rank in ranks], alone, case)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_ranks_are_one_for_each_variant(ranks: Results, name: str) -> None:
    variant = VARIANTS[name]
    alone = run_steps(World(), variant.kind, variant=name)
    if name == "frozen trunk":  # its blocks have no gradient: the head alone is averaged
        assert set(alone["gradients"]) == {"encoder.head.weight", "encoder.head.bias"}
    for way in variant.ways:
        case = f"{name} {way}"
        require_one([rank[case] for rank in ranks], alone, case)


def test_sharded_prototypes_are_not_rounded_to_bf16(ranks: Results) -> None:
    """Their scores are divided by 0.05 and exponentiated. Other weights are gathered in bf16."""
    for found in (rank["scores in bf16"] for rank in ranks):
        assert (found["scores"] - found["expected"]).abs().max() <= 1e-6
        assert found["head"] == torch.bfloat16


def require_one(cases: Results, alone: dict[str, Any], case: str) -> None:
    """The losses, first gradients and last state of one process."""
    for step in range(STEPS):
        mean = sum(found["losses"][step] for found in cases) / len(cases)
        assert abs(mean - alone["losses"][step]) <= 1e-12
    for found in cases:
        assert gap(found["gradients"], alone["gradients"]) <= 1e-12
        assert gap(found["state"], alone["state"]) <= 1e-10
        assert found["sharded"] == ("fsdp" in case)
        assert found["records"] <= 2
        assert all(torch.equal(found["state"][n], t) for n, t in cases[0]["state"].items())
