"""On how many ranks each step of a run was trained: `ranks` in its `config.json`, a pair for each
start, [steps done before, ranks]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAME = "ranks"


def with_start(saved: Mapping[str, Any], step: int, world_size: int) -> list[list[int]]:
    """The pairs of a run after a start; those of steps that are trained again are dropped.

    Args:
        saved: the content of `config.json` before.
        step: steps done before this start.
        world_size: ranks of this start.
    """
    return [*(pair for pair in _pairs(saved) if pair[0] < step), [step, world_size]]


def world_size_at(saved: Mapping[str, Any], step: int) -> int | None:
    """The ranks that trained a step; None where `config.json` does not contain it.

    Args:
        saved: the content of `config.json`.
        step: from 1.
    """
    before = [world_size for start, world_size in _pairs(saved) if start < step]
    return before[-1] if before else None


def _pairs(saved: Mapping[str, Any]) -> list[list[int]]:
    """The pairs in a `config.json`, which anybody may have edited: none unless all are sound."""
    found = saved.get(NAME)
    if not isinstance(found, list):
        return []
    pairs = [pair for pair in found if isinstance(pair, list) and len(pair) == 2]
    sound = all(type(start) is int and type(size) is int and size > 0 for start, size in pairs)
    return pairs if sound and len(pairs) == len(found) else []
