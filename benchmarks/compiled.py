"""What every kernel configuration costs on GPUs that need not be here: registers, spills, shared memory, instructions.

``python -m benchmarks.compiled`` compiles each configuration that a launcher may pick for sm_80, sm_90a and sm_100a, prints
the table, and ends with 1 if a gate does not hold: no spills in a default configuration, shared memory within the chip's
limit, the architecture's tensor-core instruction present, nothing forbidden in an inner loop.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from fastmoco_kernels._aot import ARCHITECTURES, MATRIX_OPCODES, SHARED_LIMITS, AotCase, Compiled, compile_case

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
    "stacked_qkv",
    "view_color",
)
SHOWN = ("MUFU", "FFMA", "FMUL", "FMNMX", "SHFL")
Row = tuple[str, int, Compiled | None, list[str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print, gate; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiled", description=__doc__)
    parser.add_argument("--op", choices=OPS, action="append", help="this op only; may be given again")
    parser.add_argument("--quick", action="store_true", help="only what is a default on sm_90a")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="compilers at a time")
    parser.add_argument("--out", type=Path, help="write the table to this file")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise SystemExit("benchmarks.compiled: TRITON_INTERPRET=1 replaces kernels by Python; unset it")
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
        rows = list(pool.map(_measure, jobs, chunksize=4))
    text = table(rows)
    print(text)
    faults = [
        f"{name} on {ARCHITECTURES[capability]}: {fault}" for name, capability, _, found in rows for fault in found
    ]
    print("\n".join(faults), file=sys.stderr)
    print(f"{len(rows)} compiled in {time.monotonic() - began:.0f} s, {len(faults)} gates broken")
    if arguments.out:
        arguments.out.write_text(_page(text, len(rows), len(faults)))
    return 1 if faults else 0


def _cases(op: str) -> list[AotCase]:
    """Every configuration of one op; two of one name would hide one of them."""
    cases: list[AotCase] = importlib.import_module(f"fastmoco_kernels.{op}.launch").aot_cases()
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"{op}: aot_cases() gives a name twice: {sorted({n for n in names if names.count(n) > 1})}")
    return cases


def _measure(job: tuple[str, str, int]) -> Row:
    """One row of the table. A configuration that does not compile is a fault, not an end."""
    op, name, capability = job
    case = next(case for case in _cases(op) if case.name == name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compiled = compile_case(case, capability)
        except Exception as error:  # Triton's and MLIR's own classes differ from version to version
            return name, capability, None, [f"does not compile: {str(error).strip().splitlines()[-1][:160]}"]
    return name, capability, compiled, compiled.faults(case, capability)


def table(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table; counts are of the whole kernel."""
    lines = [
        "| kernel | target | registers | spill bytes | shared bytes | tensor core | "
        + " | ".join(SHOWN)
        + " | gates |",
        "|---|---|---|---|---|---|" + "---|" * len(SHOWN) + "---|",
    ]
    for name, capability, compiled, faults in rows:
        verdict = "; ".join(faults) or "hold"
        if compiled is None:
            lines.append(f"| {name} | {ARCHITECTURES[capability]} |" + " |" * (4 + len(SHOWN)) + f" {verdict} |")
            continue
        matrix = compiled.opcodes[MATRIX_OPCODES[capability]]
        counts = " | ".join(str(compiled.opcodes[opcode]) for opcode in SHOWN)
        lines.append(
            f"| {name} | {ARCHITECTURES[capability]} | {compiled.registers} | {compiled.spill_bytes} "
            f"| {compiled.shared_bytes} | {matrix} | {counts} | {verdict} |"
        )
    return "\n".join(lines)


def _page(text: str, compiled: int, broken: int) -> str:
    """The committed page."""
    import triton

    limits = ", ".join(f"{ARCHITECTURES[c]} {limit:,} B" for c, limit in SHARED_LIMITS.items())
    return (
        "# Compiled kernels\n\n"
        f"Triton {triton.__version__}, compiled without a GPU by `make kernels`: {compiled} configurations, {broken} gates "
        f"broken. Shared memory limits: {limits}. Tensor core counts HMMA, HGMMA and UTCHMMA instructions.\n\n"
        f"{text}\n"
    )


if __name__ == "__main__":
    raise SystemExit(main())
