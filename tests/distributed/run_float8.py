"""One of several real processes in float8: the runs of run_sharded.py with converted encoders."""

from __future__ import annotations

import functools
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from fastmoco.distributed import World
from fastmoco.models.float8 import use_float8_
from fastmoco.objectives import MoCoV3
from tests.distributed import run_sharded
from tests.distributed.cases import run_cases
from tests.distributed.run_sharded import Case

build = run_sharded.build
OPTIONS: dict[str, Case] = {
    "ddp": {},
    "fsdp": {},
    "fsdp chunked": {"chunk": 2, "kept": 1},
    "fsdp recomputed": {"recompute": "full"},
}


def build_float8(
    stem: str, dtype: torch.dtype, seed: int
) -> tuple[MoCoV3, list[tuple[Tensor, Tensor]]]:
    """The same objective and batches in every process, the first of two blocks in float8.

    FSDP2 gathers parameters in bf16, after which they may round to other float8 numbers. The
    parameters of the first step are bf16 numbers, so every strategy computes the same products.
    """
    objective, batches = build(stem, dtype, seed)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.copy_(parameter.bfloat16())
    for encoder in (objective.encoder, objective.momentum_encoder):
        assert len(use_float8_(encoder, emulate=True)) == 4
    return objective, batches


def run_case(world: World, name: str) -> Case:
    """Three steps in bf16 and float8."""
    with mock.patch.object(run_sharded, "build", build_float8):
        return run_sharded.run_steps(
            world, name.split()[0], dtype=torch.float32, bf16=True, **OPTIONS[name]
        )


CASES: dict[str, Callable[[World], Case]] = {
    name: functools.partial(run_case, name=name) for name in OPTIONS
}

if __name__ == "__main__":
    run_cases(CASES)
