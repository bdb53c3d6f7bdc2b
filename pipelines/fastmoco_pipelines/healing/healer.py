"""Batches in spite of bad samples: find them, leave them out, fill their places.

Whether a sample is bad depends only on its bytes: they must be those of the index, have the
structure and size of an image, and pass the decoder that makes the views, alone.
`sampling/stand_ins.py` chooses the sample that takes its place; `bad_samples.py` knows what is bad
already, and how much is tolerated.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.errors import DecodeError, LostIndexError, RemoteError, ShardError
from fastmoco_pipelines.healing.bad_samples import UNREADABLE, BadSamples
from fastmoco_pipelines.healing.culprit import Suspects
from fastmoco_pipelines.sampling.stand_ins import Places, Plan
from fastmoco_pipelines.sets.local_files import ReadFault, is_own_trouble
from fastmoco_pipelines.sets.shard_set import ShardSet

PATIENCE = (1.0, 3.0, 10.0)
"""Pauses in seconds before samples that cannot be read are tried again, on top of the tries that
the files make."""
# a damaged spot; the rest of the file may be fine
_ONE_PLACE = (errno.EIO, errno.EILSEQ, errno.EUCLEAN, errno.EBADMSG)
# Candidates of one place: enough for any share of bad samples that is worth training on.
MAX_ATTEMPTS = 1000

Encoded = NDArray[np.uint8]


class Healer:
    """Reads samples of a set, and replaces those that are bad. Two threads may use it.

    Args:
        shards: the set.
        bad: the bad samples that are known.
        suspects: decodes images alone.
        stop: set when the samples are no longer needed.
    """

    def __init__(
        self, shards: ShardSet, bad: BadSamples, suspects: Suspects, stop: threading.Event
    ) -> None:
        self.bad = bad
        self._shards = shards
        self._suspects = suspects
        self._stop = stop
        self._given_up: set[str] = set()

    def read(self, sample_ids: NDArray[np.int64]) -> list[Encoded | None]:
        """The bytes of each sample; None for those that are bad.

        Raises:
            TooManyBadSamplesError: if too many are.
            ShardError: where nothing can be read whatever the sample: this process may open no more
                files, or is closing.
        """
        found: list[Encoded | None] = [None] * len(sample_ids)
        rows = np.flatnonzero(~self.bad.contains(sample_ids))
        if not len(rows):
            return found
        for row, data in zip(rows.tolist(), self._read_patiently(sample_ids[rows]), strict=True):
            if isinstance(data, np.ndarray):
                found[row] = data
            else:
                self._leave_out(int(sample_ids[row]), data)
        return found

    def _read_patiently(self, sample_ids: NDArray[np.int64]) -> list[Encoded | ReadFault]:
        """The bytes of each sample, or the fault that stays. A disk or a server that fails is given
        `PATIENCE`."""
        found = self._read_each(sample_ids)
        for pause in PATIENCE:
            rows = [
                row
                for row in self._may_pass(found)
                if self._shard_of(sample_ids[row]) not in self._given_up
            ]
            if not rows or self._stop.wait(pause):
                break
            for row, data in zip(rows, self._read_each(sample_ids[rows]), strict=True):
                found[row] = data
        # The next sample of such a shard is not waited for again.
        self._given_up |= {self._shard_of(sample_ids[row]) for row in self._may_pass(found)}
        return found

    def _read_each(self, sample_ids: NDArray[np.int64]) -> list[Encoded | ReadFault]:
        try:
            return self._shards.read_each(sample_ids)
        except (ShardError, OSError) as error:
            if not is_own_trouble(error):
                raise
            raise ShardError(
                f"{error}: this process may not open another file or take more memory: ulimit -n, "
                "ulimit -v"
            ) from error

    def _may_pass(self, found: Sequence[Encoded | ReadFault]) -> list[int]:
        """The rows whose faults are not of the bytes, which are final."""
        return [
            row
            for row, data in enumerate(found)
            if not isinstance(data, np.ndarray) and _lost_by(data) is not Lost.BYTES
        ]

    def _shard_of(self, sample_id: int) -> str:
        return self._shards.shard_of(int(sample_id))[0]

    def _leave_out(self, sample_id: int, fault: ReadFault) -> None:
        """Leave out what a fault costs: its sample, or all of its shard.

        Raises:
            TooManyBadSamplesError: if that is too much.
        """
        lost = _lost_by(fault)
        reason = str(fault).removeprefix(f"{self._shards.describe(sample_id)}: ").rstrip(".")
        if lost is Lost.SHARD:
            self.bad.add_shard(sample_id, reason)
        elif lost is Lost.SAMPLE:
            self.bad.add(sample_id, UNREADABLE + reason)
        else:
            # without the cure
            self.bad.add(sample_id, reason.partition(". ")[0].partition(": run ")[0])

    def fill(
        self, plan: Plan, places: Places, encoded: list[Encoded | None] | None = None
    ) -> list[Encoded]:
        """The bytes of every place; places whose sample is bad go to their next candidates.

        Args:
            plan: what the candidates are.
            places: changed where a sample is bad.
            encoded: bytes that have been read; None where a sample has turned out to be bad.

        Raises:
            TooManyBadSamplesError: if too many are.
        """
        filled = list(self.read(places.ids)) if encoded is None else encoded
        while rows := [row for row, data in enumerate(filled) if data is None]:
            for row in rows:
                to_good_candidate(plan, places, row, self.bad.__contains__)
            for row, data in zip(rows, self.read(places.ids[rows]), strict=True):
                filled[row] = data
        return [data for data in filled if data is not None]

    def find_bad(
        self, error: DecodeError, sample_ids: NDArray[np.int64], encoded: list[Encoded]
    ) -> set[int]:
        """The rows of a batch that broke it, which are bad from now on; empty where all decode
        alone.

        Raises:
            DecodeError: `error` itself where the decoder refuses everything, good images too: it is
                at fault.
            TooManyBadSamplesError: if too many are bad.
        """
        bad = self._suspects.find(error, encoded)
        for row, reason in bad.items():
            self.bad.add(int(sample_ids[row]), reason)
        return set(bad)


def to_good_candidate(plan: Plan, places: Places, row: int, is_bad: Callable[[int], bool]) -> None:
    """Give a place to its next candidates until one is not known to be bad.

    Raises:
        ShardError: if too many candidates are bad.
    """
    while is_bad(int(places.ids[row])):
        if places.attempts[row] >= MAX_ATTEMPTS:
            raise ShardError(
                f"step {places.step}: of {MAX_ATTEMPTS} images drawn to stand in for a bad "
                "one, none is good: run `fastmoco data check` on the shards, and copy those that "
                "are damaged again from their source"
            )
        plan.advance(places, row)


class Trial:
    """The decoding of one batch, again and again until no bad image is in it.

    A batch whose images all decode alone is tried once more by a new graph, because memory may have
    been short at that moment.
    """

    def __init__(self, healer: Healer) -> None:
        self._healer = healer
        self._innocent = False

    def blame(
        self, error: DecodeError, sample_ids: NDArray[np.int64], encoded: list[Encoded]
    ) -> list[Encoded | None]:
        """Find out which images broke the batch.

        Returns:
            `encoded` with None in the places of those; without any None the same batch is to be
            tried once more.

        Raises:
            DecodeError: `error` itself where no image is to blame, and the batch has been tried
                once more already.
            TooManyBadSamplesError: if too many are bad.
        """
        bad = self._healer.find_bad(error, sample_ids, encoded)
        if not bad and self._innocent:
            raise error
        self._innocent = not bad
        return [None if row in bad else data for row, data in enumerate(encoded)]


class Lost(Enum):
    """What a fault costs."""

    SHARD = "all of a shard"
    SAMPLE = "a sample, which this machine cannot read"
    BYTES = "a sample, whose bytes are bad wherever they are read"


def _lost_by(fault: ReadFault) -> Lost:
    if isinstance(fault, RemoteError | LostIndexError):
        return Lost.SHARD
    cause = fault if isinstance(fault, OSError) else fault.__cause__
    if isinstance(cause, OSError):
        return Lost.SAMPLE if cause.errno in _ONE_PLACE else Lost.SHARD
    return Lost.BYTES
