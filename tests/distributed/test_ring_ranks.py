"""Keys in a ring over one, two and four real processes: those of gathered keys, and no stuck
rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fastmoco.distributed.ring import start_ring
from fastmoco_kernels.info_nce.op import symmetric_info_nce_loss
from tests.distributed.launching import launch
from tests.distributed.run_ring import DTYPES, RANKS, ROWS, SIZES, TEMPERATURES, sides


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of all cases: every ring is within one launch."""
    return launch(RANKS, tmp_path_factory.mktemp("ring"), module="tests.distributed.run_ring")


@pytest.mark.parametrize("size", SIZES)
def test_blocks_come_from_the_neighbour_and_three_are_held(ranks: Any, size: int) -> None:
    for number, rank in enumerate(ranks):
        me = number % size
        order = [(me - step) % size for step in range(size)]
        for dtype in DTYPES:
            values = [[10.0 + rank] for rank in order]
            expected = (order, values, min(size, 3), False)
            assert rank["orders"][f"{size} {dtype}"] == expected


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("size", SIZES)
def test_a_ring_is_the_gathered_keys(ranks: Any, size: int, temperature: str) -> None:
    q1, k2, q2, k1 = sides(size)
    number = TEMPERATURES[temperature] or 0.2
    leaves = [q.clone().requires_grad_() for q in (q1, q2)]
    whole = symmetric_info_nce_loss(
        leaves[0], k2, leaves[1], k1, temperature=number, backend="reference", accuracy=True
    )
    whole.loss.backward()
    one_process = [whole.loss.detach(), whole.top1, whole.top5]

    for limit, dtype in ((1e-12, "fp64"), (2e-5, "fp32"), (0.1, "bf16")):
        cases = [rank["losses"][f"{size} {dtype} {temperature}"] for rank in ranks[:size]]
        for case in cases:
            largest = max(1.0, *(value.abs().max().item() for value in case["definition"]))
            for way in ("gathered", "definition"):
                for ours, other in zip(case["ring"], case[way], strict=True):
                    assert (ours.double() - other.double()).abs().max() <= limit * largest
            assert all(map(torch.equal, case["ring"], case["again"]))
        if dtype != "fp64":
            continue
        # Accuracies are counts, and the mean over ranks is that of one process.
        for i, expected in zip((0, 3, 4), one_process, strict=True):
            mean = sum(case["ring"][i] for case in cases) / size
            assert abs(mean - expected) <= 1e-12 * max(1.0, abs(float(expected)))
        for direction, leaf in enumerate(leaves, start=1):
            rows = torch.cat([case["ring"][direction] for case in cases]) / size
            assert (rows - leaf.grad).abs().max() <= 1e-12 * max(1.0, float(leaf.grad.abs().max()))
        assert len(rows) == size * ROWS


def test_a_step_of_the_objective_is_that_on_gathered_keys(ranks: Any) -> None:
    for rank in ranks:
        ring, gathered = (rank["objectives"][way] for way in ("ring", "gathered"))
        assert len(ring["output"]) == len(gathered["output"]) == 6  # loss, rows, accuracy
        for ours, other in zip(ring["output"], gathered["output"], strict=True):
            assert (ours - other).abs().max() <= 1e-12
        assert ring["gradients"].keys() == gathered["gradients"].keys()
        for name, gradient in gathered["gradients"].items():
            assert (ring["gradients"][name] - gradient).abs().max() <= 1e-12, name


def test_all_ranks_take_the_ring_where_one_has_too_little_memory(ranks: Any) -> None:
    """A rank that gathers would wait for those in a ring."""
    expected = {"too little on one": ("ring", True), "enough": ("gathered", False)}
    for name, way in expected.items():
        found = [rank["choices"][name] for rank in ranks]
        assert [one[:2] for one in found] == [way] * RANKS
        assert len({one[2] for one in found}) == 1  # the reason, with the least memory
    for rank in ranks:
        ring, gathered = (rank["choices"][name][3] for name in expected)
        assert ring == pytest.approx(gathered, abs=1e-12)


def test_uneven_parts_are_refused_as_for_gathered_keys(ranks: Any) -> None:
    for rank in ranks:
        message = rank["uneven"]["ring"]
        assert message.startswith(f"keys per rank={[4, 4, 4, 3]}: every rank must have the same")
        assert message == rank["uneven"]["gathered"]


def test_a_rank_that_stops_ends_the_others_with_an_error(ranks: Any) -> None:
    for rank in ranks[:-1]:
        lost, message = rank["stopped"]["ended"]
        assert lost, message
        assert "imed out" in message or "closed" in message.lower(), message
    assert ranks[-1]["stopped"]["ended"] is None


def test_a_ring_of_one_process_needs_no_process_group() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    ((rank, block),) = start_ring(rows)
    assert rank == 0
    assert torch.equal(block, rows)
    assert not block.requires_grad


def test_the_launch_had_all_ranks(ranks: Any, tmp_path: Path) -> None:
    assert [rank["world"] for rank in ranks] == [(number, RANKS) for number in range(RANKS)]
