"""Plans fit their budget, keep as much as fits, and say what they cost; memory that is free is
found where the kernel says it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmoco.planning.costs import Line, StepCosts, Units
from fastmoco.planning.free_memory import free_bytes
from fastmoco.planning.plan import (
    PARTS,
    StepPlan,
    best_plan,
    busy_chunk,
    chunked_bytes,
    largest_batch,
    lean_bytes,
    parts_of,
    plan_step,
    sharded,
    state_bytes,
    tokens_of_views,
    whole_bytes,
)

COSTS = StepCosts(
    trainable=100,
    parameters=180,
    coupling_reason="",
    view_bytes=10,
    feature_bytes=4,
    key_bytes=2,
    graph=Line(1000, 50),
    train=Line(1100, 60),
    forward=Line(80, 40),
    heads=Line(30, 70),
    query_flops=25.0,
    recompute_flops=0.0,
    step_flops=100.0,
    units=Units(0, 0, 0, 0, 0, 4),
)
TOKENS = 197


def test_all_at_once_where_it_fits() -> None:
    plan = plan_step(COSTS, images=100, budget=whole_bytes(COSTS, 100), tokens=TOKENS)
    assert (plan.chunk, plan.kept, plan.chunks, plan.overhead) == (0, 0, 1, 0.0)


@pytest.mark.parametrize("budget", [50e3, 150e3, 400e3, 900e3])
def test_a_plan_fits_and_keeps_all_that_fits(budget: float) -> None:
    images = 1000
    plan = plan_step(COSTS, images=images, budget=budget, tokens=TOKENS)
    assert plan.chunk & (plan.chunk - 1) == 0
    assert plan.fits
    assert plan.peak_bytes <= budget
    kept = plan.kept_images
    assert plan.chunks == -(-kept // plan.chunk) - (-(images - kept) // plan.chunk)
    assert plan.kept == kept // plan.chunk
    assert plan.peak_bytes == chunked_bytes(COSTS, images, plan.chunk, kept)
    # Parts of a chunk are kept too: what stays idle is less than one of them.
    assert chunked_bytes(COSTS, images, plan.chunk, kept + max(1, plan.chunk // PARTS)) > budget
    assert plan.overhead == pytest.approx((1 - kept / images) * 0.25)


LEAN = replace(COSTS, lean=Line(200, 20), lean_train=Line(400, 40), lean_flops=12.0)


@pytest.mark.parametrize("budget", [100e3, 250e3, 400e3, 900e3])
def test_the_residual_stream_alone_is_kept_where_that_computes_less(budget: float) -> None:
    images = 1000
    plan, without = (
        plan_step(costs, images=images, budget=budget, tokens=TOKENS) for costs in (LEAN, COSTS)
    )
    assert plan.fits
    assert plan.overhead <= without.overhead
    # 200 bytes an image are there or not; half of a second forward is less than all of it.
    assert plan.lean == (lean_bytes(LEAN, images, plan.chunk) <= budget)
    if plan.lean:
        assert plan.peak_bytes == lean_bytes(LEAN, images, plan.chunk, plan.kept_images) <= budget
        assert plan.overhead == pytest.approx((1 - plan.kept_images / images) * 0.12)
        assert sum(parts_of(LEAN, plan, images).values()) == pytest.approx(plan.peak_bytes)
        assert "the others the residual stream" in str(plan)
    assert lean_bytes(COSTS, images, 64) == float("inf")


def test_a_chunk_and_kept_graphs_may_be_asked_for() -> None:
    plan = plan_step(COSTS, images=1000, budget=1e9, tokens=TOKENS, chunk=64, kept=3)
    assert (plan.chunk, plan.kept, plan.chunks) == (64, 3, 16)
    assert plan_step(COSTS, images=1000, budget=1e9, tokens=TOKENS, chunk=64).kept == 16
    assert plan_step(COSTS, images=50, budget=1e9, tokens=TOKENS, chunk=64).chunk == 50
    assert plan_step(COSTS, images=1000, budget=1, tokens=TOKENS, chunk="none").chunk == 0


def test_compiled_chunks_keep_copies_of_weights_each_for_itself() -> None:
    apart = replace(COSTS, apart=True)
    assert chunked_bytes(apart, 100, 8, 8) == chunked_bytes(COSTS, 100, 8, 8)
    assert (
        chunked_bytes(apart, 100, 8, 20) == chunked_bytes(COSTS, 100, 8, 20) + 2 * COSTS.graph.fixed
    )


def _plan(overhead: float, fits: bool = True) -> StepPlan:
    return StepPlan(
        chunk=1, kept=0, chunks=1, overhead=overhead, peak_bytes=1.0, reason="", fits=fits
    )


def test_of_plans_that_fit_the_one_that_computes_least_twice_is_taken() -> None:
    large, small, none = _plan(0.1), _plan(0.05), _plan(0.0)
    assert best_plan([large, small]) is small
    assert best_plan(iter([large, none, pytest.fail])) is none  # later ones are not even made
    tight = _plan(0.0, fits=False)
    assert best_plan([tight, large]) is large
    first, second = _plan(0.1), _plan(0.1)
    assert best_plan([first, second]) is first


def test_what_cannot_fit_is_said() -> None:
    plan = plan_step(COSTS, images=1000, budget=1000, tokens=TOKENS)
    assert plan.chunk == 1
    assert "may not be enough" in plan.reason
    coupled = plan_step(
        replace(COSTS, coupling_reason="of batch norms"), images=1000, budget=1000, tokens=TOKENS
    )
    assert coupled.chunk == 0
    assert "chunks would help, but of batch norms" in coupled.reason


@pytest.mark.parametrize("chunk", [0, 8])
@pytest.mark.parametrize("world_size", [1, 4])
def test_the_largest_batch_fits_and_one_more_does_not(chunk: int, world_size: int) -> None:
    def needed(images: int) -> float:
        if chunk:
            return chunked_bytes(COSTS, images, chunk, 0, world_size)
        return whole_bytes(COSTS, images, world_size)

    largest = largest_batch(COSTS, 100e3, chunk=chunk, world_size=world_size)
    assert needed(largest) <= 100e3 < needed(largest + 1)
    assert largest_batch(COSTS, 10, chunk=chunk) == 0


def test_state_is_shared_over_shards() -> None:
    whole = state_bytes(COSTS, "adamw", 4)
    assert (whole.parameters, whole.gradients, whole.optimizer) == (720, 400, 800)
    assert state_bytes(COSTS, "adamw", 4, shards=8).total == whole.total / 8
    units = Units(block=10, largest=30, trunk=40, heads=50, frozen=20, bytes=2)
    shards = state_bytes(replace(COSTS, units=units), "adamw", 4, shards=8)
    assert (shards.parameters, shards.gradients, shards.optimizer) == ((160 / 8 + 20) * 4, 50, 100)
    assert shards.in_flight == (10 + 30) * (
        2 + 4
    )  # a unit and its gradient, summed in float32; the next, the last


def test_a_sharded_step_copies_no_weights_and_piles_gradients_up_in_chunks() -> None:
    units = Units(block=10, largest=30, trunk=20, heads=30, frozen=20, bytes=2)
    half = sharded(replace(COSTS, units=units), 4)
    assert (half.graph.fixed, half.train.fixed, half.forward.fixed, half.heads.fixed) == (
        10,
        20,
        0,
        10,
    )
    single = sharded(replace(COSTS, units=units._replace(bytes=4)), 4)
    assert single == replace(COSTS, units=units._replace(bytes=4), piled_bytes=80.0)
    assert chunked_bytes(single, 100, 8) == chunked_bytes(COSTS, 100, 8) + 80
    assert whole_bytes(single, 100) == whole_bytes(COSTS, 100)
    assert state_bytes(COSTS, "lars", 4).optimizer == 400


def test_chunks_keep_a_device_busy() -> None:
    assert busy_chunk(197) == 128
    assert tokens_of_views([224, 224], 16) == tokens_of_views([224], 16) == 197
    rows = 2 * 197 + 8 * 37
    assert tokens_of_views([224, 224] + [96] * 8, 16) == rows / 2
    assert busy_chunk(rows // 2) == 64
    assert 2 * busy_chunk(17) * 17 >= 2**15


def _machine(
    root: Path, available_kb: int, membership: str, files: dict[str, str]
) -> dict[str, Path]:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(
        f"MemTotal: 99 kB\nMemAvailable:   {available_kb} kB\nHugePages_Total: 0\n"
    )
    (root / "proc" / "self" / "cgroup").write_text(membership)
    for name, text in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {"proc": root / "proc", "cgroups": root / "cgroup"}


V2 = {"memory.max": "max", "memory.current": "5", "memory.stat": "inactive_file 0\n"}


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("", {}, 1024_000),
        ("0::/\n", {}, 1024_000),
        # its own group has no limit, the one above has, and part of what is used are files that may
        # go
        (
            "0::/user/run\n",
            {f"user/run/{k}": v for k, v in V2.items()}
            | {
                "user/memory.max": "9000",
                "user/memory.current": "4000",
                "user/memory.stat": "anon 1\ninactive_file 500\n",
            },
            5500,
        ),
        # the path is the host's, the mount shows the container's own group
        (
            "0::/host/path\n",
            {"memory.max": "7000", "memory.current": "8000", "memory.stat": "inactive_file 0\n"},
            0,
        ),
        (
            "4:cpu,memory:/job\n0::/\n",
            {
                "memory/job/memory.limit_in_bytes": "6000",
                "memory/job/memory.usage_in_bytes": "1000",
                "memory/job/memory.stat": "total_inactive_file 100\n",
            },
            5100,
        ),
    ],
)
def test_free_memory_is_the_least_of_machine_and_groups(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    membership: str,
    files: dict[str, str],
    expected: int,
) -> None:
    where = _machine(tmp_path, 1000, membership, files)
    assert free_bytes(torch.device("cpu"), **where) == expected
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_bytes(torch.device("cpu"), **where) == expected // 2


def test_a_limit_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    where = _machine(tmp_path, 1000, "0::/\n", {})
    (tmp_path / "cgroup" / "memory.max").mkdir(parents=True)
    assert free_bytes(torch.device("cpu"), **where) == 1024_000


def test_a_system_without_proc_is_asked_for_its_pages_or_refused_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As macOS, which says how much there is, and not how much is free."""
    nowhere = {"proc": tmp_path / "proc", "cgroups": tmp_path / "cgroup"}
    monkeypatch.setattr(os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 16384}.__getitem__)
    assert free_bytes(torch.device("cpu"), **nowhere) == 500 * 16384

    def unknown(name: str) -> int:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", unknown)
    with pytest.raises(ValueError, match=r"set --batch\.chunk to a number of images, or to none"):
        free_bytes(torch.device("cpu"), **nowhere)


def test_this_machine_has_some() -> None:
    assert free_bytes(torch.device("cpu")) > 2**20
