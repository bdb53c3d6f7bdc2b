"""LARS, LARC and SGD on the shards of two real processes against one process with the whole tensors."""

from __future__ import annotations

import pytest
import torch

from fastmoco.optim.larc import LARC
from fastmoco.optim.sgd import SGD
from fastmoco_kernels.lars.optimizer import LARS
from tests.distributed.launching import Results, launch
from tests.distributed.run_lars import IN_BUFFER, LR, NUMBERS, STEPS, Model, build, train

SHARDED = ("fsdp", "fsdp triton", "hsdp", "hsdp sharded", "mixed")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Results of all cases."""
    return launch(2, tmp_path_factory.mktemp("lars"), module="tests.distributed.run_lars")


def one_process(
    dtype: torch.dtype = torch.float64, **options: bool
) -> tuple[Model, list[torch.Tensor]]:
    """The model trained on the whole batches here, and its buffers."""
    model = build(dtype)
    optimizer = LARS(model.parameters(), lr=LR, weight_decay=0.05, **options)
    train(model, optimizer, slice(None), dtype)
    return model, [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]


def distance(case: dict[str, object], model: Model) -> float:
    """Largest difference of any parameter."""
    return max((case["params"][n] - p).abs().max().item() for n, p in model.named_parameters())


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
