"""Costs of a step for ranks that test something else: to count them takes each rank seconds."""

from __future__ import annotations

from contextlib import AbstractContextManager
from unittest import mock

from fastmoco.planning.costs import Line, StepCosts, Units

SOME_COSTS = StepCosts(
    trainable=104_192,
    parameters=211_648,
    coupling_reason="",
    view_bytes=1536,
    feature_bytes=2560,
    key_bytes=128,
    graph=Line(169_872, 0),
    train=Line(196_432, 166_656),
    forward=Line(113_152, 0),
    heads=Line(3712, 2760),
    query_flops=3.8e6,
    recompute_flops=0.0,
    step_flops=15.1e6,
    units=Units(block=49_984, largest=49_984, trunk=100_160, heads=4032, frozen=3840, bytes=4),
)
"""MoCo v3 on a `vit_nano` and images of 8 x 8 in float32."""


def with_some_costs() -> AbstractContextManager[object]:
    """Plans take these costs for those of the run."""
    return mock.patch("fastmoco.planning.choose.measure_costs", return_value=SOME_COSTS)
