"""The command line: list the cases, run some or all of them, compare two commits, draw results."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import plot
from benchmarks.case import Case, Options, near
from benchmarks.compare import compare
from benchmarks.measure import machine
from benchmarks.outcome import FAILED, MARKED, outcome
from benchmarks.registry import CASES

LIMIT_S = 3600
"""Seconds after which one case of several is ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="name every case and its options")
    runner = verbs.add_parser("run", help="run cases; exit code 0 if every gate passed")
    runner.add_argument("words", nargs="*", metavar="CASE|name=value", help="see `list`")
    runner.add_argument("--all", action="store_true", help="every case")
    runner.add_argument("--quick", action="store_true", help="small: seconds for each case")
    runner.add_argument("--set", action="append", default=[], metavar="name=value")
    runner.add_argument("--out", type=Path, help="append results to this file of JSON lines")
    runner.add_argument("--table", action="store_true", help="a table, not a line of JSON")
    other = verbs.add_parser("compare", help="cases of two commits, a run of each in turn")
    other.add_argument("commits", nargs=2, metavar="COMMIT", help="such as main and HEAD")
    other.add_argument("words", nargs="*", metavar="CASE|name=value", help="none: all, --quick")
    other.add_argument("--quick", action="store_true", help="small: seconds for each case")
    other.add_argument("--set", action="append", default=[], metavar="name=value")
    other.add_argument("--rounds", type=int, default=3, help="runs of each commit")
    plotter = verbs.add_parser("plot", help="write docs/performance.md and its images")
    plotter.add_argument("--check", action="store_true", help="fail if the page is outdated")
    given, late = parser.parse_known_args(argv)
    # argparse takes no further words after an option.
    if wrong := [word for word in late if word.startswith("-") or not hasattr(given, "words")]:
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    if late:
        given.words += late
    if given.verb == "list":
        return _list()
    if given.verb == "plot":
        return plot.write(check=given.check)

    cases = [find(word) for word in given.words if "=" not in word]
    settings = [*(word for word in given.words if "=" in word), *given.set]
    if given.verb == "compare":
        if settings and len(cases) != 1:
            parser.error(f"{settings[0]}: options go to one case, not to several")
        if cases:
            cases[0].options(settings)  # refuses what the case does not know
        asked = {"rounds": given.rounds, "quick": given.quick or not cases, "settings": settings}
        return compare(given.commits, cases or list(CASES.values()), **asked)
    if given.all == bool(cases):
        parser.error("name the cases, or give --all")
    if len(cases) != 1:
        if settings:
            parser.error(f"{settings[0]}: options go to one case, not to several")
        return run_all(cases or list(CASES.values()), quick=given.quick, out=given.out)
    options = cases[0].options(settings, quick=given.quick)
    return run_one(cases[0], options, out=given.out, table=given.table)


def find(name: str) -> Case:
    """The case of a name.

    Raises:
        SystemExit: with near names, if there is none.
    """
    if name not in CASES:
        raise SystemExit(f"benchmarks: no case {name!r} {near(name, CASES)}")
    return CASES[name]


def _list() -> int:
    for case in CASES.values():
        print(f"{case.name}: {case.summary}")
        print("   ", " ".join(f"{key}={value}" for key, value in case.defaults.items()))
    return 0


def run_one(case: Case, options: Options, *, out: Path | None, table: bool = False) -> int:
    """Run a case in this process, print and append its line; returns 1 if its gate failed."""
    described = machine()  # before the case, so that an error here loses no result
    try:
        result = case.run(options)
    except ValueError as error:  # a refused value is an error of one line
        raise SystemExit(f"benchmarks: {error}") from error
    line = {
        "case": case.name,
        "options": {name: portable(value) for name, value in options.items()},
        "result": result,
        "machine": described,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    text = json.dumps(line)
    print(case.shown(result) if table else text)
    if out:
        with open(out, "a") as file:
            file.write(text + "\n")
    status, reason = outcome(result)
    if reason:
        print(f"benchmarks: {case.name} {status}: {reason}", file=sys.stderr)
    return int(status in (FAILED, MARKED))


def portable(value: Any) -> Any:
    """An option as it is recorded: of an absolute path only the last three parts."""
    if not isinstance(value, str) or not Path(value).is_absolute():
        return value
    return "/".join(Path(value).parts[1:][-3:])


def run_all(cases: Sequence[Case], *, quick: bool, out: Path | None) -> int:
    """Run cases one after the other, each in a process of its own, and print a line for each.

    Returns:
        0 if every gate passed.
    """
    failed, began = [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fastmoco-benchmarks-") as folder:
        for case in cases:
            found = Path(folder) / f"{case.name}.jsonl"
            status, reason, seconds = _apart(case, found, quick=quick)
            print(f"{case.name}: {status}, {seconds}{f': {reason}' * bool(reason)}", flush=True)
            if status in (FAILED, MARKED):
                failed.append(case.name)
            if out and found.exists():
                with open(out, "a") as file:
                    file.write(found.read_text())
    summary = f"gates failed: {', '.join(failed)}" if failed else "every gate passed"
    print(f"{len(cases)} cases in {time.monotonic() - began:.0f} s: {summary}")
    return int(bool(failed))


def _apart(case: Case, found: Path, *, quick: bool) -> tuple[str, str, str]:
    """Outcome of a case in a process of its own, the reason, and its seconds."""
    command = [sys.executable, "-m", "benchmarks", "run", case.name, "--out", str(found)]
    began, cpu = time.monotonic(), _children_cpu_s()
    log = found.with_suffix(".log")
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, *["--quick"] * quick], stdout=file, stderr=file, env=_environment()
        )
        try:
            code: int | None = process.wait(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            process.kill()
            process.wait()
    seconds = f"{time.monotonic() - began:.1f} s, {_children_cpu_s() - cpu:.1f} CPU s"
    if code is None:
        return FAILED, f"ended after {LIMIT_S} s", seconds
    if not found.exists():
        words = log.read_text().strip().splitlines() or [f"exit code {code}"]
        return FAILED, words[-1][:400], seconds
    result: dict[str, Any] = json.loads(found.read_text().splitlines()[-1])["result"]
    return *outcome(result), seconds


def _environment() -> dict[str, str]:
    """That of this process, with its import paths."""
    paths = [str(Path(path).resolve()) for path in sys.path if path]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
