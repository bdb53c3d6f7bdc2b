"""A step in chunks over 1, 2 and 4 real gloo processes against the whole batch in one: equal, and
every mutant caught."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.launching import Results, launch
from tests.distributed.test_ranks import distance, one_process

EXACT = (
    "fp64",
    "fp64 kept 1",
    "fp64 kept all",
    "fp64 ragged",
    "fp64 ranks differ",
    "small buckets",
    "fp32",
    "fp32 kept 1",
)
LEAST_GRADIENTS = 1000
"""Numbers in a message that can only be gradients: statistics of two views of 40 channels are
160."""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(1, id="1 rank"),
        pytest.param(2, id="2 ranks"),
        pytest.param(4, id="4 ranks", marks=pytest.mark.slow),
    ],
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of all cases, once a world size."""
    return launch(
        request.param, tmp_path_factory.mktemp("chunked"), module="tests.distributed.run_chunked"
    )


@pytest.mark.parametrize("name", EXACT)
def test_loss_gradients_buffers_and_keys_equal_one_process(ranks: Results, name: str) -> None:
    single = name.startswith("fp32")
    tolerance = 1e-5 if single else 1e-12
    objective, output = one_process("patch", torch.float32 if single else torch.float64)
    cases = [rank[name] for rank in ranks]
    mean = sum(case["output"][0] for case in cases) / len(ranks)
    assert abs(mean - output[0]) <= tolerance
    for i, whole in enumerate(output[1:5], start=1):
        error = (torch.cat([case["output"][i] for case in cases]) - whole).abs().max()
        assert error <= tolerance * max(1.0, whole.abs().max().item())
    for case in cases:
        assert distance(case, objective) <= tolerance
        assert all(torch.equal(case["gradients"][n], g) for n, g in cases[0]["gradients"].items())
        for n, buffer in objective.named_buffers():
            assert (case["buffers"][n] - buffer).abs().max() <= tolerance, n


def test_gradients_cross_ranks_once(ranks: Results) -> None:
    """What is summed over ranks beside the gradients is the statistics of the heads, as in a step
    on the whole batch."""
    statistics = [size for size in ranks[0]["fp64 kept all"]["sizes"] if size < LEAST_GRADIENTS]
    for name in ("fp64", "fp64 kept all", "fp64 ragged"):
        sizes = ranks[0][name]["sizes"]
        gradients = [size for size in sizes if size >= LEAST_GRADIENTS]
        assert gradients == ([ranks[0][name]["trainable"]] if len(ranks) > 1 else [])
        assert [size for size in sizes if size < LEAST_GRADIENTS] == statistics


@pytest.mark.parametrize("mutant", ["unsynced", "local norms", "wrong offset"])
def test_mutants_are_far_from_one_process(ranks: Results, mutant: str) -> None:
    """On one rank they are no mutants: what they break is only what crosses ranks."""
    objective, _ = one_process("patch", torch.float64)
    farthest = max(distance(rank[mutant], objective) for rank in ranks)
    assert farthest > 1e-3 if len(ranks) > 1 else farthest <= 1e-12


def test_an_average_behind_every_backward_would_miss_parameters(ranks: Results) -> None:
    for rank in ranks:
        expected = "encoder.cls_token has no gradient" if len(ranks) > 1 else "no error"
        assert rank["averaged per chunk"]["message"].startswith(expected)


def test_rank_dependent_start_is_refused_on_every_rank(ranks: Results) -> None:
    expected = (
        "no error" if len(ranks) == 1 else f"ranks=[{len(ranks) - 1}]: parameters or buffers differ"
    )
    for rank in ranks:
        assert expected in rank["mixed start"]["message"]


def test_all_ranks_take_the_plan_of_the_one_with_least_memory(ranks: Results) -> None:
    plans = [rank["plan"]["plan"] for rank in ranks]
    assert all(plan == plans[0] for plan in plans)
    assert plans[0]["chunk"] > 0
