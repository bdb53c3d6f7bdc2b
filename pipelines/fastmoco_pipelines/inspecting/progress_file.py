"""What an interrupted check has finished, tar by tar, so that `--continue` goes on from there.

One JSON object a line, each sealed by a hash of its own. The first names the terms of the check: what
must be the same for results to be worth anything. Each further line is the result of one tar, with
the state of the tar and its index, and is pushed through to the disk before the next tar is begun.
A process that is killed leaves at most a torn last line, which is skipped.

The file is removed when the check ends. It is not a shard (`*.tar`) and not a list
(`quarantine*.jsonl`): nothing else reads it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fastmoco_pipelines.files import is_named, is_sealed, remove_if_free, sealed_json, try_lock
from fastmoco_pipelines.inspecting.report import TarResult

FORMAT = "fastmoco-check-progress"
VERSION = 1
_DECODERS = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")

Tell = Callable[[str], None]
"""Receives sentences for the user."""


@dataclass(frozen=True, slots=True)
class Known:
    """The result of a tar, and the state and the promises under which it was found."""

    state: dict[str, Any]
    result: TarResult


class ProgressFile:
    """The progress of one check; see the module. One thread may use it.

    Args:
        places: where the file may be, best first: the first one that can be written is taken, and
            an older file is looked for in all.
        terms: what must be the same for results to be taken over.
        resume: take over the results of an older file.
        tell: receives what the user should know.

    Attributes:
        known: results of an older file, by name of the tar; empty without `resume`.
        recorded: tars whose results are in the file.
    """

    def __init__(
        self, places: Sequence[Path], terms: dict[str, Any], *, resume: bool, tell: Tell
    ) -> None:
        self._places = places
        self._terms = terms
        self._tell = tell
        self._descriptor: int | None = None
        self._failed = False
        self._old: Path | None = None
        self._length = 0  # bytes of the older file that are sound, if it is taken over
        self.path: Path | None = None
        self.known: dict[str, Known] = {}
        self.recorded = 0
        self._look_for_older(resume)

    def add(self, tar: str, state: dict[str, Any], result: TarResult) -> None:
        """Record the result of a tar, whole and on the disk, or not at all."""
        if self._failed or (self._descriptor is None and not self._begin()):
            return
        line = {"tar": tar, "state": state, "result": asdict(result)}
        self.recorded += self._append(line)

    def finish(self) -> None:
        """Remove the file: the check has ended."""
        if self._descriptor is not None:
            assert self.path is not None
            if is_named(self._descriptor, str(self.path)):
                self.path.unlink(missing_ok=True)
            self.close()
        if self._old is not None and self._old != self.path:
            remove_if_free(str(self._old))

    def close(self) -> None:
        """Leave the file for a later check."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _look_for_older(self, resume: bool) -> None:
        for path in self._places:
            content = _read(path)
            if content is None:
                continue
            terms, known, length = content
            differences = _differences(terms, self._terms)
            if resume and not differences:
                self._old, self.known, self._length = path, known, length
                self.recorded = len(known)
                return
            if resume:
                self._tell(
                    f"the unfinished check in {path} is not taken over: {differences}; every tar "
                    "is checked"
                )
                return
            if differences:
                self._tell(
                    f"an unfinished check of other shards or with other options exists ({path}): "
                    f"{differences}; it is replaced"
                )
                return
            self._old = path
            self._tell(
                f"an unfinished check of these shards exists, with {len(known)} tars done "
                f"({path}): --continue takes it over; this check begins again and replaces it"
            )
            return
        if resume:
            self._tell("there is no unfinished check of these shards: every tar is checked")

    def _begin(self) -> bool:
        """Open the file; False if there is no place for one."""
        taken = self._old if self._length else None
        for path in [taken] if taken is not None else self._places:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
                descriptor = os.open(path, flags, 0o644)
            except OSError:
                continue
            self.path = path
            if not _lock(descriptor):
                os.close(descriptor)
                self._give_up(f"another check of this folder is running and uses {path}")
                return False
            self._descriptor = descriptor
            # Without its torn last line; from the beginning if it was removed in the meantime.
            goes_on = taken is not None and os.fstat(descriptor).st_size >= self._length
            os.ftruncate(descriptor, self._length if goes_on else 0)
            head = {"format": FORMAT, "version": VERSION, "terms": self._terms}
            return goes_on or self._append(head)
        self._give_up("no place can be written: " + ", ".join(str(path) for path in self._places))
        return False

    def _append(self, content: dict[str, Any]) -> bool:
        """One write, so that a reader sees the whole line or a torn last one."""
        assert self._descriptor is not None
        line = sealed_json(content) + b"\n"
        try:
            if os.write(self._descriptor, line) == len(line):
                os.fsync(self._descriptor)
                return True
            problem = "the disk is full"
        except OSError as error:
            problem = str(error.strerror)
        self._give_up(f"{self.path}: {problem}")
        return False

    def _give_up(self, why: str) -> None:
        self._failed = True
        self._tell(f"the progress of this check is not recorded any more ({why})")


def places_for(folder: Path, name: str, identity: str, *, beside: bool) -> list[Path]:
    """Where the progress file of a check may be: in the folder of its list, unless nothing may be
    written there, or in the user's state folder (XDG_STATE_HOME or ~/.local/state).

    Args:
        folder: of the list.
        name: of the file there.
        identity: of the shards, e.g. their folder: names the file in the state folder.
        beside: whether the list is written at all.
    """
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    fallback = state / "fastmoco" / f"check-progress-{digest}.jsonl"
    return [folder / name, fallback] if beside else [fallback, folder / name]


def versions() -> dict[str, str]:
    """Versions of what decides about an image."""
    found = {"fastmoco": _version("fastmoco"), "Pillow": _version("pillow")}
    decoder = next((text for name in _DECODERS if (text := _version(name))), "")
    return found | {"DALI": decoder}


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _lock(descriptor: int) -> bool:
    try:
        return try_lock(descriptor, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return True


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs between two terms, in words; empty if nothing does."""
    return ", ".join(
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    )


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Known], int] | None:
    """Terms and results in a file, and the length of its sound lines; None where there is no such
    file, or not of this version."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    head, *lines = content.split(b"\n")[:-1] or [b""]  # what is not ended by a newline is torn
    parsed = _parsed(head)
    if parsed is None or parsed.get("format") != FORMAT or parsed.get("version") != VERSION:
        return None
    known: dict[str, Known] = {}
    length = len(head) + 1
    for line in lines:
        found = _parsed(line)
        if found is None:
            break
        try:
            known[found["tar"]] = Known(found["state"], TarResult.from_json(found["result"]))
        except (TypeError, KeyError):
            break
        length += len(line) + 1
    return parsed["terms"], known, length


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object of a line whose seal is right."""
    if not is_sealed(line):
        return None
    try:
        content: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
