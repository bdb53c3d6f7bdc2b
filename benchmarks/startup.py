"""Processor time from the start of a process to the end of the first step of `fastmoco train`.

`python -m benchmarks.startup` measures a small run on a CPU, and the time of commands that train
nothing. Each measurement is a process of its own with one thread for torch. `--against FOLDER` also
measures another checkout of this repository, in turn with this one, and medians are printed.

Processor time includes the threads of the loader, which make batches ahead meanwhile. The files of
all libraries should be in the page cache, so one unmeasured round comes first.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import interleave

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ("--global-batch-size", "64", "--device", "cpu", "--knn.every-epochs", "0")
RECIPE = "vit_nano8_e60_b256"
COMMANDS = {
    "--help": ("--help",),
    "data index --help": ("data", "index", "--help"),
    f"print-config {RECIPE}": ("print-config", RECIPE),
    f"train {RECIPE} --help": ("train", RECIPE, "--help"),
}
"""Commands that train nothing: those of a user who looks around."""
CHILD = Path(__file__).with_name("startup_child.py")


@dataclass(frozen=True)
class FirstStep:
    """A process at the end of its first step.

    Attributes:
        cpu_s: processor time of all its threads.
        modules: names of the modules that it has imported.
    """

    cpu_s: float
    modules: frozenset[str]


def first_step(shards: str, out: Path, *, checkout: Path = ROOT) -> FirstStep:
    """Train one step in a fresh process.

    Args:
        shards: of small images.
        out: a folder that does not exist, for the run.
        checkout: folder of the repository whose code runs.

    Raises:
        RuntimeError: if the run fails, with its last output.
    """
    report = out.with_suffix(".json")
    run = ("train", RECIPE, "--out", str(out), "--data.shards", shards, *OPTIONS)
    command = [sys.executable, "-P", str(CHILD), str(report), *run]
    done = subprocess.run(
        command,
        env=environment(checkout),
        cwd=out.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if not report.exists():
        raise RuntimeError(f"{checkout}: {done.stderr.strip()[-2000:]}")
    found = json.loads(report.read_text())
    return FirstStep(found["cpu_s"], frozenset(found["modules"]))


def command_cpu_s(words: Sequence[str], *, checkout: Path = ROOT) -> float:
    """Processor time of one `fastmoco` command.

    Raises:
        RuntimeError: if it fails, with its last output.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "fastmoco", *words],
        env=environment(checkout),
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{checkout}: {done.stderr.strip()[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def environment(checkout: Path) -> dict[str, str]:
    """Variables of a process that imports from a checkout and has one thread for torch."""
    folders = [str(checkout), str(checkout / "kernels"), str(checkout / "pipelines")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}


def digits(folder: Path, checkout: Path) -> str:
    """Shards of small images with the indexes of a checkout, whose format others may not read.

    Raises:
        RuntimeError: if the checkout cannot make them, with its last output.
    """
    code = (
        "import sys; from pathlib import Path; from fastmoco_pipelines import pack_digits; "
        "print(pack_digits(Path(sys.argv[1]), seed=0)[0])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(folder)],
        env=environment(checkout),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{checkout}: {done.stderr.strip()[-2000:]}")
    return done.stdout.splitlines()[-1]


def startup_cpu_s(
    rounds: int = 5, *, checkouts: Sequence[Path] = (ROOT,)
) -> dict[Path, dict[str, float]]:
    """Median processor seconds of each checkout by name of the measurement; they take turns.

    Args:
        rounds: measurements of each; one more comes first and is not used.
        checkouts: folders of the repository.
    """
    with tempfile.TemporaryDirectory(prefix="fastmoco_startup_") as name:
        folder = Path(name)
        shards = {
            checkout: digits(folder / f"data{number}", checkout)
            for number, checkout in enumerate(checkouts)
        }
        number = iter(range(10**6))

        def train(checkout: Path) -> float:
            out = folder / f"run{next(number)}"
            return first_step(shards[checkout], out, checkout=checkout).cpu_s

        found: dict[Path, dict[str, float]] = {checkout: {} for checkout in checkouts}
        cases = {"train, to the end of step 1": train} | {
            f"fastmoco {name}": lambda checkout, words=words: command_cpu_s(
                words, checkout=checkout
            )
            for name, words in COMMANDS.items()
        }
        for name, case in cases.items():
            measures = {
                str(checkout): lambda case=case, checkout=checkout: case(checkout)
                for checkout in checkouts
            }
            figures = interleave(measures, rounds=rounds + 1)
            for checkout in checkouts:
                found[checkout][name] = statistics.median(figures[str(checkout)][1:])
    return found


def table(found: Mapping[Path, Mapping[str, float]]) -> str:
    """One line for each measurement: seconds, or before, after and their ratio."""
    columns = list(found.values())
    titles = ["CPU s"] if len(columns) == 1 else ["before, CPU s", "after, CPU s", "ratio"]
    lines = ["| what | " + " | ".join(titles) + " |", "|---|" + "---|" * len(titles)]
    for name in columns[0]:
        cells = [f"{column[name]:.2f}" for column in columns]
        if len(columns) > 1:
            cells.append(f"{columns[-1][name] / columns[0][name]:.2f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="processes of each measurement")
    parser.add_argument(
        "--against", type=Path, help="folder of another checkout, measured in turn with this one"
    )
    arguments = parser.parse_args(argv)
    checkouts = [ROOT] if arguments.against is None else [arguments.against.resolve(), ROOT]
    print(table(startup_cpu_s(arguments.rounds, checkouts=checkouts)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
