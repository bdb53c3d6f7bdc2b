"""`model.init` on two ranks: equal weights, or a refusal on both."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launching import launch


@pytest.mark.slow
def test_two_ranks_start_alike_or_not_at_all(tmp_path: Path) -> None:
    first, second = (
        rank["starts"]
        for rank in launch(2, tmp_path, module="tests.distributed.run_initial_weights")
    )
    assert first["same"] == second["same"]
    assert len(first["same"]) == 64
    for found in (first, second):
        assert "is not the same file on all ranks" in found["other"]
    assert "another rank could not read it" in first["absent"]
    assert "there is no such file or folder" in second["absent"]
