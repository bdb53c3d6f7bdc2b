"""Compile every kernel configuration for other GPUs and report registers,
spills, shared memory and instructions.

`python -m benchmarks.compiled` compiles each configuration that a launcher may pick for sm_80,
sm_90a and sm_100a, prints a table, and exits with 1 if a gate fails: no spills in a default
configuration, shared memory within the chip's limit, the architecture's tensor-core instruction
present, nothing forbidden in an inner loop.

Versions of Triton allocate registers differently, and every supported one must pass. `--rows FILE`
stores the figures of a run; with `--beside FILE` a run under another Triton writes a page with
both.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.aot.machine_code import (
    ARCHITECTURES,
    MATRIX_OPCODES,
    SHARED_LIMITS,
    AotCase,
    Compiled,
    assemble_case,
    read_code,
)

OPS = (
    "adamw_ema",
    "attention",
    "blur",
    "ema",
    "fused_block",
    "gelu_bias",
    "info_nce",
    "lars",
    "residual_norm",
    "soft_cross_entropy",
    "stacked_qkv",
    "view_color",
)
BATCH = 32
"""Configurations that one process compiles and then disassembles together."""
SHOWN = ("MUFU", "FFMA", "FMUL", "FMNMX", "SHFL")
Row = tuple[str, int, Compiled | None, list[str]]
Run = dict[str, Any]
"""`triton`: its version; `broken`: gates; `figures`: registers and spilled
bytes by configuration and target."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, gate; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument(
        "--op", choices=OPS, action="append", help="this op only; may be given again"
    )
    parser.add_argument("--quick", action="store_true", help="only what is a default on sm_90a")
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at a time"
    )
    parser.add_argument("--out", type=Path, help="write the table to this file")
    parser.add_argument(
        "--rows", type=Path, help="write this run's figures to this file, for --beside"
    )
    parser.add_argument(
        "--beside", type=Path, help="figures of a run under another Triton, shown on the page"
    )
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit(
            "benchmarks.compiled: TRITON_INTERPRET=1 replaces kernels by Python; unset it"
        )

    # Compile in parallel.
    ops = arguments.op or OPS
    jobs = [
        (op, case.name, capability)
        for op in ops
        for case in _cases(op)
        for capability in case.targets
        if not arguments.quick or (capability == 90 and 90 in case.default_on and case.quick)
    ]
    began = time.monotonic()
    with ProcessPoolExecutor(max(1, arguments.jobs)) as pool:
        batches = [jobs[i : i + BATCH] for i in range(0, len(jobs), BATCH)]
        rows = [row for batch in pool.map(_measure, batches) for row in batch]

    # Report, and write the pages.
    text = table(rows)
    print(text)
    faults = [
        f"{name} on {ARCHITECTURES[capability]}: {fault}"
        for name, capability, _, found in rows
        for fault in found
    ]
    print("\n".join(faults), file=sys.stderr)
    print(f"{len(rows)} compiled in {time.monotonic() - began:.0f} s, {len(faults)} gates broken")
    run = _run(rows)
    if arguments.rows:
        arguments.rows.write_text(json.dumps(run))
    if arguments.out:
        runs = (
            [run] if arguments.beside is None else [run, json.loads(arguments.beside.read_text())]
        )
        arguments.out.write_text(_page(rows, runs))
    return 1 if faults else 0


def _run(rows: Sequence[Row]) -> Run:
    """The JSON of one run."""
    import triton

    figures = {
        f"{name} on {ARCHITECTURES[capability]}": None
        if cost is None
        else [cost.registers, cost.spill_bytes]
        for name, capability, cost, _ in rows
    }
    return {
        "triton": triton.__version__,
        "broken": sum(len(found) for *_, found in rows),
        "figures": figures,
    }


def _cases(op: str) -> list[AotCase]:
    """Every configuration of one op, with unique names."""
    cases: list[AotCase] = importlib.import_module(f"benchmarks.aot.{op}").aot_cases()
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(
            f"{op}: aot_cases() gives a name twice: "
            f"{sorted({n for n in names if names.count(n) > 1})}"
        )
    return cases


def _measure(jobs: Sequence[tuple[str, str, int]]) -> list[Row]:
    """Some rows of the table. A configuration that does not compile is reported as a fault."""
    cases = {(op, case.name): case for op in {op for op, _, _ in jobs} for case in _cases(op)}
    assembled, broken = {}, {}
    for job in jobs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assembled[job] = assemble_case(cases[job[:2]], job[2])
            except Exception as error:  # classes of Triton and MLIR differ between versions
                broken[job] = f"does not compile: {str(error).strip().splitlines()[-1][:160]}"

    # All at once; if one cannot be read, each by itself.
    try:
        costs = dict(zip(assembled, read_code(list(assembled.values())), strict=True))
    except (OSError, subprocess.SubprocessError):
        costs = {}
        for job, one in assembled.items():
            try:
                (costs[job],) = read_code([one])
            except (OSError, subprocess.SubprocessError) as error:
                broken[job] = f"is not disassembled: {error}"
    return [
        (
            job[1],
            job[2],
            costs.get(job),
            [broken[job]] if job in broken else costs[job].faults(cases[job[:2]], job[2]),
        )
        for job in jobs
    ]


def table(rows: Iterable[Row], others: Sequence[Run] = ()) -> str:
    """The rows as a Markdown table; counts are of the whole kernel. Other runs
    add their registers and spilled bytes.
    """
    beside = "".join(f" registers, spills ({other['triton']}) |" for other in others)
    lines = [
        f"| kernel | target | registers | spill bytes |{beside} shared bytes | tensor core | "
        + " | ".join(SHOWN)
        + " | gates |",
        "|---|---|---|---|---|---|" + "---|" * (len(others) + len(SHOWN)) + "---|",
    ]
    for name, capability, compiled, faults in rows:
        outcome = "; ".join(faults) or "hold"
        if compiled is None:
            empty = " |" * (4 + len(others) + len(SHOWN))
            lines.append(f"| {name} | {ARCHITECTURES[capability]} |{empty} {outcome} |")
            continue
        matrix = compiled.opcodes[MATRIX_OPCODES[capability]]
        found = [other["figures"].get(f"{name} on {ARCHITECTURES[capability]}") for other in others]
        cells = "".join(f" {figures[0]}, {figures[1]} |" if figures else " |" for figures in found)
        counts = " | ".join(str(compiled.opcodes[opcode]) for opcode in SHOWN)
        lines.append(
            f"| {name} | {ARCHITECTURES[capability]} | {compiled.registers} | "
            f"{compiled.spill_bytes} |"
            f"{cells} {compiled.shared_bytes} | {matrix} | {counts} | {outcome} |"
        )
    return "\n".join(lines)


def _page(rows: Sequence[Row], runs: Sequence[Run]) -> str:
    """The committed page: the table of this run with the figures of other runs."""
    limits = ", ".join(f"{ARCHITECTURES[c]} {limit:,} B" for c, limit in SHARED_LIMITS.items())
    counts = "; ".join(
        f"Triton {run['triton']}: {len(run['figures'])} configurations, {run['broken']} gates "
        "broken"
        for run in runs
    )
    return (
        "# Compiled kernels\n\n"
        f"Compiled without a GPU by `make kernels`. {counts}. Shared memory limits: {limits}. "
        "Tensor core counts HMMA, "
        "HGMMA and UTCHMMA instructions; what is not said to be another's is of Triton "
        f"{runs[0]['triton']}.\n\n"
        f"{table(rows, runs[1:])}\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
