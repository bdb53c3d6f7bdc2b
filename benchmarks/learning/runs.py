"""Runs of `side`, each in a process of its own and kept in a folder."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.kept_runs import once
from benchmarks.learning.curves import Curve
from benchmarks.learning.tasks import Data
from benchmarks.measure import commit

START, END = "start.safetensors", "end.safetensors"
"""Files of an encoder with its first and with its last weights."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run of one side with one seed.

    Attributes:
        folder: of sets and runs.
        name: of its records there.
        given: what `side.run_side` takes.
    """

    folder: Path
    name: str
    given: Mapping[str, Any]

    @property
    def encoders(self) -> Path:
        """Folder of its encoders, if it keeps them."""
        return self.folder / "encoders" / self.name

    def curve(self, *, keep: bool = False) -> Curve:
        """The curve, which is trained only if the folder does not have it from this commit.

        Args:
            keep: whether the encoders before and after the training are kept.
        """
        given = {**self.given, "encoders": str(self.encoders) if keep else ""}
        words = ("-m", "benchmarks.learning.side", json.dumps(given))
        curve: Curve = once(self.folder, self.name, *words)["result"]
        return curve

    def evaluated(self, what: str, protocol: str, encoder: str, *words: str) -> dict[str, Any]:
        """The result of `fastmoco eval PROTOCOL` of a kept encoder, evaluated once.

        Args:
            what: name of the evaluation in the folder.
            protocol: `linear` or `finetune`.
            encoder: `START` or `END`.
            words: options.
        """
        data = self.given["data"]
        sets = ("--train", data["train"], "--test", data["test"])
        if "--json" not in words:
            words = (*words, "--json")
        command = ("-m", "fastmoco", "eval", protocol, str(self.encoders / encoder), *sets, *words)
        result: dict[str, Any] = once(self.folder, f"{self.name}-{what}", *command)["result"]
        return result


def run_of(
    folder: Path, data: Data, settings: Mapping[str, Any], *, task: str, side: str, seed: int
) -> Run:
    """A run of this commit.

    Args:
        folder: of sets and runs.
        data: of the task.
        settings: of `side.run_side`, without those that follow here.
        task: name of the task.
        side: `fastmoco` or `baseline`.
        seed: of weights, order and views.
    """
    given = {"task": task, "side": side, "seed": seed, "data": asdict(data), **settings}
    code = json.dumps([_code(), data.source, settings])
    label = hashlib.sha256(code.encode()).hexdigest()[:8]
    return Run(folder=folder, name=f"{task}-{side}-{seed}-{label}", given=given)


def trained(
    folder: Path, data: Data, settings: Mapping[str, Any], *, task: str, side: str, seed: int
) -> Curve:
    """The curve of a run (`run_of`), which is trained only if `folder` does not have it."""
    return run_of(folder, data, settings, task=task, side=side, seed=seed).curve()


@contextmanager
def folder_of_runs(given: str) -> Iterator[Path]:
    """The folder of sets and runs: a given one stays, "" is a temporary one."""
    if given:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given).resolve()
    else:
        with tempfile.TemporaryDirectory(prefix="fastmoco-learning-") as folder:
            yield Path(folder)


def _code() -> str:
    """The commit; for a modified tree the moment, because its runs cannot be found again."""
    known = commit()
    return str(time.time()) if known == "unknown" or known.endswith("+") else known
