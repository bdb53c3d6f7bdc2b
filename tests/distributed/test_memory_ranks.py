"""What two ranks under FSDP2 take is what `fastmoco plan` says."""

from __future__ import annotations

from typing import cast

import pytest

from fastmoco.planning.costs import measure_costs
from fastmoco.planning.plan import chunked_bytes, sharded, state_bytes, whole_bytes
from tests.distributed.launching import Results, launch
from tests.distributed.run_memory import IMAGES, config_of

RANKS = 2


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What both ranks took, by case; what one case frees goes back to the system."""
    with pytest.MonkeyPatch.context() as environment:
        for habit in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"):
            environment.setenv(habit, "65536")
        return launch(
            RANKS,
            tmp_path_factory.mktemp("memory"),
            module="tests.distributed.run_memory",
            fork=False,
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_the_peak_of_a_real_sharded_step_is_the_planned_one(ranks: Results, name: str) -> None:
    config, images = config_of(name), IMAGES[name]
    costs = measure_costs(config, config.precision)
    state = state_bytes(costs, "adamw", 4, shards=RANKS)
    costs = sharded(costs, 4)
    if isinstance(config.batch.chunk, int):
        step = chunked_bytes(costs, images, config.batch.chunk, config.batch.chunk, RANKS)
    else:
        step = whole_bytes(costs, images, RANKS)
    planned = state.parameters + state.gradients + state.in_flight + step  # there is no optimizer
    assert planned - state.in_flight < 0.97 * planned
    for rank in ranks:
        assert cast("dict[str, int]", rank[name])["peak"] == pytest.approx(planned, rel=0.15)
