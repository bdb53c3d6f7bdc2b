"""Checkpoints of real gloo processes: any number of ranks reads what any number wrote, and a fault
on one is one on all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastmoco.checkpoint import list_checkpoints, load_latest
from fastmoco.training import state as training_state
from tests.checkpoint_content import assert_same
from tests.distributed.launching import Results, launch
from tests.distributed.run_checkpoints import STEPS, model_and_optimizer, run_save, train

pytestmark = [pytest.mark.faults, pytest.mark.slow]

FAULTS = ("full disk on one", "refused on one", "background", "hung rank", "dead rank")
KINDS = ("sharded", "plain", "one file")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    """The folder into which two ranks saved in both ways, and this process in one file; and what
    they noted."""
    out = tmp_path_factory.mktemp("saved")
    results = launch(
        2, out, "save sharded", "save plain", *FAULTS, module="tests.distributed.run_checkpoints"
    )
    alone = run_save(out / "one file", sharded=False)
    return out, [*results, {"save one file": alone}]


def expected(results: Results, kind: str) -> dict[str, object]:
    """What the first rank noted when it saved."""
    case = results[2 if kind == "one file" else 0][f"save {kind}"]
    assert isinstance(case, dict)
    return case


def without_rng(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("rng.")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_process_without_a_group_loads_what_any_ranks_saved(
    saved: tuple[Path, Results], kind: str
) -> None:
    out, results = saved
    case = expected(results, kind)
    assert not torch.distributed.is_initialized()
    checkpoint = load_latest(out / kind)
    assert checkpoint is not None
    assert (checkpoint.state, checkpoint.step) == ({"who": "us"}, STEPS)
    model, optimizer = model_and_optimizer(1, sharded=False)
    training_state.restore(model, optimizer, checkpoint)
    assert_same(without_rng(training_state.collect(model, optimizer)), without_rng(case["saved"]))
    assert train(model, optimizer, range(STEPS, 2 * STEPS)) == pytest.approx(
        case["after"], abs=1e-12
    )


@pytest.mark.parametrize(
    "world_size",
    [
        pytest.param(1, marks=pytest.mark.long, id="1 rank"),
        pytest.param(2, id="2 ranks"),
        pytest.param(4, marks=pytest.mark.long, id="4 ranks"),
    ],
)
def test_any_number_of_ranks_loads_what_any_number_saved(
    saved: tuple[Path, Results], tmp_path: Path, world_size: int
) -> None:
    out, results = saved
    for kind in KINDS:
        shutil.copytree(out / kind, tmp_path / kind)
    names = [f"load {kind} into {target}" for kind in KINDS for target in ("shards", "whole")]
    ranks = launch(world_size, tmp_path, *names, module="tests.distributed.run_checkpoints")
    for number, rank in enumerate(ranks):
        for name in names:
            case, truth = (
                rank[name],
                expected(results, name.split()[1] if "one file" not in name else "one file"),
            )
            assert_same(without_rng(case["loaded"]), without_rng(truth["saved"]))
            assert case["after"] == pytest.approx(truth["after"], abs=1e-12), name
            assert case["in place"], name
            assert case["moments are sharded"], name
            assert case["skipped"] == ()
            # its own random numbers; those of the first rank where the save knows nothing of this
            # one
            torch.manual_seed(100 + number if number < 2 and "one file" not in name else 100)
            assert torch.equal(case["drawn"], torch.rand(1)), name


def test_every_rank_writes_its_part_and_the_files_are_private(saved: tuple[Path, Results]) -> None:
    out, _ = saved
    for kind in ("sharded", "plain"):
        (folder,) = list_checkpoints(out / kind)
        sizes = {path.name: path.stat().st_size for path in folder.glob("*.distcp")}
        assert sorted(sizes) == ["__0_0.distcp", "__1_0.distcp"]
        assert min(sizes.values()) > max(sizes.values()) / 3, "the load is not shared"
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
        assert folder.stat().st_mode & 0o777 == 0o700


def test_a_full_disk_on_one_rank_is_an_error_on_all_and_no_folder(
    saved: tuple[Path, Results],
) -> None:
    for rank in saved[1][:2]:
        case = rank["full disk on one"]
        assert "step 2 was not written: rank 1: " in case["message"]
        assert "Earlier checkpoints are untouched. Free space under" in case["message"]
        assert case["left"] == ["step_00000001"]
        assert case["then"] == ["step_00000001", "step_00000002"]


def test_what_one_rank_must_not_save_no_rank_saves(saved: tuple[Path, Results]) -> None:
    for rank in saved[1][:2]:
        case = rank["refused on one"]
        assert case["poisoned"].startswith("rank 1: mine is not finite")
        assert "rank 1: tensor 'mine' is torch.sparse_coo" in case["sparse"]
        assert not case["exists"]


def test_a_save_in_the_background_holds_the_values_of_the_call_while_ranks_train(
    saved: tuple[Path, Results],
) -> None:
    for rank in saved[1][:2]:
        case = rank["background"]
        first, second = case["errors"]
        assert first is None
        assert "step 9 was not written: rank 0: " in second
        assert (case["left"], case["step"]) == ([f"step_{STEPS:08d}"], STEPS)
        loaded = without_rng(case["loaded"])
        assert_same(loaded, without_rng(case["saved"]))


def test_a_rank_that_hangs_is_an_error_on_all_after_the_deadline(
    saved: tuple[Path, Results],
) -> None:
    for rank in saved[1][:2]:
        case = rank["hung rank"]
        assert "step 2 was not written: " in case["message"]
        assert case["left"] == ["step_00000001"]


def test_a_rank_that_ends_before_its_write_leaves_the_checkpoint_before(
    saved: tuple[Path, Results],
) -> None:
    out, results = saved
    case = results[0]["dead rank"]
    assert "step 2 was not written: " in case["message"]
    assert case["left"] == ["step_00000001"]
    assert "dead rank" not in results[1]
    checkpoint = load_latest(out / "dead")
    assert checkpoint is not None
    assert checkpoint.skipped == ()
    assert torch.equal(checkpoint.tensors["mine"], torch.full((3000,), -1.0))
