"""Processor time of a call of an op on the host, without the launches of its kernels.

`python -m benchmarks.host_cost` replaces every kernel by a function that does nothing and measures
the rest: checks, tables of addresses, scratch tensors, autograd. On a GPU kernels hide this time
only if they take longer. Cases and checkouts alternate, a few calls and a process at a time, and
medians are printed. `--against FOLDER` also measures another checkout of this repository, at the
same time.

The cases are those of one step of a ViT-S: an optimizer and a momentum update over 154 tensors,
with gradients at fixed addresses and with new addresses as after `zero_grad(set_to_none=True)`; the
loss, forward and backward. Tensors are tiny, because the time does not depend on their sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TENSORS = 154
TURN = 20
"""Calls of one case in a row."""
Case = tuple[Callable[[int], object], Callable[[], object]]
"""The unmeasured preparation of a call, given its number; and the call."""


class NoLaunch:
    """Replaces a kernel: counts launches without launching."""

    def __init__(self) -> None:
        self.launches = 0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self._launch

    def _launch(self, *arguments: object, **options: object) -> None:
        self.launches += 1


def stub_kernels(*modules: ModuleType) -> list[NoLaunch]:
    """Replace every name that ends in `_kernel` in some modules, for the rest of the process."""
    stubs = []
    for module in modules:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            stubs.append(NoLaunch())
            setattr(module, name, stubs[-1])
    return stubs


def cases() -> dict[str, Case]:
    """Every case by name, on CUDA if there is a device, else on the CPU, where addresses are
    compared in the same way.
    """
    import torch

    from fastmoco_kernels.adamw_ema import launch as adamw_launch
    from fastmoco_kernels.attention import launch as attention_launch
    from fastmoco_kernels.ema import launch as ema_launch
    from fastmoco_kernels.info_nce import epilogue_kernels, triton_kernels
    from fastmoco_kernels.lars import launch as lars_launch

    stub_kernels(
        adamw_launch, attention_launch, ema_launch, epilogue_kernels, triton_kernels, lars_launch
    )
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # the default tile: nothing is timed here
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "ema_update_": _ema(device, moved=False),
        "ema_update_, sources moved": _ema(device, moved=True),
        "AdamWEMA.step": _adamw(device, moved=False),
        "AdamWEMA.step, gradients moved": _adamw(device, moved=True),
        "LARS.step": _lars(device, moved=False),
        "LARS.step, gradients moved": _lars(device, moved=True),
        "symmetric_info_nce_loss, both ways": _info_nce(device),
        "attention by triton, both ways": _attention(device),
    }


def _tensors(device: Any) -> list[Any]:
    import torch

    return [torch.zeros((4, 4) if i % 2 else (4,), device=device) for i in range(TENSORS)]


def _nothing(number: int) -> None:
    return None


def _ema(device: Any, *, moved: bool) -> Case:
    from fastmoco_kernels import ema_update_

    averages, sources = _tensors(device), [_tensors(device) for _ in range(2)]
    now = [sources[0]]

    def turn(number: int) -> None:
        now[0] = sources[number % 2 if moved else 0]

    return turn, lambda: ema_update_(averages, now[0], 0.99, backend="triton")


def _with_gradients(device: Any, moved: bool) -> tuple[list[Any], Callable[[int], None]]:
    """Parameters, and a function that sets the gradients of the next call."""
    import torch

    parameters = [torch.nn.Parameter(tensor) for tensor in _tensors(device)]
    gradients = [_tensors(device) for _ in range(2)]

    def turn(number: int) -> None:
        for parameter, gradient in zip(
            parameters, gradients[number % 2 if moved else 0], strict=True
        ):
            parameter.grad = gradient

    return parameters, turn


def _adamw(device: Any, *, moved: bool) -> Case:
    from fastmoco_kernels import AdamWEMA

    parameters, turn = _with_gradients(device, moved)
    averages = dict(zip(parameters, _tensors(device), strict=True))
    optimizer = AdamWEMA(parameters, averages=averages, backend="triton")
    return turn, lambda: optimizer.step(ema_momentum=0.99)


def _lars(device: Any, *, moved: bool) -> Case:
    from fastmoco_kernels import LARS

    parameters, turn = _with_gradients(device, moved)
    optimizer = LARS(parameters, lr=0.1, backend="triton")
    return turn, lambda: optimizer.step()


def _info_nce(device: Any) -> Case:
    import torch

    from fastmoco_kernels import symmetric_info_nce_loss

    queries = [torch.ones(8, 256, device=device, requires_grad=True) for _ in range(2)]
    keys = [torch.ones(8, 256, device=device) for _ in range(2)]

    def call() -> None:
        result = symmetric_info_nce_loss(
            queries[0],
            keys[0],
            queries[1],
            keys[1],
            temperature=0.2,
            precision="bf16",
            backend="triton",
        )
        torch.autograd.grad(result.loss, queries)

    return _nothing, call


def _attention(device: Any) -> Case:
    import torch

    from fastmoco_kernels import attention

    inputs = [
        torch.zeros(1, 2, 16, 32, device=device, dtype=torch.float16, requires_grad=True)
        for _ in range(3)
    ]
    gradient = torch.zeros(1, 2, 16, 32, device=device, dtype=torch.float16)
    return _nothing, lambda: torch.autograd.grad(
        attention(*inputs, backend="triton"), inputs, gradient
    )


def measure(calls: int, *, warm_up: int = 20) -> dict[str, float]:
    """Median microseconds of processor time per call, by case; the cases alternate."""
    import torch

    torch.set_num_threads(1)
    every = cases()
    times: dict[str, list[float]] = {name: [] for name in every}
    for first in range(0, warm_up + calls, TURN):
        for name, (before, call) in every.items():
            for number in range(first, first + TURN):
                before(number)
                began = time.process_time_ns()
                call()
                if (
                    number >= warm_up and number % TURN > 1
                ):  # the first two calls of a turn have cold caches
                    times[name].append((time.process_time_ns() - began) / 1000)
    return {name: statistics.median(found) for name, found in times.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure in separate processes, alternating between checkouts, and print
    medians of their medians.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_cost", description=__doc__)
    parser.add_argument(
        "--against", type=Path, help="folder of another checkout, measured beside this one"
    )
    parser.add_argument("--calls", type=int, default=300, help="calls of each case in one process")
    parser.add_argument(
        "--processes", type=int, default=5, help="processes of each checkout, taking turns"
    )
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        print(json.dumps(measure(arguments.calls)))
        return 0
    checkouts = [ROOT] if arguments.against is None else [arguments.against.resolve(), ROOT]
    found: dict[Path, list[dict[str, float]]] = {checkout: [] for checkout in checkouts}
    for _ in range(arguments.processes):
        for checkout in checkouts:
            found[checkout].append(_in_a_process(checkout, arguments.calls))
    print(table([found[checkout] for checkout in checkouts]))
    return 0


def _in_a_process(checkout: Path, calls: int) -> dict[str, float]:
    """One measurement of one checkout's kernels by this checkout's cases."""
    folders = [str(checkout / "kernels"), str(ROOT), str(ROOT / "pipelines")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    import torch

    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"  # lets the CPU take backend="triton"; no kernel runs
    command = [sys.executable, "-m", "benchmarks.host_cost", "--measure", "--calls", str(calls)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{checkout}: {done.stderr.strip()[-2000:]}")
    figures: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def table(checkouts: Sequence[Sequence[dict[str, float]]]) -> str:
    """Medians over processes, in microseconds: one column, or before, after and their ratio."""
    titles = ["us a call"] if len(checkouts) == 1 else ["before, us", "after, us", "ratio"]
    lines = ["| case | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for name in checkouts[-1][0]:
        medians = [statistics.median(run[name] for run in runs) for runs in checkouts]
        cells = [f"{median:.0f}" for median in medians]
        if len(medians) > 1:
            cells.append(f"{medians[0] / medians[1]:.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
