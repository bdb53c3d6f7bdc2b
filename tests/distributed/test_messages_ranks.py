"""The collectives that the model of scale counts are those of real steps on two ranks."""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import pytest

from fastmoco.planning.plan import StepPlan
from fastmoco.planning.scale.layout import layout_of
from fastmoco.planning.scale.messages import Ranks, step_messages
from tests.distributed.launching import launch
from tests.distributed.run_messages import CASES, IMAGES, config_of


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, object]]:
    """What every rank has sent, by case."""
    return launch(2, tmp_path_factory.mktemp("ranks"), module="tests.distributed.run_messages")


@pytest.mark.parametrize("name", CASES)
def test_every_collective_of_a_real_step_is_counted(
    ranks: list[dict[str, object]], name: str
) -> None:
    config = config_of(name)
    layout = layout_of(config, config.precision)
    chunk, kept = CASES[name].get("chunk", 0), CASES[name].get("kept", 0)
    plan = StepPlan(
        chunk=chunk,
        kept=kept,
        chunks=1,
        kept_images=IMAGES if layout.separate else chunk * kept,
        overhead=0.0,
        peak_bytes=0.0,
        reason="",
    )
    shards = 2 if CASES[name]["strategy"] == "fsdp" else 1
    counted: Counter[tuple[str, float]] = Counter()
    for message in step_messages(
        config,
        layout,
        Ranks(total=2, shards=shards, on_cpu=True),
        plan,
        config.precision,
    ):
        counted[message.kind, message.bytes] += message.number
    assert config.global_batch_size == IMAGES * 2
    for rank in ranks:
        assert cast("Counter[Any]", rank[name]) == counted
