"""`python -m benchmarks.gpu`: run the stages one after the other within a
budget; see the package for its variables.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.gpu.runner import Run
from benchmarks.gpu.stages import chosen

BUDGET_SECONDS = 560.0
DRY_BUDGET_SECONDS = 1800.0


def main() -> int:
    """Read the variables and run; returns the exit code."""
    given = os.environ
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument(
        "--stages", default=given.get("STAGES", ""), help="names, or a and b; comma between them"
    )
    parser.add_argument(
        "--only", default=given.get("ONLY", ""), help="an op, or part of a row's name"
    )
    parser.add_argument(
        "--budget", type=float, default=float(given.get("BUDGET") or 0), help="seconds"
    )
    parser.add_argument("--out", type=Path, default=Path(given.get("OUT") or "gpu-results"))
    parser.add_argument(
        "--dry-run", action="store_true", default=given.get("DRY", "") not in ("", "0")
    )
    arguments = parser.parse_args()
    try:
        stages = chosen(arguments.stages)
    except ValueError as error:
        print(f"benchmarks.gpu: {error}", file=sys.stderr)
        return 2
    budget = arguments.budget or (DRY_BUDGET_SECONDS if arguments.dry_run else BUDGET_SECONDS)
    run = Run(out=arguments.out, budget=budget, only=arguments.only, dry=arguments.dry_run)
    return run.all(stages)


if __name__ == "__main__":
    raise SystemExit(main())
