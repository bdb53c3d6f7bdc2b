"""All targets by name, and their sound inputs in a folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from benchmarks.fuzz import data_targets, judged, run_targets
from benchmarks.fuzz.target import Target


@cache
def all_targets() -> dict[str, Target]:
    """Every target by name."""
    return judged.targets() | data_targets.targets() | run_targets.targets()


def write_seeds(folder: Path) -> None:
    """Write the sound inputs of every target, so that all processes have the same ones, and give
    one to each parser: what it imports late is there before processes are forked.

    Raises:
        RuntimeError: naming the target whose parser refuses it.
    """
    for name, target in all_targets().items():
        (folder / name).mkdir()
        seeds = target.seeds()
        for number, content in enumerate(seeds):
            (folder / name / f"{number:03d}").write_bytes(content)
        if target.warm_up is not None:  # no threads before a fork
            continue
        with tempfile.TemporaryDirectory(dir=folder) as own, _working_in(own):
            try:
                target.read(Path(own), seeds[0], seeds[0])
            except target.refusals as error:
                raise RuntimeError(f"{name}: the sound input is refused: {error}") from error


@contextmanager
def _working_in(folder: str) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def read_seeds(folder: Path, name: str) -> list[bytes]:
    """The sound inputs of a target."""
    return [path.read_bytes() for path in sorted((folder / name).iterdir())]
