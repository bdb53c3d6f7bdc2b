"""The three sides of the large batch, small: equal losses, and a fraction of the memory."""

from __future__ import annotations

import pytest

from benchmarks.cases import large_batch


@pytest.mark.slow
def test_a_batch_of_256_whole_in_chunks_and_over_two_processes() -> None:
    result = large_batch.run(
        {**large_batch.DEFAULTS, "batch": 256, "chunk": 16, "steps": 2, "processes": 2}
    )
    assert [len(side["losses"]) for side in result["sides"].values()] == [2, 2, 2]
    assert max(result["largest_loss_difference"].values()) <= 1e-5
    shares = result["peak_share"]
    assert shares["chunks"] <= 1 / 4  # 1/8 at batch 4096: libraries take their part here
    assert shares["chunks, 2 processes"] <= 1 / 2


def test_losses_that_differ_have_no_share_of_memory(monkeypatch) -> None:
    def side(options, processes, chunk):
        return {"losses": [1.0, 2.0 + 0.1 * (processes > 1)], "peak_bytes": 1_000_000}

    monkeypatch.setattr(large_batch, "_side", side)
    result = large_batch.run(large_batch.DEFAULTS)
    assert result["failed"] == {"chunks, 4 processes": "a loss differs by 0.1 > 1e-05"}
    assert "peak_share" not in result
    assert "| whole | 1.00 |  | 0.0e+00 |" in large_batch.table(result)
