"""The choice between gathered keys and a ring, and the bytes that a plan counts for either."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from fastmoco.config import BatchConfig, MoCoV3Config
from fastmoco.distributed import World
from fastmoco.objectives.build import build_objective
from fastmoco.planning.choose import choose_plan
from fastmoco.planning.keys import GATHERED_SHARE, choose_keys, other_keys_bytes, ring_above
from fastmoco.planning.plan import chunked_bytes, largest_batch, whole_bytes
from tests.distributed.run_trainer import CONFIG
from tests.fastmoco.planning.test_plan import COSTS

BYTES, IMAGES, WORLD = 100.0, 10, 8
GATHERED = 2 * 7 * IMAGES * BYTES
RING = 3 * IMAGES * BYTES
LEAST = GATHERED / GATHERED_SHARE
"""Memory of which gathered keys are the largest share allowed."""


@pytest.mark.parametrize(
    ("wanted", "world", "memory", "ring", "text"),
    [
        ("auto", WORLD, 1.01 * LEAST, False, "within 5% of"),
        ("auto", WORLD, 0.99 * LEAST, True, "above 5% of"),
        ("auto", 2, 1.0, False, "would not save memory on 2 processes"),
        ("auto", 1, 1.0, False, ""),
        ("ring", WORLD, 1e12, True, "requested"),
        ("ring", 2, 1e12, True, "requested"),
        ("gathered", WORLD, 1.0, False, "requested"),
    ],
)
def test_a_ring_is_taken_where_gathered_keys_are_large(wanted, world, memory, ring, text) -> None:
    choice = choose_keys(wanted, BYTES, IMAGES, world, memory)
    assert choice.ring == ring
    assert text in choice.reason
    taken = other_keys_bytes(BYTES, IMAGES, world, ring_above(wanted, memory))
    assert taken == (RING if ring else 2 * (world - 1) * IMAGES * BYTES)


def test_a_plan_counts_the_keys_that_it_chose() -> None:
    wide = replace(COSTS, key_bytes=1e6)
    in_a_ring = replace(wide, ring_above=0.0)
    for needs in (
        lambda costs, world: whole_bytes(costs, 100, world),
        lambda costs, world: chunked_bytes(costs, 100, 10, 0, world),
    ):
        saved = needs(wide, 16) - needs(in_a_ring, 16)
        assert saved == pytest.approx((2 * 15 - 3) * 100 * 1e6)
        # A ring's bytes do not grow with the number of processes.
        assert needs(in_a_ring, 16) == needs(in_a_ring, 4096)
        assert needs(wide, 4096) > 100 * needs(wide, 16)
    assert largest_batch(in_a_ring, 1e9, world_size=16) > largest_batch(wide, 1e9, world_size=16)


def _plan(keys: str, free: float, ranks: int = 8, **batch: Any) -> Any:
    objective_config = MoCoV3Config(temperature=0.2, keys=keys)  # type: ignore[arg-type]
    config = replace(CONFIG, objective=objective_config, batch=BatchConfig(**batch))
    config = replace(config, global_batch_size=8 * ranks, precision="fp32")
    objective = build_objective(config, torch.device("cpu"))
    with mock.patch("fastmoco.planning.choose.free_bytes", return_value=int(free)):
        return choose_plan(config, objective, World(world_size=ranks), "fp32")


def test_a_run_takes_the_ring_above_a_planned_size_and_says_why() -> None:
    gathered = 2 * 7 * 8 * 4 * CONFIG.model.projection_dim * 4  # 8 images a process, float32
    edge = gathered / GATHERED_SHARE / 0.9
    for chunk in ("none", 4):
        small, large = (_plan("auto", share * edge, chunk=chunk) for share in (1.01, 0.99))
        assert (small.keys, large.keys) == ("gathered", "ring")
        assert "; keys gathered (" in str(small)
        assert "; keys in a ring (" in str(large)
        assert "above 5% of" in str(large)
        assert large.to_json()["keys"] == "ring"
    assert _plan("ring", 1e12, chunk="none").keys == "ring"
    assert _plan("gathered", 1e3, chunk="none").keys == "gathered"
    alone = _plan("ring", 1e12, ranks=1, chunk="none")
    assert alone.keys == ""
    assert "keys" not in str(alone)


def test_what_is_not_a_way_is_refused() -> None:
    with pytest.raises(ValueError, match="keys='tree': must be auto, gathered or ring"):
        MoCoV3Config(keys="tree")  # type: ignore[arg-type]
