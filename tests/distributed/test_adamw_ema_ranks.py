"""AdamWEMA on the shards of two real processes against torch.optim.AdamW on the whole tensors of
one."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.launching import Results, launch
from tests.distributed.run_adamw_ema import MOMENTUM, OPTIONS, STEPS, build, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of all cases."""
    return launch(2, tmp_path_factory.mktemp("adamw_ema"), module="tests.distributed.run_adamw_ema")


def one_process(rounds: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters and averages after torch's optimizer and a lerp by hand."""
    model, averages = build(5), {n: p.detach().clone() for n, p in build(6).named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS)

    def update() -> None:
        optimizer.step()
        for name, param in model.named_parameters():
            if name != "second.weight":
                averages[name].lerp_(param.detach(), 1 - MOMENTUM)

    for _ in range(rounds):
        train(model, slice(None), update)
    return {n: p.detach() for n, p in model.named_parameters()}, averages


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference of any number."""
    return max((ours[name] - value).abs().max().item() for name, value in theirs.items())


@pytest.mark.parametrize("case", ["foreach", "triton"])
def test_shards_take_the_steps_of_whole_tensors(ranks: Results, case: str) -> None:
    params, averages = one_process(1)
    assert distance(dict(build(5).named_parameters()), params) > STEPS * OPTIONS["lr"] / 2
    for rank in ranks:
        assert distance(rank[case]["params"], params) < 2e-5
        assert distance(rank[case]["averages"], averages) < 2e-5
        assert rank[case]["sharded_state"]


def test_the_state_moves_to_torch_on_the_same_shards(ranks: Results) -> None:
    params, _ = one_process(2)
    assert all(distance(rank["torch takes over"]["params"], params) < 5e-5 for rank in ranks)


def test_some_shards_are_empty_and_uneven(ranks: Results) -> None:
    """Otherwise the cases above would prove less than they say."""
    assert ranks[0]["triton"]["local_sizes"] == [6, 18, 3, 5]
    assert ranks[1]["triton"]["local_sizes"] == [0, 12, 2, 0]


def test_a_gradient_placed_otherwise_is_refused(ranks: Results) -> None:
    for rank in ranks:
        assert "Shard(dim=0)" in rank["refusal"]["text"]
        assert "Replicate()" in rank["refusal"]["text"]
