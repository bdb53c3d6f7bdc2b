"""Siblings of MoCo v3 on two ranks: the golden traces, from one launch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmoco.checkpoint import list_checkpoints
from fastmoco.distributed import World
from fastmoco.training.trainer import Trainer
from fastmoco_pipelines import pack_digits
from tests.distributed.launching import launch
from tests.fastmoco.objectives import test_byol as byol
from tests.fastmoco.objectives import test_dino as dino
from tests.fastmoco.objectives import test_moco as moco
from tests.fastmoco.objectives import test_projector_momentum as projector_momentum
from tests.fastmoco.objectives import test_sdssl as sdssl
from tests.fastmoco.objectives import test_simclr as simclr
from tests.fastmoco.objectives import test_simsiam as simsiam
from tests.fastmoco.objectives import test_swav as swav

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks leave their files."""
    return tmp_path_factory.mktemp("siblings")


@pytest.fixture(scope="module")
def ranks(out: Path) -> Results:
    """Results of all cases on two ranks."""
    pack_digits(out / "digits", seed=0)
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


def test_moco(ranks: Results) -> None:
    """The file was made on two ranks: losses, gradients and running averages are those of each."""
    cases = [rank["moco"] for rank in ranks]
    moco.check_trace([case["trace"] for case in cases], moco.read())
    moco.check_queue([case["queue"] for case in cases], moco.read(), "mr")


def test_a_run_of_moco_continues_on_another_number_of_ranks(
    ranks: Results, out: Path, tmp_path: Path
) -> None:
    """Two ranks end with equal weights and queues, and so does one that continues from their
    middle: batch norms have the same groups of images."""
    first, second = (rank["moco run"] for rank in ranks)
    middle = list_checkpoints(out / "moco" / "checkpoints")[0]
    shutil.copytree(middle, tmp_path / "checkpoints" / middle.name)
    trainer = Trainer.build(first["config"], tmp_path, World(), trust=True)
    try:
        assert trainer.run() == 0
        alone = dict(trainer.objective.state_dict())
        own = trainer.objective.per_rank
    finally:
        trainer.close()
    assert alone["queue_ptr"] == second["state"]["queue_ptr"] > 0
    for name, tensor in first["state"].items():
        if name in own:
            assert not torch.equal(tensor, second["state"][name]), name
        else:
            assert torch.equal(tensor, second["state"][name]), name
            torch.testing.assert_close(tensor, alone[name], rtol=1e-9, atol=1e-10)


def test_a_queue_of_swav_and_small_crops(ranks: Results) -> None:
    """It is that of one process, which continues from the state of two ranks."""
    swav.check_queue_of_ranks([rank["swav with a queue"] for rank in ranks])


def test_sdssl(ranks: Results) -> None:
    """On SimCLR with the gradient of the official code, and with that of the global loss."""
    sdssl.check_moco([rank["sdssl moco"] for rank in ranks])
    sdssl.check_simclr([rank["sdssl simclr"] for rank in ranks])
    sdssl.check_true_gradient([rank["sdssl simclr, true"] for rank in ranks])
