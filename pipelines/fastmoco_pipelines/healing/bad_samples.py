"""The bad samples of a set: where they are known from, how many are allowed, and what is reported.

This is only a memory: a bad sample that is not in it is found as soon as it is read, and the
delivered batches are the same either way. It has three sources:

* the list beside the shards (`fastmoco data check` writes it): the user knows of these, so they do
  not count against `max_bad_share`;
* the list of the run: what this run has found so far, on any of its ranks and before any restart;
* what is found now, which is added to that list at once, one line in one write: ranks may share the
  file.

A sample that cannot be *read* (a shard has vanished, a disk fails) may have good bytes. It is left
out until the process ends, and counts; a restarted run tries it again.
"""

from __future__ import annotations

import os
import re
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.errors import LostIndexError, TooManyBadSamplesError
from fastmoco_pipelines.formats.quarantine import (
    MAX_REASON,
    NAME,
    Quarantine,
    QuarantineEntry,
    append_entry,
    read_list,
)
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.text import counted, escaped

UNREADABLE = "unreadable: "
"""Prefix of the reasons that are about this machine and not about the sample's bytes."""
ALWAYS_ALLOWED = 10
_CURE_UNREADABLE = (
    "Copy the shards that cannot be read again from their source, and the same command continues. "
    "Of one that is there and has changed, `fastmoco data check` lists what is lost, and the same "
    "command then continues without it."
)
_CURE_BAD = (
    "Run `fastmoco data check` on the shards: it names every fault, and lists beside them what is "
    "lost; the same command then continues without it. A tar that it calls another one must be "
    "copied again from its source."
)
_SHOWN = 5


class BadSamples:
    """The samples of one set that are not delivered. Any thread may call any method.

    Args:
        shards: the set.
        max_bad_share: share of the samples that may be found bad.
        run_list: file of the run's own discoveries; None keeps them in memory.

    Raises:
        RemoteError: if the server of the shards does not answer whether there is a list beside
            them.

    Attributes:
        listed: samples left out because of the list beside the shards.
        stale: lines of that list that match nothing in the set any more.
        allowed: samples that the run may find bad: the share, `ALWAYS_ALLOWED` at least; none where
            the share is 0.
    """

    def __init__(
        self, shards: ShardSet, *, max_bad_share: float, run_list: Path | None = None
    ) -> None:
        self._shards = shards
        self._run_list = run_list
        self._run_list_size = 0
        self._lock = threading.RLock()
        self._bad: set[int] = set()
        # Where a sample is, and why it is bad.
        self._found: dict[int, tuple[str, str]] = {}
        self._news: list[str] = []
        self.allowed = max(ALWAYS_ALLOWED, int(max_bad_share * len(shards))) if max_bad_share else 0
        beside, problems = shards.quarantine()
        self._news += problems
        listed = shards.listed(beside)
        self._bad.update(listed)
        self.listed = len(listed)
        names = shards.names
        ours = sum(entry.shard in names for entry in beside)  # a folder may hold several sets
        self.stale = ours - len({_identity(shards, i) for i in listed})
        if self.listed or self.stale:
            stale = f"; {self.stale} of its lines match no sample any more" if self.stale else ""
            self._news.append(
                f"{self.listed} of {len(shards)} images are left out: listed in {NAME}{stale}"
            )
        self.read_run_list()
        self.require_few()

    def __len__(self) -> int:
        """Samples that are not delivered, as far as this process knows."""
        with self._lock:
            return self.listed + len(self._found)

    @property
    def found(self) -> int:
        """Samples that this run has found bad itself, on all ranks that share its list."""
        with self._lock:
            return len(self._found)

    def __contains__(self, sample_id: int) -> bool:
        return sample_id in self._bad

    def contains(self, sample_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some samples are known to be bad."""
        if not self._bad:
            return np.zeros(len(sample_ids), dtype=np.bool_)
        return np.array([i in self._bad for i in sample_ids.tolist()], dtype=np.bool_)

    def add(self, sample_id: int, reason: str) -> None:
        """Leave a sample out from now on, and note why.

        Raises:
            TooManyBadSamplesError: if this is one too many.
        """
        with self._lock:
            if sample_id not in self._bad:
                where = self._shards.describe(sample_id)
                self._note(sample_id, reason, where)
                count = len(self._found)
                # The first few, then the 8th, 16th, 32nd, ...: a few lines, however many there are.
                if count <= _SHOWN or count & (count - 1) == 0:
                    self._news.append(f"left out {where}: {escaped(reason)} ({count} so far)")
        self.require_few()

    def add_shard(self, sample_id: int, reason: str) -> None:
        """Leave out the whole shard of a sample: it cannot be read.

        Raises:
            TooManyBadSamplesError: if these are too many.
        """
        with self._lock:
            name, samples = self._shards.shard_of(sample_id)
            lost, where = [i for i in samples if i not in self._bad], f"{name}: all of it"
            if len(self._found) + len(lost) > self.allowed:
                self._found |= dict.fromkeys(lost, (where, f"{UNREADABLE}{reason}"))
            else:
                for i in lost:
                    self._note(i, f"{UNREADABLE}{reason}", where)
                if lost:  # the next image of the same shard has nothing to add
                    self._news.append(
                        f"left out {where}, {counted(len(lost), 'image')}: {reason} ({len(self._found)} so "
                        "far)"
                    )
        self.require_few()

    def require_few(self) -> None:
        """End the run if too many samples are bad.

        Raises:
            TooManyBadSamplesError: if more has been found than is allowed.
        """
        with self._lock:
            if len(self._found) <= self.allowed:
                return
            kinds = Counter(_kind(reason) for _, reason in self._found.values())
            shown = list(
                dict.fromkeys(f"{where} ({reason})" for where, reason in self._found.values())
            )
            lost = sum(reason.startswith(UNREADABLE) for _, reason in self._found.values())
            cures = [_CURE_UNREADABLE] * bool(lost) + [_CURE_BAD] * (lost < len(self._found))
        counts = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common(_SHOWN))
        more = f"; and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
        raise TooManyBadSamplesError(
            f"{len(self._found)} of {len(self._shards)} images cannot be used, {self.allowed} are "
            f"allowed (data.max_bad_share, {ALWAYS_ALLOWED} at least unless it is 0): {counts}. "
            f"{'; '.join(shown[:_SHOWN])}{more}. {' '.join(cures)} Or raise --data.max-bad-share."
        )

    def read_run_list(self) -> None:
        """Add what other ranks, or this run before a restart, have written to the run's list."""
        if self._run_list is None:
            return
        with self._lock:
            try:
                size = os.stat(self._run_list).st_size
            except OSError:  # none yet
                return
            if size == self._run_list_size:
                return
            self._run_list_size = size
            noted, problem = read_list(self._run_list)
            self._news += [problem] if problem else []
            lasting = Quarantine(
                entry for entry in noted if not entry.reason.startswith(UNREADABLE)
            )
            try:
                listed = self._shards.listed(lasting)
            except LostIndexError:  # its samples are left out when they are read
                return
            for sample_id, reason in listed.items():
                if sample_id not in self._bad:
                    self._bad.add(sample_id)
                    self._found[sample_id] = (self._shards.describe(sample_id), reason)

    def news(self) -> list[str]:
        """What has happened since the last call, for the console; a few lines, however many
        samples."""
        with self._lock:
            news = self._news
            self._news = []
            return news

    def _note(self, sample_id: int, reason: str, where: str) -> None:
        self._bad.add(sample_id)
        self._found[sample_id] = (where, escaped(reason)[:MAX_REASON])
        with suppress(LostIndexError):  # an entry says where the sample is, by the index
            entry = Quarantine().add(**self._shards.entry(sample_id), reason=reason)  # type: ignore[arg-type]
            assert entry is not None  # noqa: S101 - a type: the list is new
            self._write(entry)

    def _write(self, entry: QuarantineEntry) -> None:
        if self._run_list is None:
            return
        try:
            append_entry(self._run_list, entry)
        except (OSError, ValueError) as error:  # ValueError: it is no regular file
            # the list is a memory: without it the sample is found again
            why = getattr(error, "strerror", None) or error
            self._news.append(f"cannot write {self._run_list} ({why})")
            self._run_list = None


def _identity(shards: ShardSet, sample_id: int) -> tuple[str, int, int, int]:
    entry = shards.entry(sample_id)
    return str(entry["shard"]), int(entry["offset"]), int(entry["size"]), int(entry["crc32"])


def _kind(reason: str) -> str:
    """What reasons have in common: their first words, without numbers and names."""
    # of the shard, or its URL
    without_name = re.sub(r"^\S+: ", "", reason.removeprefix(UNREADABLE))
    head = re.split(r"[(.;,]", without_name)[0].strip()
    return re.sub(r"\d+", "#", head)[:60]
