"""Every kernel once, against float64 or its plain path, and three training
steps: one process, less than a minute.

On a GPU in bf16, with sizes that are no multiple of a tile. A dry run uses Triton's interpreter
instead of the GPU, with tiny shapes and the dtypes of NumPy.
"""

from __future__ import annotations

import argparse
import os
import time
import traceback

import torch

from benchmarks.gpu.checks import Check, Place, Unavailable
from benchmarks.gpu.lines import emit
from benchmarks.gpu.stages import checked, concerns
from benchmarks.outcome import FAILED, OK, SKIPPED


def main() -> int:
    """Run all checks; returns 1 if one failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported
    from benchmarks.gpu.smoke_kernels import CHECKS
    from benchmarks.gpu.smoke_step import STEP_CHECKS

    dry = arguments.dry_run
    # Default tiles, so that no check measures others; and new memory is filled with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    place = Place(
        device=torch.device("cpu" if dry else "cuda"),
        narrow=torch.float32 if dry else torch.bfloat16,
        dry=dry,
    )
    results = [
        run_check(name, op, check, place)
        for (name, op), check in {**CHECKS, **STEP_CHECKS}.items()
        if concerns(arguments.only, name) or checked(arguments.only, op)
    ]
    return int(not all(results))


def run_check(name: str, op: str, check: Check, place: Place) -> bool:
    """Run one check and print its line; returns whether it passed or was skipped."""
    began = time.monotonic()
    try:
        errors = check(place)
    except Unavailable as reason:
        emit(name, SKIPPED, op=op, reason=str(reason))
        return True
    except Exception as error:
        if place.dry and "0-dimensional arrays" in str(error):
            emit(name, SKIPPED, op=op, reason="this Triton's interpreter does not know this NumPy")
            return True
        traceback.print_exc()
        emit(name, FAILED, op=op, reason=f"{type(error).__name__}: {str(error)[:300]}")
        return False
    beyond = [
        f"{what} {error:.3g} > {limit:.3g}"
        for what, (error, limit) in errors.items()
        if not error <= limit
    ]
    emit(
        name,
        FAILED if beyond else OK,
        op=op,
        reason=", ".join(beyond),
        errors={what: float(f"{error:.3g}") for what, (error, _) in errors.items()},
        seconds=round(time.monotonic() - began, 1),
    )
    return not beyond


if __name__ == "__main__":
    raise SystemExit(main())
