"""The folder of one run: its files, its lock, and the removal of outdated
metrics after a resume.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from fastmoco.errors import OWNED, RunError, tell_launcher
from fastmoco.run.metrics_file import cut_back, read_values
from fastmoco_pipelines.files import is_named, missing_folders, remove_empty, write_file

MARKS = ("DONE", "PREEMPTED")
"""Files in the folder of a run that record how it ended; only the owner of its lock writes them."""


class RunFolder:
    """Paths of a run, and its lock.

    Layout: `config.json` (the config, its resolved values, the order of its images, the run's id,
    the ranks of each start), `metrics.jsonl` (one line
    for each logged step), `checkpoints/`, `quarantine.jsonl` (bad images found), `curves.png`,
    `lock`, `starts.json` (starts without progress), and after a run `DONE` or `PREEMPTED`, because
    launchers hide exit codes. The folder has mode 0700.

    Args:
        path: the folder; `acquire` creates it if absent.

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
        self._made: list[Path] = []
        self._made_lock = False
        self._before: dict[Path, _File] = {}

    def write_starts(self, data: dict[str, Any]) -> None:
        """Write the number of starts without progress."""
        _replace(self.starts, json.dumps(data) + "\n")

    def mark(self, name: Literal["DONE", "PREEMPTED"] | None, text: str = "") -> None:
        """Record by the name of a file how the run ended; None: it has not. One
        mark replaces the other.

        Does nothing in a process that does not hold the lock.
        """
        if self._lock is None:
            return
        for other in MARKS:
            if other != name:
                (self.path / other).unlink(missing_ok=True)
                tell_launcher(other, holds=False)
        if name is not None:
            # The run ended as requested, so repeated preemption before the next
            # step does not count as a failure.
            self.starts.unlink(missing_ok=True)
            _replace(self.path / name, text + "\n")
            tell_launcher(name)

    def take_leftovers(self) -> list[str]:
        """Remove incomplete files of a killed run, which no reader opens, and return their names.

        Does nothing in a process that does not hold the lock.
        """
        if self._lock is None:
            return []
        found = sorted(self.path.glob("*.tmp"))
        for path in found:
            path.unlink()
        return [path.name for path in found]

    def acquire(self) -> None:
        """Lock the folder for this process until `release` or the end of the
        process, however it ends.

        Raises:
            RunError: if the folder is a URL or cannot be written, or another process trains into it.
        """
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(self.path))
        if scheme is not None and not os.path.lexists(scheme[0]):
            raise RunError(
                f"{self.path} is a URL: a run needs a folder of this machine; choose another --out"
            )
        lock = self.path / "lock"
        self.remember()
        try:
            while True:
                self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
                descriptor = os.open(
                    lock, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
                )
                self._lock = os.fdopen(descriptor, "a+")  # held open until the run ends
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if is_named(descriptor, str(lock)):
                    break
                self._lock.close()  # removed by a refused start before this one had it
        except BlockingIOError as error:
            assert self._lock is not None
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            self._lock = None
            raise RunError(
                f"{self.path} is in use by process {owner}; wait for it or choose another --out"
            ) from error
        except OSError as error:
            self._remove_made()
            raise RunError(
                f"cannot write to {self.path}: {error.strerror}; choose another --out"
            ) from error
        try:
            self._require_writable()
            self._lock.truncate(0)
            self._lock.write(str(os.getpid()))
            self._lock.flush()
            tell_launcher(OWNED)
        except OSError as error:
            self.withdraw()
            name = error.filename or self.path
            raise RunError(
                f"cannot write to {name}: {error.strerror}; fix it or choose another --out"
            ) from error

    def remember(self) -> None:
        """Take the state of now as the one to which `withdraw` returns; `acquire` does it unless
        it is done."""
        if self._before:
            return
        lock = self.path / "lock"
        self._made = missing_folders(self.path)
        self._made_lock = not lock.exists()
        self._before = {path: _File.read(path) for path in (lock, self.starts)}

    def _require_writable(self) -> None:
        """Detect an error now that would otherwise end the run at its first line of metrics.

        Raises:
            OSError: with the name of the file.
        """
        for path in (self.metrics, self._config, self.starts):
            if path.exists():
                with path.open("ab"):
                    pass

    def release(self) -> None:
        """Unlock the folder."""
        self._before = {}
        lock = self._lock
        self._lock = None
        if lock is not None:
            with contextlib.suppress(OSError):  # on a full disk; it is closed all the same
                lock.close()

    def withdraw(self) -> None:
        """Unlock the folder after a refused start, and leave it as it was before `acquire`.

        What this process has made is removed, and the two files that every start writes have their
        former content. Does nothing in a process that does not hold the lock.
        """
        if self._lock is None:
            return
        with contextlib.suppress(OSError):  # the refusal is what the user must read
            for path, file in self._before.items():
                if path.name != "lock" or not self._made_lock:
                    file.restore(path)
        self._remove_made()
        self.release()

    def _remove_made(self) -> None:
        """Remove the lock and the folders that `acquire` has made, except folders in use."""
        if self._lock is not None and self._made_lock:
            (self.path / "lock").unlink(missing_ok=True)
        remove_empty(self._made)

    def read_config(self) -> dict[str, Any]:
        """The content of `config.json`; empty if the file is missing or not a JSON object."""
        try:
            found = json.loads(self._config.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write_config(self, data: dict[str, Any]) -> None:
        """Write `config.json`."""
        _replace(self._config, json.dumps(data, indent=2) + "\n")

    def has_curves(self) -> bool:
        """Whether there is a picture that is not older than the metrics."""
        try:
            return self.curves.stat().st_mtime_ns >= self.metrics.stat().st_mtime_ns
        except FileNotFoundError:
            return False

    def trim_metrics(self, step: int) -> int:
        """Remove metrics after `step`, which the resumed run will write again,
        and incomplete lines (`metrics_file.cut_back`).

        Returns:
            The number of lines removed.
        """
        return cut_back(self.metrics, step) if self.metrics.exists() else 0

    def read_metric(self, name: str) -> list[tuple[int, float]]:
        """(step, value) for every line of `metrics.jsonl` with the metric."""
        return list(read_values(self.metrics, name)) if self.metrics.exists() else []


@dataclass(frozen=True)
class _File:
    """A file as it was: its bytes, None if there was none, and its times."""

    content: bytes | None
    times: tuple[int, int]

    @classmethod
    def read(cls, path: Path) -> _File:
        """The file as it is now."""
        try:
            found = path.stat()
            return cls(path.read_bytes(), (found.st_atime_ns, found.st_mtime_ns))
        except OSError:
            return cls(None, (0, 0))

    def restore(self, path: Path) -> None:
        """Make the file again what it was."""
        if self.content is None:
            path.unlink(missing_ok=True)
        elif _File.read(path) != self:
            path.write_bytes(self.content)
            os.utime(path, ns=self.times)


def _replace(path: Path, text: str) -> None:
    """Replace a file atomically and flush it, because a run without its id owns no checkpoint.

    Raises:
        RunError: if the file system fails, for example because it is full.
    """
    try:
        write_file(path, text.encode(), mode=0o600, durable=True)
    except OSError as error:
        raise RunError(
            f"cannot write to {path}: {error.strerror}; fix it or choose another --out"
        ) from error
