"""The list of samples that are not delivered (`quarantine.jsonl`): which, why and since when. The
tars stay as they are.

`fastmoco data check` writes one beside the tars, and loaders read it when they open the set; a run
keeps a list of its own in its run folder. One JSON object a line:

{"shard": "train-000000.tar", "key": "000000012", "extension": "jpg", "offset": 512, "size": 9001,
"crc32": 1, "reason": "...", "when": "2026-11-22T01:55:00Z", "file": "cat/IMG_1.jpg"}

`file` is absent where the original file is not known. A tar that is no longer as it was indexed has
a line of its own once it has been checked:

{"shard": "train-000000.tar", "tar_bytes": 40960, "tar_hash": "...", "records": "...", "when": "..."}

By it loaders know that the images of the older index that are whole are not listed, and take the
index for this state of the tar, and no other one.

A line is about bytes, not names: it applies only if shard, offset, size and crc32 are those of the
index. After a tar was fixed or packed again its old lines are stale: they match nothing, and
are counted when the set is opened. A line with numbers or names that no index can have is skipped
and counted, as a torn one is.
"""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import ArrayLike

from fastmoco_pipelines.files.small import UnfitFileError, json_of, open_regular, read_small
from fastmoco_pipelines.files.whole import write_file
from fastmoco_pipelines.formats.paths import is_file_name
from fastmoco_pipelines.text import escaped

NAME = "quarantine.jsonl"
MAX_REASON = 500
"""Longest reason that is kept, in characters."""
MAX_LIST_BYTES = 64 << 20
"""Largest list, in bytes: about 200,000 lines; a set with more should be packed again."""
CURE = ": `fastmoco data check` on the shards writes the list again"
_MAX_LINE = 1 << 16
_MAX_LINES = 1 << 20
"""No list of `MAX_LIST_BYTES` has more entries; what follows counts as one broken line."""
_NUMBERS = {"offset": 2**62, "size": 2**32 - 1, "crc32": 2**32 - 1}
"""Numbers of a line, and the largest of each."""
_DEPTH = 4
_TEXTS = ("shard", "key", "extension", "reason", "when")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuarantineEntry:
    """One sample that is not delivered.

    Attributes:
        shard: file name of the tar, without its folder; `key` and `extension` name the member.
        offset: of the image's first byte in the tar; `size` in bytes; `crc32` by the index.
        reason: why, in words; control characters are escaped.
        when: moment of the discovery, UTC, ISO 8601.
        file: path of the original file below the folder that was packed, escaped; empty: not known.
    """

    shard: str
    key: str
    extension: str
    offset: int
    size: int
    crc32: int
    reason: str
    when: str
    file: str = ""

    @property
    def identity(self) -> tuple[str, int, int, int]:
        """What an index must agree with."""
        return self.shard, self.offset, self.size, self.crc32


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedTar:
    """A tar that was checked against the index of an earlier state of it: the list beside it has
    all that is lost since.

    Attributes:
        shard: file name of the tar, without its folder.
        tar_bytes, tar_hash: its size and the hash of its ends, when it was checked.
        records: SHA-256 (hex) of the records of the index.
        when: moment of the check, UTC, ISO 8601.
    """

    shard: str
    tar_bytes: int
    tar_hash: str
    records: str
    when: str

    @property
    def identity(self) -> tuple[str, int, str, str]:
        """What tar and index must agree with."""
        return self.shard, self.tar_bytes, self.tar_hash, self.records


class Quarantine:
    """Samples that are not delivered, each once.

    Attributes:
        broken: lines of the file that could not be understood and were left out.
        checked: tars that are no longer as they were indexed, as they were checked, by identity.
    """

    def __init__(
        self,
        entries: Iterable[QuarantineEntry] = (),
        *,
        broken: int = 0,
        checked: Iterable[CheckedTar] = (),
    ) -> None:
        self.broken = broken
        self.checked = {tar.identity: tar for tar in checked}
        self._entries: dict[tuple[str, int, int, int], QuarantineEntry] = {}
        for entry in entries:
            self._entries.setdefault(entry.identity, entry)

    @classmethod
    def read(cls, path: Path) -> Self:
        """The list in a file; empty where there is none. A line cut by a crash is counted in
        `broken`.

        Raises:
            UnfitFileError: if it is no regular file, or larger than a list may be.
            OSError: if it cannot be read.
        """
        try:
            return cls.load(io.BytesIO(read_small(path, MAX_LIST_BYTES)))
        except FileNotFoundError:
            return cls()

    @classmethod
    def load(cls, file: BinaryIO) -> Self:
        """The list in an open file. Millions of lines that are none are not looked at one by one."""
        entries = []
        checked = []
        broken = 0
        lines = 0
        while line := file.readline(_MAX_LINE):
            lines += 1
            if lines > _MAX_LINES:
                broken += 1
                break
            entry = _parse(line)
            if isinstance(entry, CheckedTar):
                checked.append(entry)
            elif entry is not None:
                entries.append(entry)
            elif line.strip():
                broken += 1
        return cls(entries, broken=broken, checked=checked)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[QuarantineEntry]:
        return iter(self._entries.values())

    def add(
        self,
        *,
        shard: str,
        key: str,
        extension: str,
        offset: int,
        size: int,
        crc32: int,
        reason: str,
        when: str = "",
        file: str = "",
    ) -> QuarantineEntry | None:
        """Note one sample; `when` is now unless given.

        Returns:
            The new entry, or None if this sample is listed already.
        """
        entry = QuarantineEntry(
            shard=shard,
            key=key,
            extension=extension,
            offset=int(offset),
            size=int(size),
            crc32=int(crc32),
            reason=escaped(reason)[:MAX_REASON],
            when=when or now(),
            file=escaped(file),
        )
        if entry.identity in self._entries:
            return None
        self._entries[entry.identity] = entry
        return entry

    def update(self, other: Iterable[QuarantineEntry]) -> None:
        """Take over the entries of another list; of a sample that both hold, the first entry
        stays."""
        if isinstance(other, Quarantine):
            self.checked |= other.checked
        for entry in other:
            self._entries.setdefault(entry.identity, entry)

    def rows(
        self, shard: str, offset: ArrayLike, size: ArrayLike, crc32: ArrayLike
    ) -> dict[int, str]:
        """Which rows of a shard's index are not delivered, and why.

        Args:
            shard: file name of the tar.
            offset, size, crc32: columns of its index, [n] each.

        Returns:
            {row: reason}. Entries of this shard beyond these are stale.
        """
        wanted = {entry.identity[1:]: entry.reason for entry in self if entry.shard == shard}
        if not wanted:
            return {}
        offsets = np.asarray(offset)
        sizes = np.asarray(size)
        checksums = np.asarray(crc32)
        candidates = np.flatnonzero(np.isin(offsets, [place[0] for place in wanted])).tolist()
        places = (
            (row, (int(offsets[row]), int(sizes[row]), int(checksums[row]))) for row in candidates
        )
        return {row: wanted[place] for row, place in places if place in wanted}

    def write(self, path: Path) -> Path:
        """Write the whole list in place of an older file: a reader sees the old one or the new one,
        never half of it."""
        return write_file(path, b"".join(map(_line, (*self, *self.checked.values()))))


def append_entry(path: Path, entry: QuarantineEntry) -> None:
    """Add one line to a file, created if needed. Many processes may do so at once: every line is
    one write.

    Raises:
        OSError: if the line cannot be written in full.
        UnfitFileError: if the file is a link, or no regular file.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    descriptor = open_regular(path, flags, 0o644, follow=False)
    try:
        end = os.fstat(descriptor).st_size
        # A writer was killed in the middle of a line.
        torn = end > 0 and os.pread(descriptor, 1, end - 1) != b"\n"
        line = b"\n" * torn + _line(entry)
        if os.write(descriptor, line) != len(line):
            raise OSError(
                f"{path}: no room for the line about {entry.shard}: {entry.key}.{entry.extension}"
            )
    finally:
        os.close(descriptor)


def read_list(path: Path) -> tuple[Quarantine, str | None]:
    """The list in a file, and what is wrong with it, if anything, in a sentence."""
    try:
        read = Quarantine.read(path)
    except UnfitFileError as error:
        return Quarantine(), f"{error}; bad images will be found again"
    except OSError as error:
        return (
            Quarantine(),
            f"{path}: cannot be read ({error.strerror}); bad images will be found again",
        )
    broken = (
        f"{path}: {read.broken} lines are not entries of a list and were skipped{CURE}"
        if read.broken
        else None
    )
    return read, broken


def now() -> str:
    """This moment, UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def quarantine_path(folder: Path) -> Path:
    """Path of the list of a folder of shards, or of a run."""
    return folder / NAME


def _line(entry: QuarantineEntry | CheckedTar) -> bytes:
    content = asdict(entry)
    if isinstance(entry, QuarantineEntry) and not entry.file:
        del content["file"]
    return json.dumps(content).encode("ascii") + b"\n"


def _parse(line: bytes) -> QuarantineEntry | CheckedTar | None:
    try:
        content = json_of(line, NAME, depth=_DEPTH)
        checked = isinstance(content, dict) and "tar_bytes" in content
        return checked_of(content) if checked else entry_of(content)
    except ValueError:
        return None


def entry_of(content: Any) -> QuarantineEntry:
    """The entry of an object of JSON; texts are escaped.

    Raises:
        ValueError: names the field that no entry has so.
    """
    if not isinstance(content, dict):
        raise ValueError("no object")
    numbers: dict[str, Any] = {name: content.get(name) for name in _NUMBERS}
    for name, value in numbers.items():
        if type(value) is not int or not 0 <= value <= _NUMBERS[name]:
            raise ValueError(f"{name}={value!a:.40}: a whole number to {_NUMBERS[name]} is due")
    texts: dict[str, Any] = {name: content.get(name) for name in _TEXTS}
    texts["file"] = content.get("file", "")
    for name, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{name}={value!a:.40}: text is due")
    if not is_file_name(texts["shard"]):
        raise ValueError(f"shard={texts['shard']!a:.80}: the name of a file is due")
    fields = {name: escaped(text) for name, text in texts.items()} | numbers
    return QuarantineEntry(**fields)


def checked_of(content: Any) -> CheckedTar:
    """The state of a checked tar from an object of JSON.

    Raises:
        ValueError: names the field that no such line has so.
    """
    if not isinstance(content, dict):
        raise ValueError("no object")
    size, when = content.get("tar_bytes"), content.get("when")
    if type(size) is not int or not 0 <= size <= 2**62:
        raise ValueError(f"tar_bytes={size!a:.40}: a whole number to 2**62 is due")
    if not is_file_name(content.get("shard")):
        raise ValueError(f"shard={content.get('shard')!a:.80}: the name of a file is due")
    hashes: dict[str, Any] = {name: content.get(name) for name in ("tar_hash", "records")}
    for name, value in hashes.items():
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
            raise ValueError(f"{name}={value!a:.80}: a SHA-256 is due")
    if not isinstance(when, str):
        raise ValueError(f"when={when!a:.40}: text is due")
    shard = escaped(content["shard"])
    return CheckedTar(shard=shard, tar_bytes=size, when=escaped(when), **hashes)
