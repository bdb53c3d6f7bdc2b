"""All targets by name, and their sound inputs in a folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from benchmarks.fuzz import data_targets, judged, run_targets
from benchmarks.fuzz.target import Target


@cache
def all_targets() -> dict[str, Target]:
    """Every target by name."""
    return judged.targets() | data_targets.targets() | run_targets.targets()


def write_seeds(folder: Path) -> None:
    """Write the sound inputs of every target, so that all children have the same ones."""
    for name, target in all_targets().items():
        (folder / name).mkdir()
        for number, content in enumerate(target.seeds()):
            (folder / name / f"{number:03d}").write_bytes(content)


def read_seeds(folder: Path, name: str) -> list[bytes]:
    """The sound inputs of a target."""
    return [path.read_bytes() for path in sorted((folder / name).iterdir())]
