"""Compile what later stages run, while the tests run: torch.compile's graphs of the training steps,
and every kernel with every candidate tile.

Each job is a process of its own. It runs rows of a later stage in short, or a few small training
steps whose micro-batches have the sizes of the large one, and its figures are thrown away, the
chosen tiles too: the card is busy with other jobs. What stays is the compiled code in the caches.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.lines import emit, end_first
from benchmarks.gpu.stages import STAGES, TRUNKS, Trunk, ahead_of, concerns
from benchmarks.outcome import FAILED, OK, SKIPPED

ROOT = Path(__file__).resolve().parents[2]
COMPILERS = "4"
"""Processes with which one job compiles; there are about ten jobs."""
WORDS = 400
"""Characters of a failed job's output."""


def main() -> int:
    """Run all jobs side by side, or one; returns 1 if one failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--only", default="")
    parser.add_argument("--limit", type=float, default=120)
    parser.add_argument("--run", default="a", help="the run whose rows are compiled")
    parser.add_argument("--trunk", help="run the job of this trunk")
    given = parser.parse_args()
    trunks = {trunk.name: trunk for trunk in TRUNKS}
    if given.trunk:
        small_steps(trunks[given.trunk], dry=given.dry_run)
        return 0
    jobs = commands(given.run, given.only, given.dry_run)
    if not jobs:
        emit("compile ahead", SKIPPED, reason="nothing of these rows is compiled ahead")
        return 0
    ends = time.monotonic() + given.limit
    with ThreadPoolExecutor(1 if given.dry_run else len(jobs)) as pool:
        passed = list(pool.map(lambda name: _run(name, jobs[name], ends), jobs))
    return int(not all(passed))


def commands(run: str, only: str, dry: bool) -> dict[str, list[str]]:
    """The command of each job of a run that `ONLY` selects, by its name: one for each trunk and
    each training step, one for the other rows of a stage. A dry run takes the first trunk.
    """
    python = [sys.executable, "-m"]
    rest = ["--dry-run"] if dry else []
    jobs = {
        f"steps of {trunk.name}": [*python, __spec__.name, "--trunk", trunk.name, *rest]
        for trunk in TRUNKS
        if trunk.run == run and concerns(only, "step", trunk.name)
    }
    if dry:
        return dict(list(jobs.items())[:1])
    for stage in STAGES:
        rows = (
            {str(number): row for number, row in ahead_of(stage, only)} if stage.run == run else {}
        )
        steps = [number for number, row in rows.items() if row.op == "step"]
        others = [number for number in rows if number not in steps]
        words = [*python, "benchmarks.gpu.rows", stage.name, "--ahead", "--rows"]
        jobs |= {rows[number].name: [*words, number] for number in steps}
        if others:
            jobs[f"rows of {stage.name}"] = [*words, ",".join(others)]
    return jobs


def _run(name: str, command: list[str], ends: float) -> bool:
    """One job; prints its line, and returns whether it did not fail."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as tiles, tempfile.TemporaryFile("w+") as log:
        environment = {
            **os.environ,
            "XDG_CACHE_HOME": tiles,
            "TORCHINDUCTOR_COMPILE_THREADS": COMPILERS,
        }
        try:
            code = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, ends - time.monotonic()),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
        log.seek(0)
        words = "".join(deque(log, maxlen=40))
    print(f"== {name}: exit {code}\n{words}", file=sys.stderr, flush=True)
    if code is None:
        status, reason = SKIPPED, "not done in time"
    else:
        status, reason = (FAILED, f"exit {code}: {end_first(words, WORDS)}") if code else (OK, "")
    emit(f"compile ahead: {name}", status, reason=reason, seconds=time.monotonic() - began)
    return status != FAILED


def small_steps(trunk: Trunk, *, dry: bool) -> None:
    """Training steps with the sizes of micro-batches of a large one: whole chunks and each quarter
    of one, with a graph and without.
    """
    import torch

    from benchmarks.cases.train_step import DEFAULTS
    from benchmarks.step_sides import config_of, trainer_of
    from fastmoco.objectives.chunked import ChunkedStep

    chunk = 4 if dry else trunk.chunk
    options: dict[str, Any] = {**DEFAULTS, "recipe": trunk.recipe, "compile": int(not dry)}
    options |= {"batch": 2 * chunk, "chunk": str(chunk), "activation_budget": trunk.budget}
    if dry:
        options |= {"device": "cpu", "recipe": "quickstart_digits"}
    with trainer_of(config_of(options)) as trainer:
        batch, planned = trainer.loader.next(), trainer.forward_backward
        device = batch.views[0].device.type
        for quarters in (3, 2):  # chunks of 3/4, 1 and 1/4, then of 2/4, 1 and 2/4
            trainer.train_step.forward_backward = ChunkedStep(
                trainer.objective,
                chunk=chunk,
                kept_images=quarters * chunk // 4,
                autocast=partial(torch.autocast, device, dtype=torch.bfloat16, enabled=not dry),
                prepare=planned.prepare,
            )
            trainer.step(batch)


if __name__ == "__main__":
    raise SystemExit(main())
