"""Decisions of three ranks, and of a process alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmoco.distributed import World, agree
from tests.distributed.launching import launch
from tests.distributed.run_agree import decisions


@pytest.mark.slow
def test_three_ranks_decide_alike_by_the_word_that_counts(tmp_path: Path) -> None:
    expected = {
        "any, one says yes": True,
        "any, all say no": False,
        "least": 1.0 / 3.0 - 2,
        "first": 10,
        "first of a bool": True,
        "largest": [2.0, 0.0],
        "total": [3.0, -3.0],
        "mean": [1.0, -1.0],
    }
    for rank in launch(3, tmp_path, module="tests.distributed.run_agree"):
        assert rank["decisions"] == expected


def test_a_process_alone_decides_for_itself() -> None:
    assert decisions(World()) == {
        "any, one says yes": True,
        "any, all say no": False,
        "least": 1.0 / 3.0,
        "first": 10,
        "first of a bool": True,
        "largest": [0.0, 0.0],
        "total": [0.0, 0.0],
        "mean": [0.0, 0.0],
    }
    numbers = torch.ones(2)
    assert agree.mean(numbers) is numbers
    assert agree.total(numbers) is numbers
    assert agree.largest(numbers) is numbers
