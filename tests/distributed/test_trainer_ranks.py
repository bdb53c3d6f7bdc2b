"""The trainer on two real processes: strategies train alike, one continues what the other began,
and `model.init` gives equal weights."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.launching import launch
from tests.distributed.run_trainer import CUT, STEPS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of all cases."""
    out = tmp_path_factory.mktemp("trainer")
    found: list[dict[str, Any]] = launch(2, out, module="tests.distributed.run_trainer")  # type: ignore[assignment]
    return found


def test_strategies_train_to_the_same_losses(ranks: list[dict[str, Any]]) -> None:
    expected = ranks[0]["ddp"]["losses"]
    assert [step for step, _ in expected] == list(range(1, STEPS + 1))
    assert len({round(loss, 6) for _, loss in expected}) == STEPS  # it trains
    for name in ("fsdp", "fsdp chunked"):
        case = ranks[0][name]
        assert case["code"] == 0
        assert case["kinds"] == {"DTensor"}
        assert case["optimizer"].startswith("fastmoco_kernels.")
        assert max(abs(a[1] - b[1]) for a, b in zip(case["losses"], expected, strict=True)) <= 1e-9


@pytest.mark.parametrize(
    ("name", "kind"), [("fsdp as ddp", "Parameter"), ("ddp as fsdp", "DTensor")]
)
def test_one_continues_what_the_other_began(
    ranks: list[dict[str, Any]], name: str, kind: str
) -> None:
    case = ranks[0][name]
    assert case["code"] == 0
    assert case["kinds"] == {kind}
    expected = ranks[0]["ddp"]["losses"][CUT:]
    assert [step for step, _ in case["losses"]] == list(range(CUT + 1, STEPS + 1))
    assert max(abs(a[1] - b[1]) for a, b in zip(case["losses"], expected, strict=True)) <= 1e-9


def test_losses_equal_those_of_the_plain_trainer_under_ddp(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["baseline"]
        assert found["losses"] == pytest.approx(found["plain"], abs=1e-10)
        assert len(set(found["losses"])) == len(found["losses"])  # weights move
    assert ranks[0]["baseline"]["plain"] != ranks[1]["baseline"]["plain"]


def test_a_flipped_bit_stops_the_run_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        case = rank["flipped bit"]
        assert case["message"].startswith(
            "momentum_encoder.cls_token differs among ranks=[0, 1]: a bit flipped"
        )
        assert case["steps"] == 3


def test_two_ranks_start_alike_or_not_at_all(ranks: list[dict[str, Any]]) -> None:
    """From the same file, or with a refusal on both."""
    first, second = (rank["initial weights"] for rank in ranks)
    assert first["same"] == second["same"]
    assert len(first["same"]) == 64
    for found in (first, second):
        assert "is not the same file on all ranks" in found["other"]
    assert "another rank could not read it" in first["absent"]
    assert "there is no such file or folder" in second["absent"]
