"""From a pattern of URLs to shards that can be read: their names, their indexes, and their entries
in the manifest."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import io
import re
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, TypeVar
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.errors import AbsentError, AccessError, ShardError
from fastmoco_pipelines.formats.index import END_BYTES, open_index
from fastmoco_pipelines.formats.index_file import (
    CURE,
    MAX_INDEX_BYTES,
    SUFFIX,
    IndexFile,
    IndexHeader,
)
from fastmoco_pipelines.formats.index_json import JSON_SUFFIX, MAX_JSON_BYTES
from fastmoco_pipelines.formats.manifest import MAX_BYTES as MAX_MANIFEST_BYTES
from fastmoco_pipelines.formats.manifest import NAME as MANIFEST
from fastmoco_pipelines.formats.manifest import FolderOfShards, check_folders, parse_sets
from fastmoco_pipelines.formats.quarantine import CURE as CURE_LIST
from fastmoco_pipelines.formats.quarantine import MAX_LIST_BYTES, CheckedTar, Quarantine
from fastmoco_pipelines.formats.quarantine import NAME as QUARANTINE
from fastmoco_pipelines.sets.patterns import expand_braces
from fastmoco_pipelines.sets.records import SHARD, shard_row
from fastmoco_pipelines.stores.cache import ShardCache
from fastmoco_pipelines.stores.retries import Limits, retried
from fastmoco_pipelines.stores.table import store_of
from fastmoco_pipelines.stores.transfer import (
    RemoteShard,
    fetch_document,
    file_head,
    read_range,
)
from fastmoco_pipelines.text import STORES, redact, shard_name, split_url, without_user

THREADS = 16
_SHA256 = re.compile("[0-9a-f]{64}")
_RANGE = re.compile(r"\{\d+\.\.\d+\}")
_PAGE = re.compile(rb"\s*<(!doctype html|html|head|body)\b", re.IGNORECASE)
_LOGIN = (
    "For a private or gated set give a header in FASTMOCO_HTTP_HEADERS or a token in HF_TOKEN "
    "(docs/data.md)"
)
_NO_RANGES = "so that it is not known which state of the shard it has: copy it there again"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RemoteSet:
    """Shards on servers, sorted by URL, their folders, their indexes, and the names of their
    classes."""

    folders: tuple[str, ...]
    remotes: tuple[RemoteShard, ...]
    shards: NDArray[Any]
    """[shards] `SHARD`; see `records.Indexes`."""
    classes: tuple[str, ...]
    load: Callable[[int], IndexFile]
    """The whole index of a shard."""
    stop: threading.Event
    """Ends a transfer of an index."""


def open_remote(pattern: str, cache: ShardCache | None, limits: Limits) -> RemoteSet:
    """Find the shards that a pattern names, and fetch their indexes.

    Args:
        pattern: one or more URLs in braces; a folder whose manifest lists them
            (`https://host/folder/`); or a name with `*`, which the folder's manifest (http) or the
            store (s3, gs) resolves.
        cache: where indexes are kept.
        limits: times and tries of each transfer.

    Raises:
        ValueError: if the pattern names no shard.
        RemoteError: naming the URL that cannot be read, and the cause.
        ShardError: if an index or a manifest is broken.
    """
    reader = SmallFiles(cache, limits)
    urls = find_urls(pattern, reader)
    with ThreadPoolExecutor(min(THREADS, len(urls)), thread_name_prefix="fastmoco-index") as pool:
        headers = list(pool.map(reader.index_header, urls))
    checksums: dict[str, str | None] = {}
    folders = []
    for folder, group in groupby(
        zip(urls, headers, strict=True), key=lambda pair: beside(pair[0], "")
    ):
        sets = reader.sets(folder)
        checked = reader.checksums(folder)
        members = list(group)
        samples = {shard_name(url): header.samples for url, header in members}
        # A pattern that spells the URLs out may leave some out; those of a whole folder are from
        # this manifest.
        folders.append(
            FolderOfShards(
                where=redact(folder), sets=sets, samples=samples, present=lambda name: True
            )
        )
        checksums |= {url: checked.get(shard_name(url)) for url, _ in members}
    shards = np.array([shard_row(header) for header in headers], dtype=SHARD)

    def load(shard: int) -> IndexFile:
        return reader.index(urls[shard], shards[shard]["seal"].tobytes())

    remotes = []
    for number, (url, header) in enumerate(zip(urls, headers, strict=True)):
        rows = partial(_rows_of, load, number)
        remotes.append(RemoteShard.from_header(url, header, checksums[url], rows))

    return RemoteSet(
        folders=tuple(sorted({beside(url, "") for url in urls})),
        remotes=tuple(remotes),
        shards=shards,
        classes=check_folders(folders),
        load=load,
        stop=reader.stop,
    )


def _rows_of(load: Callable[[int], IndexFile], shard: int) -> list[tuple[int, int, int]]:
    return load(shard).rows()


def find_urls(pattern: str, reader: SmallFiles) -> list[str]:
    """The URLs of the shards that a pattern names, sorted.

    Raises:
        ValueError, RemoteError, ShardError: as for `open_remote`.
    """
    names = expand_braces(pattern, _hide_existing(pattern, reader.limits))
    if any("@" in split_url(name)[0] for name in names if not store_of(name).user_in_url):
        raise ValueError(
            f"shards={redact(pattern)!r}: credentials of a store belong in the environment, not in "
            "a URL"
        )
    return sorted({url for name in names for url in _expand(pattern, name, reader)})


def fetch_lists(folders: Iterable[str], limits: Limits) -> tuple[Quarantine, list[str]]:
    """The quarantine lists of folders on servers, as one, and what is wrong with them, in
    sentences.

    They are fetched whole each time: an old copy would decide which samples are delivered. A folder
    without a list has none. A server that fails is an error all the same, unlike a local
    disk: some ranks of a run might know the list and others not, and they would deliver different
    samples.

    Raises:
        RemoteError: naming the URL that cannot be read, or holds more than a list may, and the
            cause.
    """
    found = Quarantine()
    problems = []
    for folder in folders:
        url = beside(folder, QUARANTINE)
        try:
            _, content = fetch_document(url, limits, threading.Event(), most=MAX_LIST_BYTES)
        except AccessError as error:
            problems.append(
                f"{error}; treated as absent, because stores answer so for files that do not exist"
            )
            continue
        except AbsentError:
            continue
        read = Quarantine.load(io.BytesIO(content))
        found.update(read)
        if read.broken:
            problems.append(
                f"{redact(url)}: {read.broken} lines are not entries of a list and were skipped"
                f"{CURE_LIST}"
            )
    return found, problems


def as_checked(
    shards: Sequence[RemoteShard], checked: Iterable[CheckedTar], limits: Limits
) -> list[RemoteShard]:
    """Shards as they were last checked, where the server has that state of one, and not the indexed
    one. Only those that are listed are asked for, `THREADS` at once.

    Args:
        shards: as their indexes describe them.
        checked: the tars of the lists beside the shards.
        limits: times and tries.

    Raises:
        RemoteError: if the server fails; of the first such shard, in order.
    """
    states: dict[tuple[str, str], set[tuple[int, str]]] = {}
    for tar in checked:
        states.setdefault((tar.shard, tar.records), set()).add((tar.tar_bytes, tar.tar_hash))
    stop = threading.Event()

    def checked_state(shard: RemoteShard) -> RemoteShard:
        size = file_head(shard.url, limits, stop).size
        ends = [(0, min(size, END_BYTES)), (max(0, size - END_BYTES), min(size, END_BYTES))]
        read = (
            read_range(shard.url, *end, limits, stop, cure=_NO_RANGES) if size else b""
            for end in ends
        )
        state = (size, hashlib.sha256(b"".join(read)).hexdigest())
        known = state in states[shard.name, shard.records]
        return shard.changed_to(*state) if known else shard

    found = list(shards)
    listed = [row for row, each in enumerate(found) if (each.name, each.records) in states]
    with ThreadPoolExecutor(THREADS, thread_name_prefix="fastmoco-index") as pool:
        try:
            asked = pool.map(checked_state, [found[row] for row in listed])
            for row, shard in zip(listed, asked, strict=True):
                found[row] = shard
        except BaseException:
            stop.set()  # no further tries of the others
            raise
    return found


class SmallFiles:
    """Small files of servers: each is requested once, and kept while the server reports that it is
    unchanged."""

    def __init__(self, cache: ShardCache | None, limits: Limits) -> None:
        self._cache = cache
        self.limits = limits
        self._sets: dict[str, dict[str, dict[str, Any]]] = {}
        self._read_from: dict[str, str] = {}
        # Where they cannot be kept in the cache.
        self._indexes: dict[str, IndexFile] = {}
        # Ends a transfer of an index; `close` of the set's files clears it.
        self.stop = threading.Event()

    def index_header(self, tar: str) -> IndexHeader:
        """The header of the index beside a tar, which is fetched, or found to be unchanged.

        Raises:
            ShardError: if there is none, or a broken one.
        """
        try:
            return self._fetch_index(tar).header
        except AbsentError as error:
            folder = (
                "" if shard_name(tar).endswith(".tar") else " (the URL of a folder ends with /)"
            )
            raise ShardError(
                f"{error}; every shard on a server needs its index beside it{folder}: {CURE}, and "
                "copy the index files there too"
            ) from None

    def index(self, tar: str, seal: bytes) -> IndexFile:
        """The index of a tar that was opened before, as it was then.

        Args:
            tar: URL of the tar.
            seal: of its header.

        Raises:
            ShardError: if the server has another one now.
        """
        held = self._indexes.get(tar)
        if held is not None:
            return held
        url = self._read_from.get(tar)
        content = self._cache.map_document(_key(url)) if self._cache is not None and url else None
        if url is not None and content is not None:
            # Unless the disk of the cache fails, or another process has fetched another one.
            with suppress(ShardError):
                file = IndexFile(redact(url), content).check()
                if file.header.seal == seal:
                    return file
        file = self._fetch_index(tar)
        if file.header.seal != seal:
            raise ShardError(
                f"{file.name}: was replaced while the set was open: start the command again."
            )
        return file

    def find_index(self, tar: str) -> IndexFile | None:
        """The index beside a tar, from the server, in either form; None if there is none."""
        try:
            return self._fetch_index(tar)
        except AbsentError:
            return None

    def _fetch_index(self, tar: str) -> IndexFile:
        """The index beside a tar, from the server; its JSON form is converted.

        Raises:
            AbsentError: naming the binary form, if there is neither.
        """
        try:
            return self._kept_index(tar, beside(tar, shard_name(tar) + SUFFIX))
        except AbsentError as absent:
            try:
                return self._kept_index(tar, beside(tar, shard_name(tar) + JSON_SUFFIX))
            except AbsentError:
                raise absent from None

    def _kept_index(self, tar: str, url: str) -> IndexFile:
        known = self._known(url)
        most = MAX_JSON_BYTES if shard_name(url).endswith(JSON_SUFFIX) else MAX_INDEX_BYTES
        validator, content = fetch_document(url, self.limits, self.stop, known, most=most)
        if _PAGE.match(content):
            raise ShardError(
                f"{redact(url)}: is a web page, and is not an index of fastmoco: the page for "
                "logging in to a private set or to this network, perhaps; check the URL in a "
                f"browser. {_LOGIN}"
            )
        file = open_index(redact(url), content)
        self._read_from[tar] = url
        if (validator, file.data) == known:
            return file
        # Kept in the binary form, and only after it is found to be whole.
        file.check(paths=True)
        if self._cache is not None and validator:
            self._cache.write_document(_key(url), validator, bytes(file.data))
        else:
            self._indexes[tar] = file
        return file

    def sets(self, folder: str) -> dict[str, dict[str, Any]]:
        """The sets of a folder's manifest; empty where it has none that can be read."""
        if folder not in self._sets:
            url = beside(folder, MANIFEST)
            try:
                self._sets[folder] = self._parsed(url, lambda text: parse_sets(redact(url), text))
            except AbsentError:
                self._sets[folder] = {}
        return self._sets[folder]

    def checksums(self, folder: str) -> dict[str, str]:
        """SHA-256 (hex) by file name, of the shards of a folder for which its manifest contains
        one."""
        listed = (shard for entry in self.sets(folder).values() for shard in entry["shards"])
        given = {shard["name"]: shard.get("sha256") for shard in listed}
        return {
            name: text
            for name, text in given.items()
            if isinstance(text, str) and _SHA256.fullmatch(text)
        }

    def _parsed(self, url: str, parse: Callable[[bytes], T]) -> T:
        known = self._known(url)
        fetched = fetch_document(
            url, self.limits, threading.Event(), known, most=MAX_MANIFEST_BYTES
        )
        parsed = parse(fetched[1])
        # Only a document that could be parsed is kept.
        if self._cache is not None and fetched[0] and fetched != known:
            self._cache.write_document(_key(url), *fetched)
        return parsed

    def _known(self, url: str) -> tuple[str, bytes]:
        """Validator and content of an earlier copy."""
        return self._cache.read_document(_key(url)) if self._cache is not None else ("", b"")


def _key(url: str) -> str:
    """Name of a small file in the cache."""
    return hashlib.sha256(without_user(url).encode()).hexdigest()


_SPECIAL = "{},[]*?"
_HIDE = str.maketrans({mark: chr(0xF0000 + number) for number, mark in enumerate(_SPECIAL)})
_SHOW = {code: chr(mark) for mark, code in ((m, ord(h)) for m, h in _HIDE.items())}
_GLOB = {code: f"[{mark}]" if mark in "[*?" else mark for code, mark in _SHOW.items()}


def _hide_existing(pattern: str, limits: Limits) -> str:
    """A pattern in which the special characters of folders and objects that exist under exactly
    that name are replaced, so that they are not taken for a pattern. A name with `*` or with a
    range of numbers always is one."""
    scheme, separator, rest = pattern.partition("://")
    store = store_of(pattern) if scheme.lower() in STORES else None
    if store is None or not store.lists:
        return pattern
    parts = rest.split("/")
    for number, part in enumerate(parts):
        if not any(mark in part for mark in "{[*?"):
            continue
        url = scheme + separator + "/".join([*parts[:number], part]).translate(_SHOW)
        if number == 0 or "*" in part or _RANGE.search(part):
            break
        if not _asked(store.exists, url, limits):
            break
        parts[number] = part.translate(_HIDE)
    return scheme + separator + "/".join(parts)


def _asked(question: Callable[[str, Limits], T], url: str, limits: Limits) -> T:
    """A store's answer, asked again where it fails for the moment."""
    deadline = time.monotonic() + limits.deadline_seconds
    return retried(url, limits, deadline, threading.Event(), lambda: question(url, limits))


def _expand(pattern: str, hidden: str, reader: SmallFiles) -> list[str]:
    """The shards that one URL without braces names.

    Args:
        pattern: for messages.
        hidden: the URL, with the special characters of existing names hidden.
        reader: of manifests.
    """
    shown = redact(pattern)
    url = hidden.translate(_SHOW)
    folder, _, name = split_url(hidden)[1].rpartition("/")
    if name and not glob.has_magic(name) and not glob.has_magic(folder):
        return [url]
    store = store_of(url)
    if not store.lists:
        if "*" in folder:
            scheme = url.partition(":")[0]
            raise ValueError(
                f"shards={shown!r}: over {scheme} only a file's name may hold * or [...], not a "
                "folder's"
            )
        if name and not glob.has_magic(name):
            return [url]

    # The names come from the manifest of the folder, or from a store that lists.
    sets = {} if store.lists and name else reader.sets(beside(url, ""))
    if len(sets) > 1 and not name:
        choice = " or ".join(f"{redact(url)}{name}-*.tar" for name in sorted(sets))
        raise ValueError(f"shards={shown!r}: the folder holds several sets: name one, {choice}")
    listed = [shard["name"] for entry in sets.values() for shard in entry["shards"]]
    if store.lists and not listed:
        globbed = hidden.translate(_GLOB)
        objects = _asked(store.find, globbed if name else f"{globbed}*.tar", reader.limits)
        found = [item for item in objects if item.endswith(".tar")]
    elif name and "*" not in name and name not in listed and reader.find_index(url):
        found = [url]  # brackets that are part of its name
    elif not listed:
        raise ValueError(
            f"shards={shown!r}: there is no {MANIFEST} that lists the shards: copy it there, or "
            "spell them out, e.g. train-{000000..000127}.tar"
        )
    else:
        safe = (item for item in listed if "/" not in item and _fits(item, name))
        found = [beside(url, item) for item in safe]

    if not found:
        literal = " (%20 in a key is no space)" if store.lists and "%20" in url else ""
        raise ValueError(f"shards={shown!r}: no shard there has such a name{literal}")
    return found


def _fits(item: str, pattern: str) -> bool:
    """Whether a file's name fits a pattern, which may be percent-encoded as in a URL; a name with
    brackets fits itself."""
    if item in (pattern, unquote(pattern)):
        return True
    names = (item, quoted(item))
    return any(fnmatch.fnmatchcase(name, pattern or "*") for name in names)


def quoted(name: str) -> str:
    """A file's name in a URL; also one that is not UTF-8."""
    return quote(name, errors="surrogateescape")


def beside(url: str, name: str) -> str:
    """The URL of another file in a URL's folder; the query, which may hold keys to the whole
    folder, stays."""
    head, path, tail = split_url(url)
    name = quoted(name) if store_of(url).quotes_names else name
    return f"{head}{path.rpartition('/')[0]}/{name}{tail}"
