"""The memory of a process: its peak so far, by counters of the system and of torch's allocator."""

from __future__ import annotations

import resource
import sys

import torch

_STATUS = "/proc/self/status"


def memory_figures(device: torch.device) -> dict[str, float]:
    """The peaks of this process so far, in GB of 10^9 bytes, by name of the metric.

    Reads counters of the host and never waits for a device.

    Args:
        device: of the training.

    Returns:
        `memory/host_gb`, the resident set; on CUDA also `memory/device_gb`, what tensors took, and
        `memory/reserved_gb`, what torch's allocator held for them.
    """
    found = {"memory/host_gb": resident_peak() / 1e9}
    if device.type == "cuda":
        found["memory/device_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        found["memory/reserved_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
    return found


def resident_peak() -> int:
    """Bytes of the largest resident set of this process so far."""
    # The kernel's own line first: the peak of getrusage may be that of the process that started this.
    try:
        with open(_STATUS, encoding="ascii", errors="replace") as status:
            peaks = [int(line.split()[1]) for line in status if line.startswith("VmHWM:")]
    except OSError:
        peaks = []
    if peaks:
        return 1024 * peaks[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
