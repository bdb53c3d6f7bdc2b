"""What an interrupted check has finished, tar by tar, so that `--continue` goes on from there.

One JSON object a line, each sealed by a hash of its own. The first names the terms of the check: what
must be the same for results to be worth anything. Each further line is the result of one tar, with
the state of the tar and its index, and is pushed through to the disk before the next tar is begun.
A process that is killed leaves at most a torn last line, which is skipped.

The file is named by the shards, so that checks of other shards of the same folder have files of their
own. It is locked from the time it is read, and removed when the check ends. It is not a shard
(`*.tar`) and not a list (`quarantine*.jsonl`): nothing else reads it.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from fastmoco_pipelines.files.small import UnfitFileError, json_of, open_regular, read_small
from fastmoco_pipelines.files.whole import (
    is_named,
    is_sealed,
    remove,
    sealed_json,
    try_lock,
    user_state,
)
from fastmoco_pipelines.inspecting.report import TarResult
from fastmoco_pipelines.text import escaped, shard_name

FORMAT = "fastmoco-check-progress"
VERSION = 1
MAX_BYTES = 256 << 20
"""Largest progress that is taken over, in bytes: half a million tars without faults."""
_DECODERS = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")

Tell = Callable[[str], None]
"""Receives sentences for the user."""


@dataclass(frozen=True, slots=True)
class Known:
    """The result of a tar, and the state and the promises under which it was found."""

    state: dict[str, Any]
    result: TarResult


@dataclass(frozen=True, slots=True)
class _Content:
    """Terms and results of a file, and its sound lines, which end before a torn one."""

    terms: dict[str, Any]
    known: dict[str, Known]
    sound: bytes


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
        self._descriptor: int | None = None  # holds the lock
        self._begun = False
        self._failed = False
        self._sound = b""  # lines of an older file that are taken over
        self.path: Path | None = None
        self.known: dict[str, Known] = {}
        self.recorded = 0
        self._look_for_older(resume)

    def add(self, tar: str, state: dict[str, Any], result: TarResult) -> None:
        """Record the result of a tar, whole and on the disk, or not at all."""
        if self._failed or not (self._begun or self._begin()):
            return
        line = {"tar": tar, "state": state, "result": asdict(result)}
        self.recorded += self._write(_line(line))

    def finish(self) -> None:
        """Remove the file: the check has ended."""
        if self._descriptor is not None and is_named(self._descriptor, str(self.path)):
            remove(str(self.path))
        self.close()

    def close(self) -> None:
        """Leave the file for a later check."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _look_for_older(self, resume: bool) -> None:
        """Read an older file, and hold its lock from now on."""
        for path in self._places:
            descriptor = _open(path, os.O_RDWR)
            if descriptor is not None and not _lock(descriptor):
                os.close(descriptor)
                self._give_up(f"another check of these shards is running and uses {path}")
                return
            content = _read(path)
            if content is None:
                if descriptor is not None:
                    os.close(descriptor)
                continue
            self._descriptor = descriptor
            self.path = path
            self._judge(content, path, resume)
            return
        if resume:
            others = self._of_other_shards()
            self._tell(
                f"there is no unfinished check of these shards: every tar is checked{others}"
            )

    def _judge(self, content: _Content, path: Path, resume: bool) -> None:
        differences = _differences(content.terms, self._terms)
        if resume and not differences:
            self.known = content.known
            self._sound = content.sound
            self.recorded = len(self.known)
        elif resume:
            self._tell(
                f"the unfinished check in {path} is not taken over: {differences}; every tar is "
                "checked"
            )
        elif differences:
            self._tell(
                f"an unfinished check with other options exists ({path}): {differences}; it is "
                "replaced"
            )
        else:
            self._tell(
                f"an unfinished check of these shards exists, with {len(content.known)} tars done "
                f"({path}): --continue takes it over; this check begins again and replaces it"
            )

    def _of_other_shards(self) -> str:
        """Which unfinished checks are in the same folder, in words: the pattern may be another
        spelling of theirs."""
        folder = self._places[0].parent
        found = sorted(folder.glob("check-progress*.jsonl")) if folder.is_dir() else []
        contents = [(path, _read(path)) for path in found]
        named = [f"{c.terms.get('shards')} ({path})" for path, c in contents if c is not None]
        return f"; those of other shards are left alone: {', '.join(named[:3])}" if named else ""

    def _begin(self) -> bool:
        """Open the file, or the older one, and write its beginning; False if there is no place."""
        self._begun = True
        head = self._sound or _line({"format": FORMAT, "version": VERSION, "terms": self._terms})
        if self._descriptor is not None and is_named(self._descriptor, str(self.path)):
            # without its torn last line
            os.ftruncate(self._descriptor, len(self._sound))
            return bool(self._sound) or self._write(head)
        self.close()
        for path in self._places:
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = _open(path, os.O_RDWR | os.O_CREAT)
            if descriptor is None:
                continue
            if not _lock(descriptor) or _read(path) is not None:
                os.close(descriptor)
                self._give_up(f"another check of these shards was begun meanwhile and uses {path}")
                return False
            self.path = path
            self._descriptor = descriptor
            os.ftruncate(descriptor, 0)
            return self._write(head)
        self._give_up("no place can be written: " + ", ".join(str(path) for path in self._places))
        return False

    def _write(self, lines: bytes) -> bool:
        """One write, so that a reader sees whole lines or a torn last one."""
        assert self._descriptor is not None  # noqa: S101 - a type: callers have opened the file
        try:
            if os.write(self._descriptor, lines) == len(lines):
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


def places_for(folder: Path, place: str, identity: str, *, beside: bool) -> list[Path]:
    """Where the progress file of a check may be: in the folder of its list, unless nothing may be
    written there, or in the user's state folder (XDG_STATE_HOME or ~/.local/state).

    Args:
        folder: of the list.
        place: part of the file's name there.
        identity: of the shards, e.g. their folder: names the file in both.
        beside: whether the list is written at all.
    """
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    near = folder / f"check-progress{place}-{digest}.jsonl"
    try:
        fallback = user_state() / f"check-progress-{digest}.jsonl"
    except OSError:  # without a home folder
        return [near]
    return [near, fallback] if beside else [fallback, near]


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


def _open(path: Path, how: int) -> int | None:
    """A descriptor of a file; None where that is not possible."""
    try:
        return open_regular(path, how | os.O_APPEND, 0o644, follow=False)
    except (OSError, UnfitFileError):
        return None


def _lock(descriptor: int) -> bool:
    try:
        return try_lock(descriptor, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return True


def _line(content: dict[str, Any]) -> bytes:
    return sealed_json(content) + b"\n"


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What differs between two terms, in words; empty if nothing does."""
    return ", ".join(
        f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        for name in {**old, **new}
        if old.get(name) != new.get(name)
    )


def _read(path: Path) -> _Content | None:
    """What a file contains; None where there is no such file, or not of this version."""
    try:
        content = read_small(path, MAX_BYTES, follow=False)
    except (OSError, UnfitFileError):
        return None
    lines = io.BytesIO(content)  # one after another: a list of all could take gigabytes
    head = lines.readline()
    parsed = _parsed(head[:-1])
    if parsed is None or parsed.get("format") != FORMAT or parsed.get("version") != VERSION:
        return None
    if not isinstance(parsed.get("terms"), dict):
        return None
    known: dict[str, Known] = {}
    length = len(head)
    for line in lines:
        found = _parsed(line[:-1])
        if found is None or not line.endswith(b"\n"):  # torn
            break
        try:
            known[found["tar"]] = _known_of(found)
        except (ValueError, TypeError, KeyError):
            break
        length += len(line)
    return _Content(parsed["terms"], known, content[:length])


def _known_of(content: dict[str, Any]) -> Known:
    """The result of a line. A seal shows damage, not who wrote it.

    Raises:
        ValueError, TypeError, KeyError: if it is none, or not about its own tar.
    """
    tar, state = content["tar"], content["state"]
    if not isinstance(tar, str) or not isinstance(state, dict):
        raise TypeError("no result of a tar")
    result = TarResult.from_json(content["result"])
    name = shard_name(tar) if "://" in tar else os.path.basename(tar)
    named = {entry.shard for entry in result.entries}
    named |= set() if result.checked is None else {result.checked.shard}
    if not named <= {escaped(name)}:
        raise ValueError("an entry of another tar")
    return Known(state, result)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object of a line whose seal is right."""
    if not is_sealed(line):
        return None
    try:
        content: Any = json_of(line, FORMAT)
    except UnfitFileError:
        return None
    return content if isinstance(content, dict) else None
