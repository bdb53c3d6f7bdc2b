"""One call for a borrowed GPU: the kernels against float64, the GPU tests, then the cases, all within nine minutes.

``make gpu`` runs it with the python at hand and installs nothing. Every stage is a process of its own with a limit of its
own, so that one that hangs or dies costs no other. Results go to ``$OUT`` (``gpu-results`` if unset): ``gpu.jsonl``, one
line a case, and ``tests.log``. Correctness comes first: if the kernel tests do not pass, no case is timed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUDGET_SECONDS = 530.0
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Timed:
    """A case with the options of one figure, and the goal that the figure is held against."""

    case: str
    options: tuple[str, ...] = ()
    goal: str = ""
    limit: float = 90
    """Seconds."""
    needs: str = ""
    """A module without which the case is passed over."""


CASES = (
    Timed("info_nce", ("rows=16384",), "G1: both directions <= 1.0 ms, so one <= 0.5; >= 7x naive, >= 2.5x compiled"),
    Timed("info_nce", ("rows=4096",), "G3: both directions <= 0.09 ms, so one <= 0.045; >= 5x naive"),
    Timed("info_nce", ("rows=512", "keys=4096"), "G3: both directions <= 0.03 ms; >= 10x naive"),
    Timed("info_nce", ("rows=65536", "compile=0", "rounds=3"), "G2: both directions <= 16 ms, < 0.5 GB extra"),
    Timed("ema", (), "G5: >= 1.6x mul+add, >= 2.3x the official loop (ViT-S)"),
    Timed("ema", ("width=768",), "G5, ViT-B"),
    Timed("adamw_ema", (), "G5: >= 1.25x fused AdamW + lerp + casts (ViT-S)"),
    Timed("adamw_ema", ("width=768",), "G5: ViT-B <= 1.2 ms"),
    Timed("attention", ("d=32", "subject=triton"), "G6: >= 1.5x sdpa at (1024, 12, 197, 32)"),
    Timed("attention", ("d=64", "A=6", "subject=triton"), "G6: >= 1.2x sdpa at head dimension 64"),
    Timed("attention", ("d=32", "L=1", "subject=triton"), "the last block: the class token alone asks"),
    Timed(
        "train_step", ("rounds=2",), "G7: ViT-S/16, batch 4096, >= 5,000 images/s, so <= 0.2 ms an image; >= 3x eager"
    ),
    Timed(
        "train_step",
        ("recipe=vit_b16_e300_b4096", "rounds=2"),
        "G8: ViT-B/16, >= 1,600 images/s, <= 0.625 ms; >= 1.8x eager",
    ),
    Timed("view_color", ("images=256",), "G11: augmentation <= 3 us an image"),
    Timed(
        "loader",
        ("device=gpu", "batch=128", "batches=2", "rounds=2", "workers=8", "memory=10"),
        "G11: >= 4,500 images/s, two views each, so <= 0.22 ms an image (ViT-S)",
    ),
    Timed(
        "train_step",
        ("architecture=vit_large", "compile=1", "batch=512", "rounds=2", "steps=1"),
        "G9: ViT-L/16, >= 430 images/s, so <= 2.33 ms an image",
        limit=150,
        needs="torchao",
    ),
    Timed(
        "train_step",
        ("architecture=vit_large", "linears=float8", "compile=1", "batch=512", "rounds=2", "steps=1"),
        "G9: with float8 >= 550 images/s, so <= 1.82 ms an image; its worth is this line over the one before",
        limit=150,
        needs="torchao",
    ),
)


def main() -> int:
    """Run every stage that the time allows; returns the exit code."""
    import torch

    if not torch.cuda.is_available():
        print("benchmarks.gpu: there is no CUDA device here", file=sys.stderr)
        return 1
    out = Path(os.environ.get("OUT") or "gpu-results")
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, results in {out}")
    log = out / "tests.log"
    exact = _pytest(["tests/kernels", "-m", "not slow"], log, limit=240)
    marked = _pytest(
        ["tests", "-m", "gpu", "--ignore=tests/kernels", "--continue-on-collection-errors"], log, limit=120
    )
    if exact != 0:
        fault = "were not done in time" if exact == 124 else "failed"
        print(f"the kernel tests {fault}: nothing is timed; see {log}")
        return 1
    lines = []
    cases = [timed for timed in CASES if not timed.needs or importlib.util.find_spec(timed.needs)]
    for timed in (timed for timed in CASES if timed not in cases):
        print(f"without {timed.needs}: passing over {timed.case} {' '.join(timed.options)}")
    for timed in cases:
        left = BUDGET_SECONDS - (time.monotonic() - began)
        if left < 20:
            print(f"out of time before {timed.case} {' '.join(timed.options)}")
            break
        line = _run_case(timed, out / "gpu.jsonl", limit=min(left, timed.limit))
        lines += [line] if line else []
    print("\n".join(summary(lines)))
    return 1 if marked != 0 or len(lines) < len(cases) else 0


def _pytest(arguments: list[str], log: Path, limit: float) -> int:
    """Run tests; the closing lines are shown, all of it is kept."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", *arguments]
    if importlib.util.find_spec("xdist"):  # most of the time goes into compiling, on the CPU
        command += ["-n", str(min(8, len(os.sched_getaffinity(0))))]
    with open(log, "a") as file:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            code = 124
            file.write(f"\nended after {limit:.0f} s\n")
    print(f"pytest {' '.join(arguments)}: exit {code}")
    print("\n".join(log.read_text().splitlines()[-12:]), flush=True)
    return code


def _run_case(timed: Timed, out: Path, limit: float) -> dict[str, Any] | None:
    """One case in a process of its own; its line of results, or None with a word on why not."""
    command = [sys.executable, "-m", "benchmarks", "run", timed.case, *timed.options]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        print(f"{timed.case} {' '.join(timed.options)}: ended after {limit:.0f} s", flush=True)
        return None
    if done.returncode != 0:
        print(f"{timed.case} {' '.join(timed.options)}: exit {done.returncode}: {done.stderr[-800:]}", flush=True)
        return None
    line: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) | {"goal": timed.goal}
    with open(out, "a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def summary(lines: list[dict[str, Any]]) -> list[str]:
    """A short table: milliseconds, speed-ups by their medians, failed checks, and the goal."""
    shown = []
    for line in lines:
        given = " ".join(f"{key}={value}" for key, value in line["options"].items())
        shown.append(f"{line['case']} {given}")
        result = line["result"]
        parts = {"": result} if "speedup" in result else {f"{name} ": part for name, part in result.items()}
        for name, part in parts.items():
            shown += _contest(name, part) if isinstance(part, dict) else []
        shown += [f"    goal: {line['goal']}"] if line.get("goal") else []
    return shown


def _contest(name: str, part: dict[str, Any]) -> list[str]:
    """The lines of one contest."""
    times = "  ".join(f"{who} {value:.3f}" for who, value in part.get("milliseconds", {}).items())
    ratios = "  ".join(f"{who} {value['median']:.2f}x" for who, value in part.get("speedup", {}).items())
    failed = [f"    {name}FAILED {who}: {why}" for who, why in part.get("failed", {}).items()]
    return [f"    {name}ms: {times}", f"    {name}speed-up over: {ratios}", *failed]


if __name__ == "__main__":
    raise SystemExit(main())
