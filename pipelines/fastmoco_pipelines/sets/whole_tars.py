"""The tars that a pattern names, one after another, for `data check` and `data index`, which read
them whole. Local tars are read in place. Those of a server come through the shard cache: each
appears for its time under its own name in a folder of this machine, as a link to a copy that the
cache keeps as long as it is open, beside its index and the folder's manifest. So one code checks
both. The next tar is fetched at the same time. Nothing is ever written to a server.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from fastmoco_pipelines.errors import AbsentError, RemoteError, ShardError, StoppedError
from fastmoco_pipelines.formats.index import open_index
from fastmoco_pipelines.formats.index_file import MAX_INDEX_BYTES, SUFFIX
from fastmoco_pipelines.formats.index_json import JSON_SUFFIX, MAX_JSON_BYTES
from fastmoco_pipelines.formats.manifest import NAME as MANIFEST
from fastmoco_pipelines.formats.manifest import write_sets
from fastmoco_pipelines.sets.patterns import expand_shards, spells_out
from fastmoco_pipelines.sets.remote_set import THREADS, SmallFiles, beside, find_urls
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores.cache import ShardCache
from fastmoco_pipelines.stores.fetcher import ShardFetcher
from fastmoco_pipelines.stores.retries import Limits
from fastmoco_pipelines.stores.transfer import Head, RemoteShard, fetch_document, file_head, verify
from fastmoco_pipelines.text import redact, shard_name


class LocalTars:
    """Tars of this machine.

    Args:
        pattern: as for `local_names`; and so is `several`.

    Attributes:
        paths: of the tars, sorted; `sizes`: in bytes.
        explicit: the pattern spells the names out: other tars beside them are left out on purpose.
    """

    def __init__(self, pattern: str, *, several: bool = False) -> None:
        self.paths = expand_shards(pattern, several=several)
        self.sizes = [os.path.getsize(path) for path in self.paths]
        self.explicit = spells_out(pattern)

    @contextmanager
    def at_hand(self, number: int) -> Iterator[Path]:
        """A tar, to be read."""
        yield self.paths[number]

    def where(self, path: Path) -> str:
        """The whole name of a tar, for people."""
        return str(path)

    def exists(self, path: Path) -> bool:
        """Whether a further tar is in one of the folders."""
        return path.exists()

    def close(self) -> None:
        """Nothing to do."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A tar in the cache; `descriptor` is None where there is no room for it while another one is
    open."""

    descriptor: int | None
    index: bytes | None
    unproven: str | None = None
    """Key of a copy of which only the size is checked: it does not stay in the cache."""
    index_suffix: str = ""
    """What the name of the index adds to that of the tar, by its form."""


class RemoteTars:
    """Tars of servers; see the module. One thread at a time may use it.

    Args:
        pattern: URLs, as for `open_remote`.
        work: an existing folder in which the tars appear: in folders 0, 1, ... of it if they are in
            several places.
        cache: where copies are kept.
        limits: times and tries of a transfer.
        indexes: also fetch the indexes beside the tars, for a check. Without, `work` keeps what is
            written into it.

    Attributes:
        paths, sizes, explicit: as for LocalTars.
        urls: of the places of the tars, by folder of this machine.

    Raises:
        ValueError: if the pattern names no shard or the cache's folder is not this user's alone.
        RemoteError: if a server fails, or lacks a shard that is spelled out.
        OSError: if the cache cannot be used.
    """

    def __init__(
        self, pattern: str, work: Path, cache: CacheSpec, limits: Limits, *, indexes: bool
    ) -> None:
        self._cache = ShardCache.open(cache)
        self._limits = limits
        self._indexes = indexes
        self._files = SmallFiles(self._cache, limits)

        # Ask for the head of every tar: does it exist, and how large is it?
        urls = find_urls(pattern, self._files)
        with ThreadPoolExecutor(
            min(THREADS, len(urls)), thread_name_prefix="fastmoco-head"
        ) as pool:
            answers = list(pool.map(self._head, urls))
        self._heads = {
            url: head for url, head in zip(urls, answers, strict=True) if isinstance(head, Head)
        }
        self._urls = list(self._heads)

        # Absent tars are an error if they are spelled out; else the check reports them.
        self.explicit = "{" in pattern or urls == [pattern]
        for absent in answers:
            if isinstance(absent, AbsentError) and (self.explicit or not self._urls):
                raise absent

        # A folder of this machine for each place, with its manifest.
        places = sorted({beside(url, "") for url in self._urls})
        folders = {
            place: work if len(places) == 1 else work / str(number)
            for number, place in enumerate(places)
        }
        self.paths = [folders[beside(url, "")] / _safe_name(url) for url in self._urls]
        if len(set(self.paths)) < len(self.paths):
            raise ValueError(f"shards={redact(pattern)!r}: names a shard twice")
        self.sizes = [head.size for head in self._heads.values()]
        self.urls = {folder: place for place, folder in folders.items()}
        for folder, place in self.urls.items():
            folder.mkdir(exist_ok=True)
            sets = self._files.sets(place)
            if sets and not (folder / MANIFEST).exists():
                write_sets(folder, sets)

        # The next tar is fetched by one thread.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fastmoco-ahead")
        self._ahead: dict[int, Future[Copy]] = {}
        self._fetcher: ShardFetcher | None = None
        self._closed = False

    @contextmanager
    def at_hand(self, number: int) -> Iterator[Path]:
        """A tar, to be read by this process and its children, until the context ends.

        Raises:
            RemoteError: naming the URL that cannot be read, or that does not fit into the cache,
                and the cure.
        """
        path = self.paths[number]
        copy = self._copy(number)
        if copy.descriptor is None:
            raise RemoteError(
                f"{redact(self._urls[number])}: its {self.sizes[number]} bytes do not fit into the "
                f"shard cache ({self._cache.folder}, {self._cache.limit} bytes): give it more room "
                "(--cache-size-gb) or another disk (--cache-dir)"
            )
        try:
            if path.is_symlink():  # of a process that was killed
                path.unlink()
            # It stays even if its name in the cache is removed.
            path.symlink_to(f"/proc/{os.getpid()}/fd/{copy.descriptor}")
            if copy.index is not None:
                path.with_name(path.name + copy.index_suffix).write_bytes(copy.index)
            if number + 1 < len(self.paths):
                self._ahead[number + 1] = self._pool.submit(self._fetch, number + 1)
            yield path
        finally:
            os.close(copy.descriptor)
            if path.is_symlink():
                path.unlink()
            if copy.index is not None:
                path.with_name(path.name + copy.index_suffix).unlink(missing_ok=True)
            if copy.unproven is not None:
                self._cache.discard(copy.unproven)

    def where(self, path: Path) -> str:
        """The URL of a tar, for people: without its secrets."""
        return redact(beside(self.urls[path.parent], path.name))

    def exists(self, path: Path) -> bool:
        """Whether a further tar is on the server, in the place of a folder of this machine."""
        return isinstance(self._head(beside(self.urls[path.parent], path.name)), Head)

    def close(self) -> None:
        """End the transfers."""
        self._closed = True
        if self._fetcher is not None:
            self._fetcher.cancel()
        self._pool.shutdown(cancel_futures=True)
        for future in self._ahead.values():
            copy = None if future.cancelled() or future.exception() is not None else future.result()
            if copy is not None and copy.descriptor is not None:
                os.close(copy.descriptor)
        self._ahead.clear()

    def _copy(self, number: int) -> Copy:
        """A copy, fetched ahead or now; once more if there was no room beside the tar before it."""
        future = self._ahead.pop(number, None)
        if future is not None and (copy := future.result()).descriptor is not None:
            return copy
        return self._pool.submit(self._fetch, number).result()

    def _fetch(self, number: int) -> Copy:
        url = self._urls[number]
        head = self._heads[url]
        sha256 = self._files.checksums(beside(url, "")).get(shard_name(url))
        suffix, text = self._index(url) if self._indexes else ("", None)
        # The check reports a broken index, and a tar that does not fit it.
        with suppress(ShardError):
            if text is not None and (index := open_index("", text)).header.tar_bytes == head.size:
                index.records  # noqa: B018  # a broken index proves nothing
                shard = RemoteShard.from_header(url, index.header, sha256, index.rows)
                sha256 = None
                return Copy(self._bring(shard), text, index_suffix=suffix)
        identity = repr((redact(url), head.size, head.validator, sha256, "as it is"))
        shard = RemoteShard(
            url=url,
            size=head.size,
            tar_hash="",
            sha256=sha256,
            rows=lambda: (),
            key=hashlib.sha256(identity.encode()).hexdigest(),
        )
        return Copy(self._bring(shard), text, shard.key, suffix)

    def _bring(self, shard: RemoteShard) -> int | None:
        """A descriptor of a copy; one that was in the cache before is checked first: disks
        decay."""
        self._fetcher = ShardFetcher([shard], self._cache, self._limits)
        if self._closed:  # asked after there is something to cancel: one of the two sees the other
            raise StoppedError(f"{shard.name}: not read, the work was stopped")
        known = self._cache.holds(shard.key)
        descriptor = self._fetcher.open(0, warn=False)
        if known and descriptor is not None and verify(shard, descriptor) is not None:
            os.close(descriptor)
            self._fetcher.discard(0)
            descriptor = self._fetcher.open(0, warn=False)
        return descriptor

    def _index(self, url: str) -> tuple[str, bytes | None]:
        """What the name of the index beside a tar adds to its name, and the content; None if there
        is none."""
        for suffix, most in ((SUFFIX, MAX_INDEX_BYTES), (JSON_SUFFIX, MAX_JSON_BYTES)):
            place = beside(url, shard_name(url) + suffix)
            with suppress(AbsentError):
                return suffix, fetch_document(place, self._limits, Event(), most=most)[1]
        return "", None

    def _head(self, url: str) -> Head | AbsentError:
        """What the server reports of a tar."""
        try:
            return file_head(url, self._limits)
        except AbsentError as error:
            return error


def whole_names(tars: LocalTars | RemoteTars) -> dict[Path, str]:
    """By path, the full names of those tars that share their file name with another one."""
    counts = Counter(path.name for path in tars.paths)
    return {path: tars.where(path) for path in tars.paths if counts[path.name] > 1}


def _safe_name(url: str) -> str:
    """A shard's file name, which a server must not be able to make a path of."""
    name = shard_name(url)
    if name in ("", ".", "..") or "/" in name or not name.isprintable():
        raise ValueError(f"shards={redact(url)!r}: {name!a} is not a file name of a shard")
    return name
