"""The set that a check looks at: its tars, what the manifests promise of them, and the quarantine
lists beside them, read and written."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.files.small import UnfitFileError
from fastmoco_pipelines.formats.manifest import NAME as MANIFEST
from fastmoco_pipelines.formats.manifest import read_sets
from fastmoco_pipelines.formats.quarantine import (
    NAME,
    CheckedTar,
    Quarantine,
    QuarantineEntry,
    quarantine_path,
)
from fastmoco_pipelines.inspecting.report import CheckReport, Fault
from fastmoco_pipelines.inspecting.tars import LocalCheckTars, RemoteCheckTars
from fastmoco_pipelines.sets.patterns import is_remote, without_scheme
from fastmoco_pipelines.sets.remote_set import fetch_lists
from fastmoco_pipelines.sets.whole_tars import whole_names
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores.retries import Limits
from fastmoco_pipelines.text import redact
from fastmoco_pipelines.views.decode_pool import Item

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all); for a sample with images."""
LookedAt = Callable[[Path, QuarantineEntry | CheckedTar], bool]
"""Whether an older line of the list of a folder is about what was checked."""


class CheckedSet:
    """The tars of a pattern, for one check.

    Attributes:
        tars: the tars.
        report: what is found is added to it.
        promises: samples of each tar by its manifest.
        places: full names of those tars that share their file name with another one.
        folders: of the tars, sorted.
    """

    def __init__(
        self, pattern: str, tars: LocalCheckTars | RemoteCheckTars, out: Path, report: CheckReport
    ) -> None:
        self.tars = tars
        self.report = report
        self.folders = sorted({path.parent for path in tars.paths})
        self.promises = {
            path: count for folder in self.folders for path, count in _promises(folder).items()
        }
        self.places = whole_names(tars)
        self._pattern = pattern
        self._out = out
        self._theirs: dict[Path, Quarantine] = {}
        report.shards = len(tars.paths)

    def fetch_lists(self, transfers: Limits) -> None:
        """Read the lists on the servers, and see that older ones here can be read; at the start, so
        that a failure comes now and not after hours."""
        remote = isinstance(self.tars, RemoteCheckTars)
        for folder in () if remote else self.folders:
            try:
                Quarantine.read(quarantine_path(folder))
            except UnfitFileError as error:
                raise ShardError(f"{error}; then this check writes a new one") from error
            except OSError as error:
                raise ShardError(
                    f"{quarantine_path(folder)}: cannot be read ({error.strerror}): make it "
                    "readable, or move it away; then this check writes a new one"
                ) from error
        if isinstance(self.tars, RemoteCheckTars):
            for folder, place in self.tars.urls.items():
                self._theirs[folder], problems = fetch_lists([place], transfers)
                self.report.notes += problems

    @property
    def identity(self) -> str:
        """The pattern, however it is written; without secrets."""
        if isinstance(self.tars, RemoteCheckTars):
            return redact(self._pattern)
        return os.path.abspath(without_scheme(self._pattern))

    def list_place(self) -> tuple[Path, str]:
        """The folder of the list, or of the first one, and its name's last part: "" beside the
        tars, else the place."""
        folder = self.folders[0]
        if isinstance(self.tars, RemoteCheckTars):
            return self._out, "-" + _place_name(self.tars.urls[folder])
        return folder, ""

    def name(self, number: int) -> str:
        """What tells a tar from all others, without secrets."""
        path = self.tars.paths[number]
        return (
            self.tars.where(path)
            if isinstance(self.tars, RemoteCheckTars)
            else str(path.absolute())
        )

    def find_missing(self, *, count_samples: bool) -> None:
        """Report tars of the set that are gone, unless the pattern spells out which to use."""
        tars = self.tars
        report = self.report
        if tars.explicit:
            return
        present = set(tars.paths)
        for folder in self.folders:
            for name, entry in read_sets(folder).items():
                listed = [folder / shard["name"] for shard in entry["shards"]]
                if not present.intersection(listed):
                    continue
                for path in listed:
                    if path in present or tars.exists(path):
                        continue
                    count = self.promises.get(path, 0)
                    if count_samples:
                        report.promised += count
                        report.quarantined += count
                    report.refused_shards += 1
                    reason = (
                        f"{MANIFEST} lists it for set {name!r}, with {count} samples: copy it here "
                        "too"
                    )
                    place = tars.where(path) if len(self.folders) > 1 else ""
                    report.faults.append(
                        Fault.of(path.name, "", "missing shard", reason, outcome="lost", path=place)
                    )

    def write_lists(
        self,
        found: Mapping[Path, Quarantine],
        looked_at: LookedAt,
    ) -> None:
        """Write the list of each folder.

        Args:
            found: the entries by folder.
            looked_at: whether an older entry of a folder is about what was checked, so that it is
                replaced by what was found; all others stay.
        """
        for folder, entries in found.items():
            if isinstance(self.tars, RemoteCheckTars):
                self._write_remote_list(
                    self.tars.urls[folder], entries, self._theirs[folder], folder, looked_at
                )
                continue
            path = quarantine_path(folder)
            merged = _merged(Quarantine.read(path), entries, folder, looked_at)
            if len(merged) or merged.checked or path.exists():
                self.report.quarantine_files.append(merged.write(path))

    def _write_remote_list(
        self,
        place: str,
        found: Quarantine,
        theirs: Quarantine,
        folder: Path,
        looked_at: LookedAt,
    ) -> None:
        """The list of one place on a server; not under the name that loaders look for, as other
        shards may be in the same folder."""
        path = self._out / f"quarantine-{_place_name(place)}.jsonl"
        known = Quarantine()
        known.update(theirs)
        known.update(Quarantine.read(path))
        entries = _merged(known, found, folder, looked_at)
        if _identities(entries) != _identities(theirs):
            self._out.mkdir(parents=True, exist_ok=True)
            self.report.quarantine_files.append(entries.write(path))
            self.report.uploads.append(f"{redact(place)}{NAME}")


@contextmanager
def open_checked(
    pattern: str,
    *,
    cache: CacheSpec | None = None,
    remote_lists: Path | None = None,
    transfers: Limits | None = None,
) -> Iterator[CheckedSet]:
    """The set of a pattern, for a check; the arguments and errors are those of `check_shards`."""
    with ExitStack() as stack:
        tars: LocalCheckTars | RemoteCheckTars
        if is_remote(pattern):
            work = Path(stack.enter_context(TemporaryDirectory(prefix="fastmoco-check-")))
            tars = RemoteCheckTars(
                pattern, work, cache or CacheSpec(), transfers or Limits(), indexes=True
            )
            stack.enter_context(closing(tars))
        elif remote_lists is not None:
            raise ValueError(
                f"{str(remote_lists)!r}: is for shards of a server; a local list is beside its tars"
            )
        else:
            tars = LocalCheckTars(pattern)
        report = CheckReport(pattern=redact(pattern) if is_remote(pattern) else pattern)
        checked = CheckedSet(pattern, tars, remote_lists or Path(), report)
        checked.fetch_lists(transfers or Limits())
        yield checked


class Meter:
    """Progress in bytes of the whole set, or in images of a sample, from any thread."""

    def __init__(self, progress: Progress | None, before: int, total: int) -> None:
        self._progress = progress
        self._done = before
        self._total = total
        self._lock = threading.Lock()

    def add(self, item: Item) -> None:
        """An image is done."""
        with self._lock:
            self.set(self._done + item.size)

    def count(self, _: Item) -> None:
        """An image is done, where images are counted and not bytes."""
        with self._lock:
            self.set(self._done + 1)

    def set(self, done: int) -> None:
        """So many bytes of the set, or images, are done."""
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


def _place_name(place: str) -> str:
    """A URL as part of the name of a file."""
    named = re.sub(r"[^A-Za-z0-9._]+", "-", redact(place).partition("://")[2]).strip("-")
    return named[:200]


def _merged(
    old: Quarantine,
    found: Quarantine,
    folder: Path,
    looked_at: LookedAt,
) -> Quarantine:
    """A list after a check: the entries of what was not checked stay, and known samples keep their
    date."""
    when = {entry.identity: entry for entry in old}
    entries = Quarantine(
        (entry for entry in old if not looked_at(folder, entry)),
        checked=[
            *(tar for tar in old.checked.values() if not looked_at(folder, tar)),
            *found.checked.values(),
        ],
    )
    entries.update(when.get(entry.identity, entry) for entry in found)
    return entries


def _identities(entries: Quarantine) -> set[tuple[str | int, ...]]:
    return {*(entry.identity for entry in entries), *entries.checked}
