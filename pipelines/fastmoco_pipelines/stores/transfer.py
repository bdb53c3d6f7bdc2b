"""Files from a server, whole and checked: retries with growing pauses, continued where a connection
was lost. The end of a connection proves nothing: the size comes from the index, the bytes are
checked by the manifest's SHA-256, or else by every sample's crc32.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol, Self

from fastmoco_pipelines.errors import PassingError, RemoteError, StoppedError, WrongContentError
from fastmoco_pipelines.files.whole import hash_file
from fastmoco_pipelines.formats.index import hash_ends
from fastmoco_pipelines.formats.index_file import IndexHeader
from fastmoco_pipelines.stores.retries import Limits, retried
from fastmoco_pipelines.stores.store import Body, Request
from fastmoco_pipelines.stores.table import open_url
from fastmoco_pipelines.text import redact, shard_name


class PartFile(Protocol):
    """A partly written file, which may outlive the process that writes it."""

    descriptor: int

    def resume_point(self) -> tuple[int, str]:
        """Bytes received, and the validator of their file; (0, "") where there is nothing to
        continue."""

    def restart(self, validator: str) -> None:
        """Discard the bytes received, and start again with a file of this validator."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RemoteShard:
    """A tar on a server, and what its copies are checked against."""

    url: str
    size: int
    """Its bytes, by the index."""
    tar_hash: str
    """Of its ends, by the index; empty where there is none: then nothing but the size is known."""
    sha256: str | None
    """By the manifest; None where there is none."""
    rows: Callable[[], Iterable[tuple[int, int, int]]]
    """Returns offset, size in bytes and crc32 of each sample, by the index."""
    key: str
    """Name of its copy in a cache: a hash of its URL (without user, password and query, which
    change while the file does not) and its content. Shards of one file name in two folders, or two
    states of a shard, have different keys."""
    records: str = ""
    """SHA-256 (hex) of the records of its index; empty where there is none."""

    @classmethod
    def from_header(
        cls,
        url: str,
        header: IndexHeader,
        sha256: str | None,
        rows: Callable[[], Iterable[tuple[int, int, int]]],
    ) -> Self:
        """The shard that an index was made for."""
        records = header.records_hash
        return cls(
            url=url,
            size=header.tar_bytes,
            tar_hash=header.tar_hash,
            sha256=sha256,
            rows=rows,
            key=_key(url, header.tar_bytes, header.tar_hash, sha256, records),
            records=records,
        )

    def changed_to(self, size: int, tar_hash: str) -> Self:
        """The same shard in a later state, of which `data check` has listed what is lost."""
        key = _key(self.url, size, tar_hash, None, self.records)
        return replace(self, size=size, tar_hash=tar_hash, sha256=None, key=key)

    @property
    def name(self) -> str:
        """Its file name."""
        return shard_name(self.url)


def _key(url: str, size: int, tar_hash: str, sha256: str | None, records: str) -> str:
    identity = repr((redact(url), size, tar_hash, sha256, records))
    return hashlib.sha256(identity.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Head:
    """What a server reports of a file: its size in bytes, and its validator, which changes with
    it."""

    size: int
    validator: str


def file_head(url: str, limits: Limits, stop: threading.Event | None = None) -> Head:
    """Ask for the size of a file, whose content is not read.

    Args:
        url: of the file.
        limits: times and tries.
        stop: set when the result is no longer needed.

    Raises:
        AbsentError, RemoteError: naming the URL and the cause.
    """
    deadline = time.monotonic() + limits.deadline_seconds

    def ask(stop: int | None) -> Head:
        request = Request(url=url, stop=stop, limits=limits, deadline=deadline)
        with open_url(request) as body:
            if body.total is None:
                raise RemoteError(
                    f"{redact(url)}: the server does not report its size: have it send "
                    "Content-Length"
                )
            return Head(body.total, body.validator)

    def attempt() -> Head:
        try:
            return ask(1)
        except WrongContentError:  # an empty file has no first byte
            return ask(None)

    return retried(url, limits, deadline, stop or threading.Event(), attempt)


def fetch_document(
    url: str,
    limits: Limits,
    stop: threading.Event,
    known: tuple[str, bytes] = ("", b""),
    *,
    most: int,
) -> tuple[str, bytes]:
    """A small file, whole.

    Args:
        url: of the file.
        limits: times and tries.
        stop: set when the result is no longer needed. known: validator and content of an earlier
            copy, which is used again if the file is unchanged.
        most: bytes that it may have.

    Returns:
        (validator, content).

    Raises:
        AbsentError, RemoteError: naming the URL and the cause.
    """
    deadline = time.monotonic() + limits.deadline_seconds

    def attempt() -> tuple[str, bytes]:
        with open_url(Request(url=url, known=known[0], limits=limits, deadline=deadline)) as body:
            if body.unchanged:
                return known
            if body.total is not None and body.total > most:
                raise RemoteError(_too_large(url, most))
            pieces = []
            length = 0
            for chunk in body.chunks:
                _require_going_on(url, stop, deadline)
                pieces.append(chunk)
                length += len(chunk)
                if length > most:
                    raise RemoteError(_too_large(url, most))
            if body.total is not None and length != body.total:
                raise PassingError(f"{redact(url)}: ended after {length} of {body.total} bytes")
            return body.validator, b"".join(pieces)

    return retried(url, limits, deadline, stop, attempt)


def _too_large(url: str, most: int) -> str:
    return f"{redact(url)}: is larger than {most} bytes, which no such file is"


def read_range(
    url: str, offset: int, size: int, limits: Limits, stop: threading.Event, *, cure: str
) -> bytes:
    """Some bytes of a file, at least one, without a copy of the rest. The caller must check them.

    Args:
        url: of the file.
        offset, size: in bytes.
        limits: times and tries.
        stop: set when the result is no longer needed.
        cure: what to do about a server that ignores Range requests.

    Raises:
        RemoteError: naming the URL and the cause.
    """
    deadline = time.monotonic() + limits.deadline_seconds

    def attempt() -> bytes:
        request = Request(
            url=url, start=offset, stop=offset + size, limits=limits, deadline=deadline
        )
        with open_url(request) as body:
            if body.start != offset:
                raise RemoteError(f"{redact(url)}: its server ignores Range requests, {cure}")
            data = b""
            for chunk in body.chunks:
                _require_going_on(url, stop, deadline)
                data += chunk
                if len(data) >= size:
                    break
            if len(data) < size:
                raise PassingError(f"{redact(url)}: ended after {len(data)} of {size} bytes")
            return data[:size]

    return retried(url, limits, deadline, stop, attempt)


class Watcher(Protocol):
    """Follows a transfer."""

    def arrived(self, size: int) -> object:
        """Some bytes have come."""

    def failed(self, error: PassingError) -> None:
        """One try has failed."""


def download(
    shard: RemoteShard,
    part: PartFile,
    limits: Limits,
    stop: threading.Event,
    watcher: Watcher,
) -> None:
    """Fill `part` with a shard; when this returns, its bytes are checked.

    If its size and ends are right and two downloads bring the very same wrong bytes in between,
    then these are the file that the server has. It is taken as it is: every sample is checked again
    when it is read, so only the damaged ones are lost.

    Raises:
        RemoteError: naming the URL and the cause. The bytes received stay in `part`, to be
            continued.
        OSError: if it cannot be written.
    """
    deadline = time.monotonic() + limits.deadline_seconds + shard.size / 1e6
    where = redact(shard.url)
    brought: set[str] = set()

    def attempt() -> None:
        start, validator = part.resume_point()
        if start < shard.size:
            request = Request(
                url=shard.url, start=start, validator=validator, limits=limits, deadline=deadline
            )
            try:
                with open_url(request) as body:
                    _take(shard, part, body, start, stop, deadline, watcher)
            except WrongContentError:
                part.restart("")
                raise
        problem = verify(shard, part.descriptor)
        if problem:
            if _frame_problem(shard, part.descriptor) is None:
                content = hash_file(part.descriptor)
                if content in brought:
                    return
                brought.add(content)
            part.restart("")
            raise WrongContentError(
                f"{where}: {problem}; copy it to the server again, with its index and manifest"
            )

    def arrived() -> int:
        return os.fstat(part.descriptor).st_size

    retried(shard.url, limits, deadline, stop, attempt, arrived, watcher.failed)


def verify(shard: RemoteShard, descriptor: int) -> str | None:
    """What is wrong with a copy of a shard; None if it is right."""
    if problem := _frame_problem(shard, descriptor):
        return problem
    if shard.sha256 is not None:
        return (
            None
            if hash_file(descriptor) == shard.sha256
            else "its SHA-256 is not the one of the manifest"
        )
    for offset, length, crc32 in shard.rows():
        if zlib.crc32(os.pread(descriptor, length, offset)) != crc32:
            return f"its {length} bytes from {offset} on differ from the index (crc32)"
    return None


def _frame_problem(shard: RemoteShard, descriptor: int) -> str | None:
    """What is wrong with the size or the ends of a copy: then it is another file, and not this one
    with some damage."""
    size = os.fstat(descriptor).st_size
    if size != shard.size:
        return f"has {size} bytes, its index says {shard.size}"
    good = not shard.tar_hash or hash_ends(descriptor) == shard.tar_hash
    return None if good else "its content is not what its index was made for"


def _take(
    shard: RemoteShard,
    part: PartFile,
    body: Body,
    start: int,
    stop: threading.Event,
    deadline: float,
    watcher: Watcher,
) -> None:
    """Write one answer into the part."""
    where = redact(shard.url)
    if body.total is not None and body.total != shard.size:
        page = ": a web page instead of a tar" if "html" in body.kind else ""
        raise WrongContentError(
            f"{where}: has {body.total} bytes ({body.kind}{page}), its index says {shard.size}: "
            "copy the shard to the server again, with its index"
        )
    if start == 0 or body.start != start:
        part.restart(body.validator)
    length = body.start
    for chunk in body.chunks:
        _require_going_on(shard.url, stop, deadline)
        length += len(chunk)
        if length > shard.size:
            raise WrongContentError(
                f"{where}: has more than the {shard.size} bytes of its index ({body.kind})"
            )
        _write(part.descriptor, chunk, length - len(chunk))
        watcher.arrived(len(chunk))
    if length < shard.size:
        raise PassingError(f"{where}: ended after {length} of {shard.size} bytes")


def _write(descriptor: int, chunk: bytes, position: int) -> None:
    left = memoryview(chunk)
    while left:
        written = os.pwrite(descriptor, left, position)
        left, position = left[written:], position + written


def _require_going_on(url: str, stop: threading.Event, deadline: float) -> None:
    if stop.is_set():
        raise StoppedError(f"{redact(url)}: not read to its end, the loader was closed")
    if time.monotonic() > deadline:
        raise PassingError(f"{redact(url)}: not complete in time")
