"""Ceilings of this card: copies, large products, a product of ViT-S, launches. Measured first.

Later figures are reported as shares of them, and goals of another card are scaled by them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.contest import seconds_by_events
from benchmarks.gpu.lines import emit

ROUNDS = 7


def main() -> int:
    """Print one line; returns 0."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", default="")
    dry = parser.parse_args().dry_run
    device = torch.device("cpu" if dry else "cuda")
    size = 2**20 if dry else 2**30
    copied = _copy(size, device)
    side, rows = (256, 197) if dry else (8192, 50432)
    emit(
        "ceilings",
        copy_gb_per_s=_round(copied),
        matmul_tflops=_round(_product(side, side, side, device)),
        vit_s_matmul_tflops=_round(_product(rows, 384, 1536, device)),
        launch_us=_round(_launch_us(device)),
        shapes={"matmul": [side] * 3, "vit_s_matmul": [rows, 384, 1536]},
    )
    return 0


def _copy(size: int, device: torch.device) -> float:
    """GB/s of a copy, counting bytes read and written."""
    source, target = (torch.zeros(size, dtype=torch.int8, device=device) for _ in range(2))
    return 2 * size / _median(lambda: target.copy_(source), device) / 1e9


def _product(m: int, k: int, n: int, device: torch.device) -> float:
    """TFLOP/s of one bf16 product."""
    a = torch.randn(m, k, device=device).bfloat16()
    b = torch.randn(k, n, device=device).bfloat16()
    return 2 * m * k * n / _median(lambda: a @ b, device) / 1e12


def _median(call: Callable[[], object], device: torch.device) -> float:
    """Median seconds of a call on the device."""
    for _ in range(3):
        call()
    return statistics.median(seconds_by_events(call, device) for _ in range(ROUNDS))


def _launch_us(device: torch.device) -> float:
    """Host microseconds of one small operation among many."""
    x, count = torch.zeros(1, device=device), 2000
    found = []
    for _ in range(3):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            x.add_(1)
        found.append((time.perf_counter() - began) / count * 1e6)
    return statistics.median(found)


def _round(value: float) -> float:
    return float(f"{value:.4g}")


if __name__ == "__main__":
    raise SystemExit(main())
