"""Programs with one thread, each run once: their output and CPU-seconds are kept in a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.startup import ROOT, environment


def run_program(log: Path, *words: str) -> tuple[str, float]:
    """Run Python with these arguments and one thread: its output, and its CPU-seconds.

    Args:
        log: gets what the program writes to its standard error.
        words: arguments of the interpreter, such as `-m fastmoco train ...`.

    Raises:
        SystemExit: if it fails, with the name of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("ab") as errors,
        subprocess.Popen(
            [sys.executable, *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment(ROOT),
        ) as process,
    ):
        assert process.stdout is not None  # noqa: S101 - a type: it is a pipe
        text = process.stdout.read().decode()
        # Of this program alone: others may end at the same time.
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        shown = " ".join(words)[:300]
        raise SystemExit(f"python {shown} ended with {process.returncode}; see {log}")
    return text, used.ru_utime + used.ru_stime


def once(folder: Path, name: str, *words: str) -> dict[str, Any]:
    """The result of a program that runs only if `folder` does not have it yet.

    Args:
        folder: of the records and the logs.
        name: of the record.
        words: as of `run_program`.

    Returns:
        `result`, its last line of JSON, None without one; `cpu_s`, its CPU-seconds.
    """
    record = folder / "records" / f"{name}.json"
    if record.exists():
        found: dict[str, Any] = json.loads(record.read_text())
        return found
    text, seconds = run_program(folder / "logs" / f"{name}.log", *words)
    lines = [line for line in text.splitlines() if line.startswith("{")]
    found = {"result": json.loads(lines[-1]) if lines else None, "cpu_s": seconds}
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(found))
    return found
