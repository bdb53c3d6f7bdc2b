"""The cost of a report is that of a page that was written."""

from __future__ import annotations

import pytest

pytest.importorskip("plotly", reason="plotly is not installed: pip install '.[report]'")

from benchmarks.report_cost import report_cost


def test_a_page_is_measured() -> None:
    found = report_cost(600)
    assert found.metrics_mb == pytest.approx(0.52, abs=0.02)
    assert 1.5 < found.page_mb < 2.5
    assert found.cpu_s > 0
    assert 20 < found.peak_mb < 2000
