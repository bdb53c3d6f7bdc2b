"""The folder of one run: its files, its lock, and the removal of outdated
metrics after a resume.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastmoco.errors import OWNED, RunError, say, tell_launcher
from fastmoco.run.metrics_file import MOST_BYTES, Tell, cut_back, read_values
from fastmoco_pipelines.files.small import (
    SMALL_BYTES,
    UnfitFileError,
    linked_to,
    open_regular,
    read_json,
    read_small,
)
from fastmoco_pipelines.files.whole import (
    is_named,
    missing_folders,
    remove_empty,
    try_lock,
    write_file,
)
from fastmoco_pipelines.text import counted

FILES = {
    "lock": 1 << 12,
    "config.json": SMALL_BYTES,
    "metrics.jsonl": MOST_BYTES,
    "quarantine.jsonl": MOST_BYTES,
    "starts.json": 1 << 16,
    "curves.png": SMALL_BYTES,
    "torchrun.log": MOST_BYTES,
    "DONE": SMALL_BYTES,
    "PREEMPTED": SMALL_BYTES,
}
"""Every file of a run, and its largest size in bytes."""
_GROWING = ("lock", "metrics.jsonl", "quarantine.jsonl")
"""Files that are written in place; others are replaced by a new file."""
FOLDERS = ("checkpoints", "tensorboard")
"""Folders in that of a run; they may be links."""
TRACKED = ("wandb", "mlruns")
"""The same of runs with a tracker that writes there."""

MARKS = ("DONE", "PREEMPTED")
"""Files in the folder of a run that record how it ended; only the owner of its lock writes them."""


class RunFolder:
    """Paths of a run, and its lock.

    Layout: `config.json` (the config, its resolved values, the order of its images, the run's id,
    the ranks of each start), `metrics.jsonl` (one line
    for each logged step), `checkpoints/`, `quarantine.jsonl` (bad images found), `curves.png`,
    `lock`, `starts.json` (starts without progress), and after a run `DONE` or `PREEMPTED`, because
    launchers hide exit codes. The folder has mode 0700.

    A folder may come from somebody else, so none of its entries chooses another file or folder: a
    link in place of a file is refused. Folders may be links of this user's, which `notes` names.

    Args:
        path: the folder; `acquire` creates it if absent.

    Attributes:
        checkpoints: folder of the checkpoints.
        metrics: JSON lines, one for each logged step.
        quarantine: list of the bad images that the run has found; every rank appends to it.
        curves: picture of the loss and the accuracy.
        starts: the number of starts without progress.
        notes: what `acquire` and `trim_metrics` have found and the user should read, in sentences.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.quarantine = path / "quarantine.jsonl"
        self.curves = path / "curves.png"
        self.starts = path / "starts.json"
        self._config = path / "config.json"
        self.notes: list[str] = []
        self._lock: int | None = None
        self._give_back: Callable[[], object] = lambda: None
        self._made: list[Path] = []
        self._made_lock = False
        self._before: dict[Path, _File] = {}

    def write_starts(self, data: dict[str, Any]) -> None:
        """Write the number of starts without progress."""
        _replace(self.starts, json.dumps(data) + "\n")

    def mark(self, name: Literal["DONE", "PREEMPTED"] | None, text: str = "") -> None:
        """Record by the name of a file how the run ended; None: it has not. One
        mark replaces the other.

        Does nothing in a process that does not hold the lock, or no longer.
        """
        if self._lock is None or not self._holds_again(self._lock):
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
        found = [path for path in sorted(self.path.glob("*.tmp")) if not is_folder(path)]
        for path in found:
            path.unlink()
        return [path.name for path in found]

    def acquire(self) -> None:
        """Lock the folder for this process until `release` or the end of the
        process, however it ends.

        Raises:
            RunError: if the folder is a URL or cannot be written, another process trains into it,
                or something else is in the place of one of its files.
        """
        scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(self.path))
        if scheme is not None and not os.path.lexists(scheme[0]):
            raise RunError(
                f"{self.path} is a URL: a run needs a folder of this machine; choose another --out"
            )
        self.remember()
        try:
            self._take_lock()
        except OSError as error:
            self._remove_made()
            raise RunError(
                f"cannot write to {self.path}: {error.strerror}; choose another --out"
            ) from error
        except UnfitFileError as error:
            self._remove_made()
            raise RunError(f"{error}, or choose another --out") from error
        try:
            self._require_fit()
            self.notes = self._links()
            self._sign_lock()
            tell_launcher(OWNED)
        except OSError as error:
            self.withdraw()
            name = error.filename or self.path
            raise RunError(
                f"cannot write to {name}: {error.strerror}; fix it or choose another --out"
            ) from error
        except UnfitFileError as error:
            self.withdraw()
            raise RunError(f"{error}, or choose another --out") from error

    def _take_lock(self) -> None:
        """Make the folder if absent, and lock it.

        Raises:
            RunError: if another process holds it.
            OSError, UnfitFileError: if it cannot be locked.
        """
        lock = self.path / "lock"
        linked_to(self.path)
        while True:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            descriptor = open_regular(lock, flags, 0o600, follow=False, limit=FILES["lock"])
            try:
                mine = try_lock(descriptor, fcntl.LOCK_EX)
                if mine and is_named(descriptor, str(lock)):
                    self._lock, descriptor = descriptor, -1  # held open until the run ends
                    self._give_back = weakref.finalize(self, os.close, self._lock)
                    return
                owner = os.pread(descriptor, 20, 0).strip()
            finally:
                if descriptor >= 0:
                    os.close(descriptor)
            if not mine:
                name = owner.decode() if owner.isdigit() else "unknown"
                raise RunError(
                    f"{self.path} is in use by process {name}; wait for it or choose another --out"
                )
            # removed by a refused start before this one had it

    def _holds_again(self, lock: int) -> bool:
        """Whether the lock is still the file of that name; one that somebody has removed is taken
        again, unless another process has the folder now."""
        if is_named(lock, str(self.path / "lock")) or not self.path.is_dir():
            return True
        try:
            self._take_lock()
            self._sign_lock()
        except (OSError, RunError, UnfitFileError) as error:
            say(f"{self.path / 'lock'} was removed during this run, which leaves no mark: {error}")
            return False
        return True

    def _sign_lock(self) -> None:
        """Write the number of this process into the lock, for messages of others."""
        assert self._lock is not None  # noqa: S101 - a type: callers have opened it
        os.ftruncate(self._lock, 0)
        os.write(self._lock, str(os.getpid()).encode())

    def remember(self) -> None:
        """Take the state of now as the one to which `withdraw` returns; `acquire` does it unless
        it is done."""
        if self._before:
            return
        lock = self.path / "lock"
        self._made = missing_folders(self.path)
        self._made_lock = not lock.exists()
        self._before = {path: _File.read(path) for path in (lock, self.starts)}

    def _require_fit(self) -> None:
        """Detect now what would otherwise end the run at its first line of metrics, or write
        outside its folder.

        Raises:
            OSError: with the name of the file.
            UnfitFileError: if it is a link, no file, or far too large.
        """
        finished = (self.path / "DONE").exists()
        for name, limit in FILES.items():
            path = self.path / name
            if finished and path == self.curves:
                continue  # nothing but this is written, and it says itself what is in its way
            if is_folder(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            flags = os.O_WRONLY | os.O_APPEND if name in _GROWING else os.O_RDONLY
            with contextlib.suppress(FileNotFoundError):
                os.close(open_regular(path, flags, follow=False, limit=limit))

    def _links(self) -> list[str]:
        """The folders of the run that are links, in sentences."""
        folders = [self.path, *(self.path / name for name in (*FOLDERS, *TRACKED))]
        if not self.checkpoints.is_symlink():
            folders.remove(self.checkpoints)  # a save says what it is
        return [f"{path} is a link to {to}" for path in folders if (to := linked_to(path))]

    def release(self) -> None:
        """Unlock the folder."""
        self._before = {}
        self._lock = None
        with contextlib.suppress(OSError):  # on a full disk; it is closed all the same
            self._give_back()

    def withdraw(self) -> None:
        """Unlock the folder after a refused start, and leave it as it was before `acquire`.

        What this process has made is removed, and the two files that every start writes have their
        former content. Does nothing in a process that does not hold the lock.
        """
        if self._lock is None:
            return
        with contextlib.suppress(OSError, UnfitFileError):  # the refusal is what the user must read
            for path, file in self._before.items():
                if path.name != "lock":
                    file.restore(path)
                elif not self._made_lock:
                    file.restore(path, self._lock)
        self._remove_made()
        self.release()

    def _remove_made(self) -> None:
        """Remove the lock and the folders that `acquire` has made, except folders in use."""
        if self._lock is not None and self._made_lock:
            (self.path / "lock").unlink(missing_ok=True)
        remove_empty(self._made)

    def read_config(self) -> dict[str, Any]:
        """The content of `config.json`; empty if the file is missing or not a JSON object."""
        return read_object(self._config)

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
        and damaged lines (`metrics_file.cut_back`), which `notes` then names.

        Returns:
            The number of lines removed.
        """
        if not self.metrics.exists():
            return 0
        cut = cut_back(self.metrics, step)
        if cut.damaged:
            self.notes.append(f"{self.metrics}: {counted(cut.damaged, 'damaged line')} removed")
        return cut.lines

    def read_metric(self, name: str, *, tell: Tell = lambda text: None) -> list[tuple[int, float]]:
        """(step, value) for every line of `metrics.jsonl` with the metric; `tell` is called with a
        sentence if some are damaged."""
        return list(read_values(self.metrics, name, tell=tell)) if self.metrics.exists() else []


def read_object(path: Path, limit: int = SMALL_BYTES) -> dict[str, Any]:
    """A small file of a run that is a JSON object; empty if it is missing or anything else."""
    try:
        found = read_json(path, limit, follow=False)
    except (OSError, UnfitFileError):
        return {}
    return found if isinstance(found, dict) else {}


def is_folder(path: Path) -> bool:
    """Whether this is a folder itself, not a link to one."""
    return path.is_dir() and not path.is_symlink()


@dataclass(frozen=True)
class _File:
    """A file as it was: its bytes and times; without bytes if there was none, or one that a run
    refuses.
    """

    content: bytes | None = None
    times: tuple[int, int] = (0, 0)
    refused: bool = False

    @classmethod
    def read(cls, path: Path) -> _File:
        """The file as it is now."""
        try:
            found = path.lstat()
            content = read_small(path, FILES[path.name], follow=False)
        except FileNotFoundError:
            return cls()
        except (OSError, UnfitFileError):
            return cls(refused=True)
        return cls(content, (found.st_atime_ns, found.st_mtime_ns))

    def restore(self, path: Path, held: int | None = None) -> None:
        """Make the file again what it was.

        Args:
            path: of the file.
            held: a descriptor of it that holds its lock. It is then written in place: who opens a
                new file of this name would have the folder at once.
        """
        if self.refused:
            return
        if self.content is None:
            path.unlink(missing_ok=True)
        elif _File.read(path) != self:
            if held is None:
                write_file(path, self.content, mode=0o600)
            else:
                os.ftruncate(held, 0)
                os.write(held, self.content)
            os.utime(path, ns=self.times, follow_symlinks=False)


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
