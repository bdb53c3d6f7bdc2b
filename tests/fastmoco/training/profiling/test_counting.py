"""The counter of operators and host waits: what it sees, and what it leaves out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastmoco.training.profiling.counting import StepCounter
from fastmoco_pipelines.loading.step_parts import BACKWARD, LOSS, collecting, part

WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x[0].item(),
    "float": lambda x: float(x.sum()),
    "bool": lambda x: bool(x[0] > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "read by a mask": lambda x: x[x > 0],
    "written by a mask": lambda x: x.index_put_([x > 0], torch.ones(3)),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeats from a tensor": lambda x: x.repeat_interleave(torch.tensor([1, 2, 3])),
}
NO_WAITS: dict[str, Callable[[Tensor], object]] = {
    "where of three": lambda x: torch.where(x > 0, x, -x),
    "read by numbers": lambda x: x[torch.tensor([0, 2])],
    "a number written by a mask": lambda x: x.masked_fill_(x > 5, 1.0),
    "foreach": lambda x: torch._foreach_mul_([x], 2.0),
    "shape": lambda x: x.shape[0] + x.numel(),
    "known repeats": lambda x: x.repeat_interleave(torch.tensor([1, 2, 3]), output_size=6),
}


@pytest.mark.parametrize("name", WAITS)
def test_a_call_that_would_wait_for_a_gpu_is_counted_once(name: str) -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    with StepCounter() as counter:
        WAITS[name](x)
    assert sum(counter.waits.values()) == 1


@pytest.mark.parametrize("name", NO_WAITS)
def test_other_calls_are_no_waits(name: str) -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    with StepCounter() as counter:
        NO_WAITS[name](x)
    assert not counter.waits


def test_operators_are_counted_by_part_without_views_and_allocations() -> None:
    weight = torch.ones(4, 4, requires_grad=True)
    with collecting() as collector, StepCounter(collector) as counter:
        with part(LOSS):
            loss = (torch.empty(2, 4).zero_() @ weight.T[:, :3]).sum()
        with part(BACKWARD):
            loss.backward()  # type: ignore[no-untyped-call]
        torch.ones(3).view(3, 1).add_(1)
    assert counter.by_part(counter.operators)[LOSS] == 3  # zero_, mm, sum
    assert counter.operators[BACKWARD, "mm"] == 1
    assert counter.operators["", "add_"] == 1
    assert not any(name in ("view", "t", "slice", "empty") for _, name in counter.operators)
