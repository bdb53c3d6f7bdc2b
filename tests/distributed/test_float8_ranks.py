"""Float8 on 2 real gloo processes, under DDP and FSDP2, whole and in chunks, against one
process."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from fastmoco.distributed import World
from tests.distributed.launching import launch
from tests.distributed.run_float8 import CASES, run_case
from tests.distributed.run_sharded import Case, run_steps
from tests.distributed.test_sharded_ranks import distances

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)


@pytest.mark.slow
def test_ranks_take_the_step_of_one_process(tmp_path: Path) -> None:
    """Scales are of a token's own row, so ranks agree to what bf16 leaves of their weights'
    gradients."""
    found = launch(2, tmp_path, module="tests.distributed.run_float8")
    one = run_case(World(), "ddp")
    native = distances([one], run_steps(World(), dtype=torch.float32, bf16=True), 1)
    assert min(native["loss"], native["gradients"]) > 1e-2  # it was float8
    for name in CASES:
        cases: list[Case] = [rank[name] for rank in found]  # type: ignore[misc]
        first = distances(cases, one, 1)
        assert first["loss"] < 1e-5, name
        assert first["gradients"] < 5e-3, name
        for case in cases:
            assert case["dtypes"] == {torch.float32}
            assert ("model.encoder.blocks.0.mlp.fc1.weight" in case["sharded"]) == name.startswith(
                "fsdp"
            )
            assert all(torch.isfinite(loss) for loss in case["losses"])
