"""Rates for rooflines: those of GPUs from `fastmoco.planning.chips`, those of the CPU at hand measured."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fastmoco.planning import chips

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One chip.

    Attributes:
        flops_per_s: largest rate of dense products, by the dtype of their operands.
        bytes_per_s: of its memory.
        source: of these rates.
    """

    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    source: str

    def roofline_s(self, flops: float, moved: float, dtype: str) -> float:
        """Least seconds for some FLOPs and bytes; 0 if the rate of this dtype is unknown."""
        rate = self.flops_per_s.get("bf16" if dtype == "fp16" else dtype)
        if flops and not rate:
            return 0.0
        return max(flops / rate if rate else 0.0, moved / self.bytes_per_s)


CHIPS = {
    name: Chip(
        flops_per_s={
            "bf16": chip.peak_flops_per_s,
            "tf32": chip.peak_tf32_flops_per_s,
            "fp32": chip.peak_fp32_flops_per_s,
        },
        bytes_per_s=chip.peak_bytes_per_s,
        source=chip.source,
    )
    for name, chip in chips.CHIPS.items()
}


def chip_of(device: torch.device, dtype: str) -> tuple[str, Chip] | None:
    """Name and rates of a device; None for a GPU that is not in the table.

    A CPU is measured, by one product in the dtype and one copy on the threads in use.
    """
    if device.type != "cuda":
        return "this CPU", this_cpu(dtype, torch.get_num_threads())
    found = torch.cuda.get_device_name(device)
    return next(((name, chip) for name, chip in CHIPS.items() if name in found), None)


@functools.cache
def this_cpu(dtype: str, threads: int) -> Chip:
    """Rates of this CPU, per second of processor time, on the threads in use (`threads`)."""
    side, size = 768, 128 * 2**20
    a, b = (torch.randn(side, side).to(DTYPES[dtype]) for _ in range(2))
    source, target = (torch.zeros(size, dtype=torch.int8) for _ in range(2))
    return Chip(
        flops_per_s={"bf16" if dtype == "fp16" else dtype: 2 * side**3 / _least(lambda: a @ b)},
        bytes_per_s=2 * size / _least(lambda: target.copy_(source)),
        source=f"one product of {side} x {side} and one copy of {size >> 20} MiB, {threads} threads",
    )


def _least(call: Callable[[], object], calls: int = 7) -> float:
    """The least CPU-seconds of a call."""
    found = []
    for _ in range(calls):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return min(found)
