"""Runs of `side`, each in a process of its own and kept in a folder."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.kept_runs import once
from benchmarks.learning.curves import Curve
from benchmarks.learning.tasks import Data
from benchmarks.measure import commit


def trained(
    folder: Path, data: Data, settings: Mapping[str, Any], *, task: str, side: str, seed: int
) -> Curve:
    """The curve of a run, which is trained only if `folder` does not have it from this commit.

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
    done = once(
        folder,
        f"{task}-{side}-{seed}-{label}",
        *("-m", "benchmarks.learning.side", json.dumps(given)),
    )
    curve: Curve = done["result"]
    return curve


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
