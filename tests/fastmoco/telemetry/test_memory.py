"""The peaks of memory: this process's own, and no call that waits for a device."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
import torch

from fastmoco.telemetry import memory


def test_the_peak_is_that_of_the_kernel_for_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmPeak:\t   9999 kB\nVmHWM:\t    2048 kB\nVmRSS:\t 1 kB\n")
    monkeypatch.setattr(memory, "_STATUS", str(status))
    assert memory.memory_figures(torch.device("cpu")) == {"memory/host_gb": 2048 * 1024 / 1e9}


@pytest.mark.parametrize("status", ["absent", "other"])
def test_a_system_without_that_line_has_the_peak_of_getrusage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    (tmp_path / "other").write_text("Name:\tpython\n")
    monkeypatch.setattr(memory, "_STATUS", str(tmp_path / status))
    unit = 1 if sys.platform == "darwin" else 1024
    before = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert before <= memory.resident_peak() < 2 * before


def test_a_gpu_has_the_counters_of_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only counters are read: every other call of this build of torch would fail without a GPU."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3_000_000_000)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 4_500_000_000)
    found = memory.memory_figures(torch.device("cuda", 0))
    assert found.pop("memory/host_gb") > 0
    assert found == {"memory/device_gb": 3.0, "memory/reserved_gb": 4.5}
