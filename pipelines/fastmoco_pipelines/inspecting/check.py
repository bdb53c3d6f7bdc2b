"""`check_shards`: read and decode everything, report every fault, and write the quarantine list
beside the tars.

Each tar is walked strictly, compared with its index and the manifest, and every image in it is
decoded, by the decoder that training uses, in a disposable process. What is found depends only on
the bytes. No tar is ever changed. Those of a server are checked in copies, and the list is written
to this machine: the user copies it there.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from tempfile import TemporaryDirectory

from fastmoco_pipelines.formats.manifest import NAME as MANIFEST
from fastmoco_pipelines.formats.manifest import read_sets
from fastmoco_pipelines.formats.quarantine import NAME, Quarantine, quarantine_path
from fastmoco_pipelines.inspecting.decode_pool import ChildLimits, DecodePool, Item
from fastmoco_pipelines.inspecting.report import CheckReport
from fastmoco_pipelines.inspecting.tar_check import TarCheck
from fastmoco_pipelines.sets.patterns import is_remote
from fastmoco_pipelines.sets.remote_set import fetch_lists
from fastmoco_pipelines.sets.whole_tars import LocalTars, RemoteTars, whole_names
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores.retries import Limits
from fastmoco_pipelines.text import redact

Progress = Callable[[int, int], None]


def check_shards(
    pattern: str,
    *,
    workers: int | None = None,
    quarantine: bool = True,
    progress: Progress | None = None,
    limits: ChildLimits | None = None,
    cache: CacheSpec | None = None,
    remote_lists: Path | None = None,
    transfers: Limits | None = None,
) -> CheckReport:
    """Check the shards that `pattern` names.

    Args:
        pattern: as for `ShardSet.open`.
        workers: decoding processes; default one for each core.
        quarantine: write `quarantine.jsonl` beside the tars. Lines about tars that are not checked
            stay; an empty list is only written over an older file.
        progress: called with (bytes done, bytes in all), by one thread at a time.
        limits: what one image may cost.
        cache: where copies of shards of a server are kept; None: the default folder and size.
        remote_lists: folder for the lists about shards of a server, quarantine-PLACE.jsonl for each
            of their places; None: the current one. Written unless the list on the server is the
            same already; lines about tars that are not checked, of that list and of an older file,
            stay.
        transfers: times and tries of each transfer.

    Raises:
        ValueError: if the pattern names no shard, or is a local one and `remote_lists` is given.
        ShardError: if a manifest is broken; RemoteError, which is one, if a server fails or a shard
            does not fit into the cache.
        ModuleNotFoundError: if DALI is not installed.
    """
    start = time.perf_counter()
    with ExitStack() as stack:
        if not is_remote(pattern):
            if remote_lists is not None:
                raise ValueError(
                    f"{str(remote_lists)!r}: is for shards of a server; a local list is beside its "
                    "tars"
                )
            local = LocalTars(pattern)
            report = CheckReport(pattern=pattern)
            found = _check(local, report, workers, limits, progress)
            for folder, entries in found.items() if quarantine else ():
                _write_quarantine(
                    folder,
                    entries,
                    {path.name for path in local.paths if path.parent == folder},
                    report,
                )
        else:
            work = Path(stack.enter_context(TemporaryDirectory(prefix="fastmoco-check-")))
            tars = RemoteTars(
                pattern, work, cache or CacheSpec(), transfers or Limits(), indexes=True
            )
            stack.enter_context(closing(tars))
            report = CheckReport(pattern=redact(pattern))
            theirs = {}
            # Fetched first, so that a failure comes now and not after hours.
            for folder, place in tars.urls.items():
                theirs[folder], problems = fetch_lists([place], transfers or Limits())
                report.notes += problems
            found = _check(tars, report, workers, limits, progress)
            for folder, entries in found.items() if quarantine else ():
                checked = {path.name for path in tars.paths if path.parent == folder}
                out = remote_lists or Path()
                _write_remote_list(tars.urls[folder], out, entries, checked, theirs[folder], report)
    report.seconds = time.perf_counter() - start
    return report


def _check(
    tars: LocalTars | RemoteTars,
    report: CheckReport,
    workers: int | None,
    limits: ChildLimits | None,
    progress: Progress | None,
) -> dict[Path, Quarantine]:
    """Check all tars; returns the entries for the list of each folder."""
    paths = tars.paths
    report.shards = len(paths)
    report.total_bytes = sum(tars.sizes)
    promises = {
        path: count
        for folder in {path.parent for path in paths}
        for path, count in _promises(folder).items()
    }
    places = whole_names(tars)
    found = {folder: Quarantine() for folder in sorted({path.parent for path in paths})}
    with DecodePool(workers or os.cpu_count() or 1, limits) as pool:
        before = 0
        for number, size in enumerate(tars.sizes):
            meter = _Meter(progress, before, report.total_bytes)
            with tars.at_hand(number) as path:
                TarCheck(
                    path, promises.get(path), report, found[path.parent], places.get(path, "")
                ).run(pool, meter.add)
            before += size
            meter.set(before)
        report.restarts = pool.restarts
    _missing_shards(tars, promises, report)
    if report.promised != report.delivered + report.quarantined:
        raise AssertionError(
            f"the account does not add up: {report.promised=} {report.delivered=} "
            f"{report.quarantined=}"
        )
    return found


class _Meter:
    """Progress in bytes of the whole set, from any thread."""

    def __init__(self, progress: Progress | None, before: int, total: int) -> None:
        self._progress = progress
        self._done = before
        self._total = total
        self._lock = threading.Lock()

    def add(self, item: Item) -> None:
        with self._lock:
            self.set(self._done + item.size)

    def set(self, done: int) -> None:
        self._done = done
        if self._progress is not None:
            self._progress(min(done, self._total), self._total)


def _promises(folder: Path) -> dict[Path, int]:
    """Samples of each tar by the folder's manifest."""
    shards = [shard for entry in read_sets(folder).values() for shard in entry["shards"]]
    return {
        folder / shard["name"]: shard["samples"]
        for shard in shards
        if isinstance(shard.get("samples"), int) and Path(shard["name"]).name == shard["name"]
    }


def _missing_shards(
    tars: LocalTars | RemoteTars, promises: dict[Path, int], report: CheckReport
) -> None:
    """Tars of a checked set that are gone, unless the pattern spells out which to use."""
    if tars.explicit:
        return
    present = set(tars.paths)
    folders = sorted({path.parent for path in tars.paths})
    for folder in folders:
        for name, entry in read_sets(folder).items():
            listed = [folder / shard["name"] for shard in entry["shards"]]
            if not present.intersection(listed):
                continue
            for path in listed:
                if path not in present and not tars.exists(path):
                    count = promises.get(path, 0)
                    report.promised += count
                    report.quarantined += count
                    report.refused_shards += 1
                    reason = (
                        f"{MANIFEST} lists it for set {name!r}, with {count} samples: copy it here "
                        "too"
                    )
                    place = tars.where(path) if len(folders) > 1 else ""
                    report.add(path.name, "", "missing shard", reason, outcome="lost", path=place)


def _write_quarantine(
    folder: Path, found: Quarantine, checked: set[str], report: CheckReport
) -> None:
    path = quarantine_path(folder)
    entries = _merged(Quarantine.read(path), found, checked)
    if len(entries) or path.exists():
        report.quarantine_files.append(entries.write(path))


def _write_remote_list(
    place: str,
    out: Path,
    found: Quarantine,
    checked: set[str],
    theirs: Quarantine,
    report: CheckReport,
) -> None:
    """The list of one place on a server; not under the name that loaders look for, as other shards
    may be in `out`."""
    named = re.sub(r"[^A-Za-z0-9._]+", "-", redact(place).partition("://")[2]).strip("-")
    path = out / f"quarantine-{named[:200]}.jsonl"
    known = Quarantine(theirs)
    known.update(Quarantine.read(path))
    entries = _merged(known, found, checked)
    if {entry.identity for entry in entries} != {entry.identity for entry in theirs}:
        out.mkdir(parents=True, exist_ok=True)
        report.quarantine_files.append(entries.write(path))
        report.uploads.append(f"{redact(place)}{NAME}")


def _merged(old: Quarantine, found: Quarantine, checked: set[str]) -> Quarantine:
    """A list after a check: the entries of tars that were not checked stay, and known samples keep
    their date."""
    when = {entry.identity: entry for entry in old}
    entries = Quarantine(entry for entry in old if entry.shard not in checked)
    entries.update(when.get(entry.identity, entry) for entry in found)
    return entries
