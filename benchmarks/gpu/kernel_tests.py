"""The tests of each op, in several processes; the result is a gate for the rows of that op only.

Test files are listed one by one, because collecting the whole folder would import packages that a
bare machine lacks. Each file has its own process, so that a crash of CUDA affects no other.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.lines import emit
from benchmarks.gpu.stages import checked
from benchmarks.gpu.tests_of import QUICK_TEST, TESTS_OF
from benchmarks.outcome import FAILED, OK, SKIPPED

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 8
LONGEST = ("step", "info_nce", "fused_block")
"""Ops whose files start first, in this order, because they take longest: the loss compiles 30 tiles."""
ON_EACH_DEVICE = "tests/fastmoco/"
"""Tests there that need a GPU say so. The others ran on a CPU before, and would take the time."""
NOTHING_COLLECTED = 5
OUT_OF_TIME = 124
OF_A_TEST = re.compile(r"^(FAILED|ERROR)\b|::.* (FAILED|ERROR)\b")
PASSED = re.compile(r"\b[1-9]\d* passed\b")


def main() -> int:
    """Run them; returns 1 if tests of an op failed, 3 if some did not finish in
    time and none failed.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--limit", type=float, default=120)
    arguments = parser.parse_args()
    files = {
        op: test_files(patterns) for op, patterns in TESTS_OF.items() if checked(arguments.only, op)
    }
    if arguments.dry_run:
        files = {op: list(QUICK_TEST) for op in list(files)[:1]}
    first = {op: place for place, op in enumerate(LONGEST)}
    files = dict(sorted(files.items(), key=lambda item: first.get(item[0], len(first))))
    if not any(files.values()):
        emit("tests", SKIPPED, reason=f"no test files for ONLY={arguments.only!r}")
        return 0
    ends = time.monotonic() + arguments.limit
    workers = min(WORKERS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers) as pool:
        running = {
            op: [pool.submit(run_file, file, ends) for file in paths] for op, paths in files.items()
        }
        codes = []
        for op, results in running.items():
            done = [result.result() for result in results]
            codes.append(_report(op, dict(zip(files[op], done, strict=True))))
    return 1 if 1 in codes else 3 if 3 in codes else 0


def test_files(patterns: tuple[str, ...]) -> list[str]:
    """The existing files of some patterns."""
    return sorted(
        {str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern)}
    )


def run_file(file: str, ends: float) -> tuple[int, str]:
    """Exit code of one file's tests, and their last line."""
    left = ends - time.monotonic()
    if left < 1:
        return OUT_OF_TIME, "not begun"
    # A line for each test, against the -q in pyproject.toml.
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-vv",
        "-p",
        "no:cacheprovider",
        "-m",
        "gpu and not slow" if file.startswith(ON_EACH_DEVICE) else "not slow",
        "--tb=short",
        file,
    ]

    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # keep its output if it is killed
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=left,
            check=False,
        )
        code, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        code, out, err = OUT_OF_TIME, _text(late.stdout), _text(late.stderr)

    # The log has the end of the output, the result a summary of it.
    print(f"== {file}: exit {code}\n{out[-4000:]}{err[-1000:]}", file=sys.stderr, flush=True)
    lines = [line for line in out.splitlines() if line.strip()]
    if code == OUT_OF_TIME:  # no summary at the end: count the lines of the tests
        failed = [line for line in lines if OF_A_TEST.search(line)]
        return (1 if failed else OUT_OF_TIME), " | ".join([*failed[:3], "not done in time"])
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return code, " | ".join([*failed[:3], lines[-1] if lines else err[-200:]])


def _text(printed: str | bytes | None) -> str:
    """Output of a killed process, which subprocess returns as bytes even in text mode."""
    return printed.decode(errors="replace") if isinstance(printed, bytes) else printed or ""


def _report(op: str, results: dict[str, tuple[int, str]]) -> int:
    failed = {
        file: text
        for file, (code, text) in results.items()
        if code not in (0, NOTHING_COLLECTED, OUT_OF_TIME)
    }
    late = [file for file, (code, _) in results.items() if code == OUT_OF_TIME]
    shown = {Path(file).name: text for file, (_, text) in results.items()}
    if not results:
        emit(f"tests of {op}", SKIPPED, op=op, gate="not run", reason="no test files here")
    elif failed:
        emit(
            f"tests of {op}",
            FAILED,
            op=op,
            gate="failed",
            results=shown,
            reason=" ".join(failed.values())[:300],
        )
    elif late:
        emit(
            f"tests of {op}",
            SKIPPED,
            op=op,
            gate="not done in time",
            results=shown,
            reason=f"not done: {late}",
        )
    elif not any(PASSED.search(text) for _, text in results.values()):
        emit(
            f"tests of {op}",
            SKIPPED,
            op=op,
            gate="not run",
            results=shown,
            reason="none of its tests ran",
        )
    else:
        emit(f"tests of {op}", OK, op=op, gate="passed", results=shown)
    return 1 if failed else 3 if late else 0


if __name__ == "__main__":
    raise SystemExit(main())
