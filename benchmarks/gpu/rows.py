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

from benchmarks.gpu.lines import emit
from benchmarks.gpu.stages import STAGES
from benchmarks.outcome import FAILED, SKIPPED, outcome
from benchmarks.registry import CASES
from fastmoco_kernels import tuning

SPOILED = 9
"""Exit code after which the remaining rows need another process."""


def main() -> int:
    """Run rows by their numbers; returns 1 if one failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage")
    parser.add_argument("--rows", required=True, help="numbers, comma between them")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--ahead", action="store_true", help="in short, to compile what it runs")
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
        words = (*row.options, *(row.dry if arguments.dry_run else ()))
        words += (row.ahead or ()) if arguments.ahead else ()
        device = ("device=cpu",) if arguments.dry_run else ()
        began = time.monotonic()
        try:
            options = case.options((*words, *device))
            result = case.run(options)
        except (Exception, SystemExit) as error:  # SystemExit from an unknown option of the case
            traceback.print_exc()
            emit(row.name, FAILED, reason=f"{type(error).__name__}: {str(error)[:300]}", **about)
            failed = True
            if "CUDA error" in str(error) or isinstance(error, torch.AcceleratorError):
                return SPOILED
            continue

        # Report the result, and free its memory for the next row.
        status, reason = outcome(result)
        failed = failed or status == FAILED
        seconds = round(time.monotonic() - began, 1)
        emit(
            row.name,
            status,
            reason=reason,
            options=options,
            result=result,
            seconds=seconds,
            tiles=tuning.measured(),
            **about,
        )
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
