"""The folder of one run: what lies where in it, who may write to it, and which lines of its metrics still hold."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any, Literal

from fastmoco.errors import RunError
from fastmoco_pipelines.files import write_file


class RunFolder:
    """Paths of a run, and its lock.

    Layout: `config.json` (the config, what it resolved to, the run's id), `metrics.jsonl` (one line a logged step),
    `checkpoints/`, `quarantine.jsonl` (bad images found), `curves.png`, `lock`, `starts.json` (starts without
    progress), and after a run `DONE` or `PREEMPTED`, because launchers hide exit codes. The folder has mode 0700.

    Args:
        path: the folder; made if absent.

    Attributes:
        checkpoints: folder of the checkpoints.
        metrics: JSON lines, one for each logged step.
        quarantine: list of the bad images that the run has found; every rank appends to it.
        curves: picture of the loss and the accuracy.
        starts: the number of starts without progress.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.quarantine = path / "quarantine.jsonl"
        self.curves = path / "curves.png"
        self.starts = path / "starts.json"
        self._config = path / "config.json"
        self._lock: IO[str] | None = None

    def write_starts(self, data: dict[str, Any]) -> None:
        """Write the count of starts."""
        _replace(self.starts, json.dumps(data) + "\n")

    def mark(self, name: Literal["DONE", "PREEMPTED"] | None, text: str = "") -> None:
        """Say by a file's name how the run ended; None: it has not. One mark replaces the other.

        Only the process that holds the folder does anything.
        """
        if self._lock is None:
            return
        for other in ("DONE", "PREEMPTED"):
            if other != name:
                (self.path / other).unlink(missing_ok=True)
        if name is not None:
            # It ended as it was asked to: being preempted again and again before the next step is no failure.
            self.starts.unlink(missing_ok=True)
            _replace(self.path / name, text + "\n")

    def take_leftovers(self) -> list[str]:
        """Remove the half-written files of a killed run, which no reader looks at, and name them.

        Only the process that holds the folder does anything.
        """
        if self._lock is None:
            return []
        found = sorted(self.path.glob("*.tmp"))
        for path in found:
            path.unlink()
        return [path.name for path in found]

    def acquire(self) -> None:
        """Take the folder for this process until `release`, or until the process ends however it ends."""
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._lock = os.fdopen(descriptor, "a+")  # held open for as long as the run lasts
        except OSError as error:
            raise RunError(f"cannot write to {self.path}: {error.strerror}; choose another --out") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            self._lock = None
            raise RunError(f"{self.path} is in use by process {owner}; wait for it or choose another --out") from error
        try:
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()))
            self._lock.flush()
            self._require_writable()
        except OSError as error:
            self.release()
            name = error.filename or self.path
            raise RunError(f"cannot write to {name}: {error.strerror}; mend it or choose another --out") from error

    def _require_writable(self) -> None:
        """Find now what would end the run at its first line of metrics.

        Raises:
            OSError: naming the file.
        """
        for path in (self.metrics, self._config, self.starts):
            if path.exists():
                with path.open("ab"):
                    pass

    def release(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def read_config(self) -> dict[str, Any]:
        """What `config.json` holds; nothing if there is none, or one that is no JSON."""
        try:
            found = json.loads(self._config.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_config(self, data: dict[str, Any]) -> None:
        """Write `config.json`."""
        _replace(self._config, json.dumps(data, indent=2) + "\n")

    def trim_metrics(self, step: int) -> int:
        """Drop the metrics after `step` and any line cut off by a kill: those steps are about to be taken again.

        Returns:
            The number of lines dropped.
        """
        if not self.metrics.exists():
            return 0
        lines = self.metrics.read_text().splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) < len(lines):
            _replace(self.metrics, "".join(f"{line}\n" for line in kept))
        return len(lines) - len(kept)

    def read_metric(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every line of `metrics.jsonl` that holds the metric."""
        if not self.metrics.exists():
            return []
        rows = [json.loads(line) for line in self.metrics.read_text().splitlines() if _step_of(line) < float("inf")]
        return [(int(row["step"]), float(row[name])) for row in rows if row.get(name) is not None]


def _step_of(line: str) -> float:
    """The step of a line of metrics; infinite for a line that is none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _replace(path: Path, text: str) -> None:
    """Write a whole file or nothing, through to the disk: without its id a run owns no checkpoint."""
    write_file(path, text.encode(), mode=0o600, durable=True)
