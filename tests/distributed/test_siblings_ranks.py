"""Siblings of MoCo v3 on two ranks: the golden traces, from one launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.test_ranks import launch
from tests.fastmoco.objectives import test_byol as byol
from tests.fastmoco.objectives import test_dino as dino
from tests.fastmoco.objectives import test_projector_momentum as projector_momentum
from tests.fastmoco.objectives import test_simclr as simclr
from tests.fastmoco.objectives import test_simsiam as simsiam
from tests.fastmoco.objectives import test_swav as swav

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of all cases on two ranks."""
    out = tmp_path_factory.mktemp("siblings")
    return launch(2, out, module="tests.distributed.run_siblings")


def merged(cases: Results) -> dict[str, Any]:
    """The first rank's, with the mean of both losses, and rows of both ranks' images."""
    losses = [sum(pair) / 2 for pair in zip(*(case["losses"] for case in cases), strict=True)]
    names = {"p1", "p2", "z1", "z2"} & cases[0].keys()
    rows = {name: torch.cat([case[name] for case in cases]) for name in names}
    return {**cases[0], "losses": losses, **rows}


@pytest.mark.parametrize("prefix", byol.CASES)
def test_byol(ranks: Results, prefix: str) -> None:
    byol.check_trace(merged([rank[f"byol {prefix}"] for rank in ranks]), byol.read(), prefix)


@pytest.mark.parametrize("prefix", simclr.CASES)
def test_simclr(ranks: Results, prefix: str) -> None:
    simclr.check_trace(merged([rank[f"simclr {prefix}"] for rank in ranks]), simclr.read(), prefix)


@pytest.mark.parametrize("prefix", simsiam.CASES)
def test_simsiam(ranks: Results, prefix: str) -> None:
    found = merged([rank[f"simsiam {prefix}"] for rank in ranks])
    simsiam.check_trace(found, simsiam.read(), prefix)


@pytest.mark.parametrize("keys", ["gathered", "ring"])
def test_projector_momentum(ranks: Results, keys: str) -> None:
    found = merged([rank[f"projector_momentum {keys}"] for rank in ranks])
    projector_momentum.check_trace(found, projector_momentum.read())


@pytest.mark.parametrize("prefix", swav.CASES)
def test_swav(ranks: Results, prefix: str) -> None:
    """Those of one rank with the batch divided, and the one that was made on two."""
    swav.check_trace([rank[f"swav {prefix}"] for rank in ranks], swav.read(), prefix)


def test_codes_of_swav(ranks: Results) -> None:
    data = swav.read()
    for number, rank in enumerate(ranks):
        assert swav.error(rank["swav codes"], data["mr0_codes"][number]) <= 1e-7


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_dino(ranks: Results, strategy: str) -> None:
    """One centre, and clipping by norms of whole tensors where they are sharded."""
    dino.check_trace(merged([rank[f"dino {strategy}"] for rank in ranks]), dino.read())


def test_centre_of_dino(ranks: Results) -> None:
    dino.check_ranks([rank["dino centre"] for rank in ranks], dino.read())


def test_a_queue_of_swav_and_small_crops(ranks: Results) -> None:
    """It is that of one process, which continues from the state of two ranks."""
    swav.check_queue_of_ranks([rank["swav with a queue"] for rank in ranks])
