"""The rows of a stage, one after the other in one process; a failed row does not affect the others.

After an error inside CUDA the process cannot continue, and the caller starts a
new one for the remaining rows.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import time
import traceback

import torch

from benchmarks.gpu.lines import FAILED, MARKED, OK, SKIPPED, emit
from benchmarks.gpu.stages import STAGES
from benchmarks.registry import CASES, parse_options

SPOILED = 9
"""Exit code after which the remaining rows need another process."""


def main() -> int:
    """Run rows by their numbers; returns 1 if one failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("--rows", required=True, help="numbers, comma between them")
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    stage = next(stage for stage in STAGES if stage.name == arguments.stage)
    failed = False
    for number in map(int, arguments.rows.split(",")):
        row = stage.rows[number]
        case = CASES[row.case]
        about = {"row": number, "case": row.case, "op": row.op}
        if row.needs and importlib.util.find_spec(row.needs) is None:
            emit(row.name, SKIPPED, reason=f"needs {row.needs}, which is not here", **about)
            continue

        # Run the case; an error is a result too.
        words = (*row.options, *row.dry) if arguments.dry_run else row.options
        device = ("device=cpu",) if arguments.dry_run else ()
        began = time.monotonic()
        try:
            options = parse_options((*words, *device), case.DEFAULTS)
            result = case.run(options)
        except (Exception, SystemExit) as error:  # SystemExit from an unknown option of the case
            traceback.print_exc()
            emit(row.name, FAILED, reason=f"{type(error).__name__}: {str(error)[:300]}", **about)
            failed = True
            if "CUDA error" in str(error) or isinstance(error, torch.AcceleratorError):
                return SPOILED
            continue

        # Report the result, and free its memory for the next row.
        status, reason = status_of(result)
        failed = failed or status == FAILED
        seconds = round(time.monotonic() - began, 1)
        emit(
            row.name,
            status,
            reason=reason,
            options=options,
            result=result,
            seconds=seconds,
            **about,
        )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return int(failed)


def status_of(result: dict[str, object]) -> tuple[str, str]:
    """Status of a case: failed if its subject failed, marked if it was timed
    although its check failed.
    """
    parts = [
        result,
        *(part for part in result.values() if isinstance(part, dict) and "failed" in part),
    ]
    if result.get("skipped_because"):
        return SKIPPED, str(result["skipped_because"])
    if result.get("marked"):
        return MARKED, str(result["marked"])
    faults = []
    for part in parts:
        failed = part.get("failed")
        subject = part.get("subject")
        if isinstance(failed, dict):
            faults += [
                f"{who}: {why}" for who, why in failed.items() if subject is None or who == subject
            ]
    return (FAILED, "; ".join(faults)[:400]) if faults else (OK, "")


if __name__ == "__main__":
    raise SystemExit(main())
