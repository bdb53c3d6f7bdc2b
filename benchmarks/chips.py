"""Rates of chips, from data sheets and measured, and those of the CPU at hand."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Measured rates: products in bf16, and everything else by the bytes it moves."""

    flops_per_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Chip:
    """One chip.

    Attributes:
        flops_per_s: largest rate of dense products, by the dtype of their operands.
        bytes_per_s: of its memory.
        source: of these rates.
        memory: bytes.
        ceilings: measured on one with a large square product and a large copy.
        in_a_step: measured with the products and the copies of a training step.
    """

    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    source: str
    memory: float = 0.0
    ceilings: Rates | None = None
    in_a_step: Rates | None = None

    def roofline_s(self, flops: float, moved: float, dtype: str) -> float:
        """Least seconds for some FLOPs and bytes; 0 if the rate of this dtype is unknown."""
        rate = self.flops_per_s.get("bf16" if dtype == "fp16" else dtype)
        if flops and not rate:
            return 0.0
        return max(flops / rate if rate else 0.0, moved / self.bytes_per_s)


CHIPS = {
    "A100": Chip(
        flops_per_s={"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
        bytes_per_s=2.039e12,
        memory=80e9,
        source="NVIDIA A100 data sheet, 80 GB SXM",
    ),
    "H100": Chip(
        flops_per_s={"bf16": 989e12, "tf32": 494e12, "fp32": 67e12},
        bytes_per_s=3.35e12,
        memory=80e9,
        source="NVIDIA H100 data sheet, SXM; half of the rates with sparsity",
        in_a_step=Rates(flops_per_s=650e12, bytes_per_s=3.0e12),
    ),
    "H200": Chip(
        flops_per_s={"bf16": 989e12, "tf32": 494e12, "fp32": 67e12},
        bytes_per_s=4.8e12,
        memory=139 * 2**30,
        source="NVIDIA H200 data sheet, SXM; half of the rates with sparsity",
        ceilings=Rates(flops_per_s=790e12, bytes_per_s=4.3e12),
        in_a_step=Rates(flops_per_s=650e12, bytes_per_s=4.2e12),
    ),
    "B200": Chip(
        flops_per_s={"bf16": 2250e12, "tf32": 1100e12, "fp32": 80e12},
        bytes_per_s=8.0e12,
        memory=192e9,
        source="NVIDIA Blackwell architecture brief, HGX B200; half of the rates with sparsity",
    ),
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
