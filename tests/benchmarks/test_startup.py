"""The start of a plain run on a CPU imports no library that it does not need. Its time is a
benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.startup import FirstStep, first_step, table

NOT_NEEDED = (
    "fastmoco_pipelines.stores.connections",  # and with it urllib3
    "matplotlib",
    "scipy",
    "sklearn",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.utils.flop_counter",
    "torchao",
    "triton",
    "webdataset",
)
"""torch._dynamo comes with every torch optimizer, sympy with DTensors, FSDP2 and DCP, Triton with
the counter of FLOPs."""


@pytest.fixture(scope="module")
def step(digits: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> FirstStep:
    """A run of one step in a process of its own."""
    folder: Path = tmp_path_factory.mktemp("startup")
    return first_step(digits[0], folder / "run")


def test_the_first_step_is_one_of_the_real_loader_and_optimizer(step: FirstStep) -> None:
    assert {"nvidia.dali", "fastmoco.training.step", "fastmoco.optim.adamw"} <= step.modules
    assert step.cpu_s > 0.1


@pytest.mark.parametrize("name", NOT_NEEDED)
def test_a_plain_run_does_not_import(step: FirstStep, name: str) -> None:
    assert name not in step.modules


def test_a_run_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no file has such a name"):
        first_step(str(tmp_path / "none-*.tar"), tmp_path / "run")


def test_the_table_compares_two_checkouts() -> None:
    found = {Path("a"): {"train": 4.0}, Path("b"): {"train": 3.0}}
    assert table(found).splitlines()[-1] == "| train | 4.00 | 3.00 | 0.75 |"
