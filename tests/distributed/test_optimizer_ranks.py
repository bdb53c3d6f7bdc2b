"""Optimizers on the shards of two real processes against one process with the whole tensors: LARS,
LARC, SGD and AdamWEMA, which is torch.optim.AdamW there."""

from __future__ import annotations

import pytest
import torch

from fastmoco.optim.larc import LARC
from fastmoco.optim.sgd import SGD
from fastmoco_kernels.lars.optimizer import LARS
from tests.distributed import run_adamw_ema as adamw_ema
from tests.distributed.launching import Results, launch
from tests.distributed.run_lars import IN_BUFFER, LR, NUMBERS, STEPS, Model, build, train

SHARDED = ("fsdp", "fsdp triton", "hsdp", "hsdp sharded", "mixed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of all cases."""
    return launch(2, tmp_path_factory.mktemp("optimizers"), module="tests.distributed.run_lars")


def one_process(
    dtype: torch.dtype = torch.float64, **options: bool
) -> tuple[Model, list[torch.Tensor]]:
    """The model trained on the whole batches here, and its buffers."""
    model = build(dtype)
    optimizer = LARS(model.parameters(), lr=LR, weight_decay=0.05, **options)
    train(model, optimizer, slice(None), dtype)
    return model, [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]


def gap(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest difference of any number."""
    return max((ours[name] - value).abs().max().item() for name, value in theirs.items())


def distance(case: dict[str, object], model: Model) -> float:
    """Largest difference of any parameter."""
    return gap(case["params"], dict(model.named_parameters()))


@pytest.mark.parametrize("case", [*SHARDED, "fsdp in buffer"])
def test_shards_take_the_steps_of_whole_tensors(ranks: Results, case: str) -> None:
    model, buffers = one_process(**(IN_BUFFER if case == "fsdp in buffer" else {}))
    assert (
        build().first.weight - model.first.weight
    ).abs().max() > 1e-3  # there was something to get right
    for rank in ranks:
        assert distance(rank[case], model) <= 1e-13
        for ours, buffer in zip(rank[case].get("buffers", buffers), buffers, strict=True):
            assert (ours - buffer).abs().max() <= 1e-13


@pytest.mark.parametrize("kind", [LARC, SGD])
def test_other_optimizers_on_shards_are_those_on_whole_tensors(
    ranks: Results, kind: type[torch.optim.Optimizer]
) -> None:
    model = build()
    optimizer = kind(model.parameters(), **NUMBERS[kind])
    train(model, optimizer, slice(None))
    for rank in ranks:
        case = rank[kind.__name__.lower()]
        assert distance(case, model) <= 1e-13
        for ours, p in zip(case["buffers"], model.parameters(), strict=True):
            assert (ours - optimizer.state[p]["momentum_buffer"]).abs().max() <= 1e-13


def test_float32_shards_to_rounding(ranks: Results) -> None:
    model, _ = one_process(torch.float32)
    assert distance(ranks[0]["fsdp fp32"], model) <= 1e-6


@pytest.mark.parametrize("case", ["fsdp", "hsdp", "hsdp sharded"])
def test_all_tensors_share_one_collective_a_step(ranks: Results, case: str) -> None:
    count = len(list(build().parameters()))
    for rank in ranks:
        assert rank[case]["calls"] == [((count, 2), torch.float64)] * STEPS
        assert rank[case]["sharded_state"]


def test_some_shards_are_empty_and_uneven(ranks: Results) -> None:
    """Otherwise the cases above would prove less than they say."""
    assert ranks[0]["fsdp"]["local_sizes"] == [6, 18, 3, 5]
    assert ranks[1]["fsdp"]["local_sizes"] == [0, 12, 2, 0]


def test_ratios_of_single_shards_are_another_training(ranks: Results) -> None:
    model, _ = one_process()
    assert distance(ranks[0]["shard ratios"], model) > 1e-3


def test_what_cannot_be_right_is_refused(ranks: Results) -> None:
    for rank in ranks:
        said = rank["refusals"]
        assert said["gradient"].startswith(
            "LARS: a parameter of shape (5, 6) has placements (Shard(dim=0),), its gradient"
        )
        assert "its trust ratios would be those of single shards" in said["apex"]


def adamw_in_one_process(rounds: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters and averages after torch's optimizer and a lerp by hand."""
    model, averages = (
        adamw_ema.build(5),
        {n: p.detach().clone() for n, p in adamw_ema.build(6).named_parameters()},
    )
    optimizer = torch.optim.AdamW(model.parameters(), **adamw_ema.OPTIONS)

    def update() -> None:
        optimizer.step()
        for name, param in model.named_parameters():
            if name != "second.weight":
                averages[name].lerp_(param.detach(), 1 - adamw_ema.MOMENTUM)

    for _ in range(rounds):
        adamw_ema.train(model, slice(None), update)
    return {n: p.detach() for n, p in model.named_parameters()}, averages


@pytest.mark.parametrize("case", ["adamw foreach", "adamw triton"])
def test_adamw_takes_the_steps_of_whole_tensors(ranks: Results, case: str) -> None:
    params, averages = adamw_in_one_process(1)
    farthest = gap(dict(adamw_ema.build(5).named_parameters()), params)
    assert farthest > adamw_ema.STEPS * adamw_ema.OPTIONS["lr"] / 2
    for rank in ranks:
        assert gap(rank[case]["params"], params) < 2e-5
        assert gap(rank[case]["averages"], averages) < 2e-5
        assert rank[case]["sharded_state"]


def test_the_state_of_adamw_moves_to_torch_on_the_same_shards(ranks: Results) -> None:
    params, _ = adamw_in_one_process(2)
    assert all(gap(rank["adamw, then torch"]["params"], params) < 5e-5 for rank in ranks)


def test_some_shards_of_adamw_are_empty_and_uneven(ranks: Results) -> None:
    """Otherwise the cases above would prove less than they say."""
    assert ranks[0]["adamw triton"]["local_sizes"] == [6, 18, 3, 5]
    assert ranks[1]["adamw triton"]["local_sizes"] == [0, 12, 2, 0]


def test_a_gradient_of_adamw_placed_otherwise_is_refused(ranks: Results) -> None:
    for rank in ranks:
        assert "Shard(dim=0)" in rank["adamw refusal"]["text"]
        assert "Replicate()" in rank["adamw refusal"]["text"]
