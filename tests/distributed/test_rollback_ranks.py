"""Rollbacks and run ids on two real processes, under DDP and FSDP2."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.launching import launch
from tests.spikes import LOGGED

pytestmark = [pytest.mark.faults, pytest.mark.long, pytest.mark.slow]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of all cases."""
    out = tmp_path_factory.mktemp("rollback")
    found: list[dict[str, Any]] = launch(2, out, module="tests.distributed.run_rollback")  # type: ignore[assignment]
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_go_back_alike(ranks: list[dict[str, Any]], strategy: str) -> None:
    for rank in ranks:
        case, never = rank[f"{strategy} run"], rank[f"{strategy} never"]
        assert case["code"] == 0
        assert case["back"] == [(LOGGED, 24)]
        assert (case["sharded"] > 0) == (strategy == "fsdp")
        assert case["state"].keys() == never["state"].keys()
        assert [
            name
            for name in never["state"]
            if not torch.equal(case["state"][name], never["state"][name])
        ] == []


def test_one_id_and_one_refusal(ranks: list[dict[str, Any]]) -> None:
    ids = {rank[f"{strategy} run"]["identity"] for rank in ranks for strategy in ("ddp", "fsdp")}
    assert len(ids) == 2
    for rank in ranks:
        assert f"written by run {rank['ddp run']['identity']}" in rank["foreign"]["message"]
        assert rank["foreign"]["step"] == 30
