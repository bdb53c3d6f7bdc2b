"""The command of the fuzz run."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import benchmarks.fuzz
from benchmarks.fuzz.table import all_targets, read_seeds, write_seeds
from benchmarks.fuzz.target import input_of
from benchmarks.fuzz.workers import Job, Outcome, run

VIOLATIONS = ("VIOLATION", "crash", "hang")
_ROUND = 2000


@dataclass
class Count:
    """What became of the inputs of one target.

    Attributes:
        outcomes: by (kind, detail).
        worst_ms: longest processor time of an input, in ms; `worst_mib`: largest growth of memory.
        findings: the smallest input of each kind of violation, with its number.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    worst_ms: int = 0
    worst_mib: int = 0
    findings: dict[tuple[str, str], tuple[int, bytes]] = field(default_factory=dict)

    @property
    def violations(self) -> int:
        """Inputs that break a rule."""
        return sum(n for (kind, _), n in self.outcomes.items() if kind.startswith(VIOLATIONS))


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print a table, return 1 on a violation."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fuzz",
        description=benchmarks.fuzz.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--inputs", type=int, default=20_000, help="changed inputs in all")
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--targets", nargs="+", choices=[*all_targets()], help="these alone")
    parser.add_argument("--keep", type=Path, help="folder for inputs that break a rule")
    parser.add_argument("--only", metavar="TARGET:NUMBER", help="repeat one input and print it")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its folder is removed
    start = time.monotonic()
    shared = "/dev/shm"  # noqa: S108 - a private folder of mkdtemp in it
    memory = shared if os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as name:
        folder = Path(name)
        write_seeds(folder)
        if options.only:
            return _repeat(folder, options.seed, options.only)
        counts: dict[str, Count] = {}
        done = 0
        names = options.targets or [*all_targets()]
        for jobs in rounds(options.inputs, names, options.seed):
            if time.monotonic() - start > options.seconds:
                break
            for job, outcome in run(jobs, folder, options.workers):
                _note(counts.setdefault(job.target, Count()), folder, job, outcome)
            done += len(jobs)
            if sys.stderr.isatty():
                print(f"\r{done} inputs", end="", file=sys.stderr)
    if options.keep:
        keep(options.keep, counts)
    return report(counts, seconds=time.monotonic() - start)


def rounds(inputs: int, names: Sequence[str], seed: int) -> Iterator[list[Job]]:
    """The inputs, a few thousand at a time; each target has its share."""
    targets = all_targets()
    whole = sum(targets[name].share for name in names)
    given = dict.fromkeys(names, 0)
    done = 0
    while done < inputs:
        done = min(done + _ROUND, inputs)
        due = {name: round(targets[name].share / whole * done) for name in names}
        due[names[0]] += done - sum(due.values())  # rounding
        jobs = [Job(name, n, seed) for name in names for n in range(given[name], due[name])]
        given = {name: max(given[name], due[name]) for name in names}
        yield jobs


def _note(count: Count, folder: Path, job: Job, outcome: Outcome) -> None:
    """Count an outcome; of a violation keep the smallest input."""
    place = outcome.kind, outcome.detail
    count.outcomes[place] += 1
    count.worst_ms = max(count.worst_ms, outcome.ms)
    count.worst_mib = max(count.worst_mib, outcome.mib)
    if outcome.kind.startswith(VIOLATIONS):
        seeds = read_seeds(folder, job.target)
        data, _ = input_of(all_targets(), seeds, job.seed, job.target, job.number)
        if place not in count.findings or len(data) < len(count.findings[place][1]):
            count.findings[place] = (job.number, data)


def _repeat(folder: Path, seed: int, only: str) -> int:
    """One input again: what became of it, and its bytes on standard output."""
    name, _, number = only.rpartition(":")
    job = Job(name, int(number), seed)
    data, _ = input_of(all_targets(), read_seeds(folder, name), seed, name, job.number)
    ((_, outcome),) = run([job], folder, workers=1)
    print(f"{only}: {outcome}", file=sys.stderr)
    sys.stdout.buffer.write(data)
    return 1 if outcome.kind.startswith(VIOLATIONS) else 0


def keep(folder: Path, counts: dict[str, Count]) -> None:
    """Store the smallest input of each kind of violation, and a list of them."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, count in counts.items():
        for (kind, detail), (number, data) in count.findings.items():
            (folder / f"{name.replace(' ', '-')}-{number}").write_bytes(data)
            times = count.outcomes[kind, detail]
            lines.append(f"{name}:{number}  {times} times, {len(data)} bytes  {kind} {detail}\n")
    (folder / "findings.txt").write_text("".join(lines))


def report(counts: dict[str, Count], *, seconds: float) -> int:
    """Print outcomes by target, most frequent first, with their most common details; 1 on a
    violation."""
    for name, count in counts.items():
        total = sum(count.outcomes.values())
        print(f"{name}: {total} inputs, at most {count.worst_ms} ms and {count.worst_mib} MiB each")
        kinds: Counter[str] = Counter()
        for (kind, _), n in count.outcomes.items():
            kinds[kind] += n
        for kind, n in kinds.most_common():
            print(f"  {n:8d}  {kind}")
            details = Counter(
                {reason: m for (k, reason), m in count.outcomes.items() if k == kind and reason}
            )
            for reason, m in details.most_common(5 if kind.startswith(VIOLATIONS) else 2):
                example = count.findings.get((kind, reason))
                which = f"  [{name}:{example[0]}]" if example else ""
                print(f"            {m:8d}  {reason}{which}")
    total = sum(sum(count.outcomes.values()) for count in counts.values())
    violations = sum(count.violations for count in counts.values())
    print(f"{total} inputs in {seconds:.0f} s, {violations} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
