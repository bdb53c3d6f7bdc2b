"""Runs each stage in its own process within its limit and the budget, stores every line at once,
and reports the results.

Standard library only, so that it can report a torch that does not import.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu import goals
from benchmarks.gpu.caches import keep_caches, take_caches
from benchmarks.gpu.carried import unpack
from benchmarks.gpu.lines import last_words, run_lines
from benchmarks.gpu.stages import CEILINGS, ENVIRONMENT, STAGES, Stage, concerns, within
from benchmarks.gpu.summary import shown, summary
from benchmarks.outcome import FAILED, MARKED, OK, SKIPPED

ROOT = Path(__file__).resolve().parents[2]
LEAST_SECONDS = 5.0
"""With less time left no stage is started."""
SPOILED, OUT_OF_TIME = 9, 124
CARD_CHECK = "import sys, torch; sys.exit(not torch.cuda.is_available())"


def _commit() -> str:
    """As `benchmarks.measure.commit`, without torch."""
    if commit := os.environ.get("FASTMOCO_COMMIT"):
        return commit
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+"]
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
            or "unknown"
        )
    except OSError:
        return "unknown"


class Run:
    """One call of `make gpu`.

    Args:
        out: folder of the results; ceilings of an earlier call in it are used again, and gates and
            environment of one at the same commit.
        budget: seconds for everything.
        only: an op or part of a row's name; empty for all.
        dry: on the CPU with small shapes.
    """

    def __init__(self, *, out: Path, budget: float, only: str, dry: bool) -> None:
        self.out = out
        self.only = only
        self.dry = dry
        self._ends = time.monotonic() + budget
        self._one_at_a_time = threading.Lock()
        out.mkdir(parents=True, exist_ok=True)
        self.lines: list[dict[str, Any]] = []
        self._kept_file = out / ("kept-dry.json" if dry else "kept.json")
        self._kept: dict[str, Any] = {"machine": {}, "ceilings": {}, "gates": {}}
        if self._kept_file.exists():
            self._kept |= json.loads(self._kept_file.read_text())
        if self._kept.get("commit") != (now := _commit()):  # gates of another tree do not apply
            self._kept |= {"commit": now, "machine": {}, "gates": {}}
        site, carried = unpack(ROOT / ".gpu")
        paths = [ROOT, ROOT / "kernels", ROOT / "pipelines", *([site] if site else [])]
        self._environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            "PYTHONUNBUFFERED": "1",
            **({} if dry else take_caches(ROOT / ".gpu")),
        }
        if carried:
            self._say(f"carried: {', '.join(carried)}")

    def all(self, stages: Sequence[Stage]) -> int:
        """Run stages in their order; returns 0, 1 if something failed, 3 if the
        time ran out and nothing failed.
        """
        if (
            not self.dry
            and subprocess.run([sys.executable, "-c", CARD_CHECK], check=False).returncode != 0
        ):
            print(
                "benchmarks.gpu: there is no CUDA device here; --dry-run goes through everything "
                "without",
                file=sys.stderr,
            )
            return 1
        # Every figure needs the card and its ceilings.
        first = [
            s
            for s, key in ((ENVIRONMENT, "machine"), (CEILINGS, "ceilings"))
            if not self._kept[key]
        ]
        stages = [*(stage for stage in first if stage not in stages), *stages]
        stages = [stage for stage in stages if within(stage, self.only)]
        done: list[tuple[str, str, float]] = []
        for beside, group in itertools.groupby(stages, key=lambda stage: stage.beside):
            # Stages that time nothing run side by side.
            with ThreadPoolExecutor(len(STAGES) if beside and not self.dry else 1) as pool:
                done += pool.map(self._reported, group)
        if not self.dry:
            self._say(keep_caches(self.out))
        card = self._kept["machine"].get("gpu", "")
        self._say("\n".join(summary(self.lines, done, self._kept["ceilings"], card)))
        outcomes = {outcome for _, outcome, _ in done}
        if FAILED in outcomes:
            return 1
        return 3 if "out of time" in outcomes else 0

    def _left(self) -> float:
        return self._ends - time.monotonic()

    def _reported(self, stage: Stage) -> tuple[str, str, float]:
        """Run a stage and print how it ended; returns its name, outcome and seconds."""
        began = time.monotonic()
        outcome = self._stage(stage)
        seconds = time.monotonic() - began
        self._say(f"-- {stage.name}: {outcome} after {seconds:.0f} s, {self._left():.0f} s left")
        return stage.name, outcome, seconds

    def _lines_of(self, stage: Stage) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["stage"] == stage.name]

    def _stage(self, stage: Stage) -> str:
        """One stage; "ok", "failed", "skipped" or "out of time"."""
        # A dry run may be on a busy machine, so only the budget ends a stage.
        limit = self._left() if self.dry else min(stage.limit, self._left())
        if limit < LEAST_SECONDS:
            return "out of time"
        self._say(f"-- {stage.name}")
        if stage.rows:
            return self._rows(stage, limit)
        words = ["--only", self.only] if stage.ops or stage.limited else []
        words += ["--limit", f"{max(1.0, limit - 10):.0f}"] if stage.limited else []
        words += stage.words
        first = len(self._lines_of(stage))
        code, failed = self._process(stage, words, limit)
        if code in (OUT_OF_TIME, 3) and not failed:
            return "out of time"
        if code and not failed:  # it died before it said so itself
            reason = f"exit {code}: {last_words(self._log(stage))}"
            self._take(stage, {"name": stage.name, "status": FAILED, "reason": reason})
        if code or failed:
            return FAILED
        return self._ended(stage, first)

    def _rows(self, stage: Stage, limit: float) -> str:
        """Rows of a stage in one process, and in a new one after a row that killed it."""
        ends = time.monotonic() + limit

        # Rows whose tests failed are timed too and marked: a case checks its results by itself, and
        # a card is rarely at hand.
        waiting = [
            number
            for number, row in enumerate(stage.rows)
            if concerns(self.only, row.name, row.op, row.case)
        ]
        failed = False

        # Run them; a row that kills the process is not tried again.
        while waiting:
            before = {line.get("row") for line in self._lines_of(stage)}
            words = [stage.name, "--rows", ",".join(map(str, waiting))]
            left = ends - time.monotonic()
            code, bad = (
                self._process(stage, words, left) if left > LEAST_SECONDS else (OUT_OF_TIME, False)
            )
            failed = failed or bad
            seen = {line.get("row") for line in self._lines_of(stage)} - before
            waiting = [number for number in waiting if number not in seen]
            if code == OUT_OF_TIME:
                for number in waiting:
                    self._take(
                        stage,
                        {
                            "name": stage.rows[number].name,
                            "status": SKIPPED,
                            "reason": "out of time",
                        },
                    )
                return FAILED if failed else "out of time"
            if waiting and code != SPOILED:  # it died during a row
                row = stage.rows[waiting.pop(0)]
                reason = f"exit {code}: {last_words(self._log(stage))}"
                self._take(stage, {"name": row.name, "status": FAILED, "reason": reason})
                failed = True
        return FAILED if failed else self._ended(stage, 0)

    def _ended(self, stage: Stage, first: int) -> str:
        """What to call a stage without a failure, by its lines from the first one on."""
        printed = [line["status"] for line in self._lines_of(stage)[first:]]
        return SKIPPED if printed and all(status == SKIPPED for status in printed) else "ok"

    def _process(self, stage: Stage, words: Sequence[str], limit: float) -> tuple[int, bool]:
        """Run the module of a stage; returns its exit code, and whether one of
        its lines reports a failure.
        """
        command = [sys.executable, "-m", stage.module, *words, *(["--dry-run"] if self.dry else [])]
        first = len(self._lines_of(stage))
        code = run_lines(
            command,
            limit=limit,
            log=self._log(stage),
            # Beside others a process takes few cores.
            environment=self._environment | ({"OMP_NUM_THREADS": "2"} if stage.beside else {}),
            take=lambda line: self._take(stage, line),
            cwd=ROOT,
        )
        failed = any(line["status"] == FAILED for line in self._lines_of(stage)[first:])
        if stage.rows and (code not in (0, 1, 3, SPOILED) or (code == 1 and not failed)):
            self._say(f"{stage.name}: exit {code}: {last_words(self._log(stage))}")
        return code, failed

    def _take(self, stage: Stage, line: dict[str, Any]) -> None:
        """Store a line, print it, and keep the values that later stages need."""
        with self._one_at_a_time:
            self._take_alone(stage, line)

    def _take_alone(self, stage: Stage, line: dict[str, Any]) -> None:
        if line["name"] == "environment":
            self._kept["machine"] = line["machine"]
        elif line["name"] == "ceilings":
            self._kept["ceilings"] = {
                key: value for key, value in line.items() if key not in ("name", "status")
            }
        elif line.get("gate"):
            self._kept["gates"][line["op"]] = line["gate"]
        if isinstance(line.get("result"), dict):
            line["gate"] = self._kept["gates"].get(line.get("op", ""), "not run")
            if line["gate"] == FAILED and line["status"] == OK:
                line |= {"status": MARKED, "reason": f"the tests of {line.get('op')} failed"}
            line["share"] = goals.shares(line["result"], self._kept["ceilings"])
        line = {"stage": stage.name, **line, "machine": self._kept["machine"], "dry": self.dry}
        line["time"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.lines.append(line)
        with open(self.out / "gpu.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        self._kept_file.write_text(json.dumps(self._kept))
        self._say(
            "\n".join(shown(line, self._kept["ceilings"], self._kept["machine"].get("gpu", "")))
        )

    def _log(self, stage: Stage) -> Path:
        return self.out / f"{stage.name}.log"

    @staticmethod
    def _say(text: str) -> None:
        print(text, flush=True)
