"""The cases and the command line: list the cases, or run one and append its
result to a file of JSON lines.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases import (
    adamw_ema,
    attention,
    checkpoint_stall,
    cut_views,
    ema,
    fused_block,
    growth,
    info_nce,
    knn,
    large_batch,
    loader,
    residual_norm,
    scale,
    train_step,
    train_vs_synthetic,
    view_color,
)
from benchmarks.measure import machine
from fastmoco_pipelines.text import first_sentence

CASES = {
    case.NAME: case
    for case in (
        adamw_ema,
        attention,
        checkpoint_stall,
        cut_views,
        ema,
        fused_block,
        growth,
        info_nce,
        knn,
        large_batch,
        loader,
        residual_norm,
        scale,
        train_step,
        train_vs_synthetic,
        view_color,
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    """List the cases or run one; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="name every case and its options")
    runner = verbs.add_parser("run", help="run one case")
    runner.add_argument("case", choices=sorted(CASES))
    runner.add_argument("options", nargs="*", metavar="name=value", help="see `list`")
    runner.add_argument("--out", type=Path, help="append the result to this file of JSON lines")
    runner.add_argument(
        "--table", action="store_true", help="print a table, not a line of JSON (growth)"
    )
    arguments = parser.parse_args(argv)
    if arguments.verb == "list":
        for name, case in CASES.items():
            print(f"{name}: {first_sentence(case.__doc__)}")
            print("   ", " ".join(f"{key}={value}" for key, value in case.DEFAULTS.items()))
        return 0
    case = CASES[arguments.case]
    if arguments.table and not hasattr(case, "table"):
        parser.error(f"{arguments.case} has no table: omit --table")
    options = parse_options(arguments.options, case.DEFAULTS)
    described = machine()  # before the case, so that an error here loses no result
    result = {
        "case": arguments.case,
        "options": options,
        "result": _result(case, options),
        "machine": described,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    line = json.dumps(result)
    print(case.table(result["result"]) if arguments.table else line)
    if arguments.out:
        with open(arguments.out, "a") as file:
            file.write(line + "\n")
    return 0


def _result(case: Any, options: dict[str, Any]) -> Any:
    """Run a case; a refused value is an error of one line."""
    try:
        return case.run(options)
    except ValueError as error:
        raise SystemExit(f"benchmarks: {error}") from error


def parse_options(given: Sequence[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """The defaults of a case, overridden by `name=value` arguments of the same types.

    Raises:
        SystemExit: naming an unknown option.
    """
    options = dict(defaults)
    for word in given:
        name, equals, value = word.partition("=")
        if not equals or name not in defaults:
            raise SystemExit(
                f"benchmarks: {word!r} is not one of {', '.join(f'{key}=...' for key in defaults)}"
            )
        options[name] = type(defaults[name])(value)
    return options
