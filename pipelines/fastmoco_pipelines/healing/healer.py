"""Batches in spite of bad samples: find them, leave them out, fill their places.

Whether a sample is bad rests on its bytes alone: they must be those of the index, have the structure and size of an image,
and pass the decoder that makes the views, undisturbed by its neighbours. `sampling/stand_ins.py` chooses the
sample that takes its place; `bad_samples.py` knows what is bad already, and how much is tolerated.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.errors import ShardError
from fastmoco_pipelines.healing.bad_samples import UNREADABLE, BadSamples
from fastmoco_pipelines.healing.culprit import Suspects
from fastmoco_pipelines.healing.reader import PatientReader, ReadFault
from fastmoco_pipelines.sampling.stand_ins import Places, Plan
from fastmoco_pipelines.sets.shard_set import ShardSet

if TYPE_CHECKING:
    from fastmoco_pipelines.views.dali import DecodeError

MAX_ATTEMPTS = 1000  # candidates of one place: beyond any share of bad samples that anybody would train on

Encoded = NDArray[np.uint8]


class Healer:
    """Reads samples of a set, and sees to those that are bad. Two threads may use it.

    Args:
        shards: the set.
        bad: what is known of it.
        suspects: decodes images alone.
        stop: set when nobody waits any more.
    """

    def __init__(self, shards: ShardSet, bad: BadSamples, suspects: Suspects, stop: threading.Event) -> None:
        self.bad = bad
        self._shards = shards
        self._suspects = suspects
        self._reader = PatientReader(shards, stop)

    def read(self, sample_ids: NDArray[np.int64]) -> list[Encoded | None]:
        """The bytes of each sample; None for those that are bad.

        Raises:
            TooManyBadSamplesError: if too many are.
        """
        found: list[Encoded | None] = [None] * len(sample_ids)
        rows = np.flatnonzero(~self.bad.contains(sample_ids))
        if len(rows):
            for row, data in zip(rows.tolist(), self._reader.read(sample_ids[rows]), strict=True):
                if not isinstance(data, ReadFault):
                    found[row] = data
                elif data.lost == "shard":
                    self.bad.add_shard(int(sample_ids[row]), data.reason)
                else:
                    prefix = UNREADABLE if data.lost == "sample" else ""
                    self.bad.add(int(sample_ids[row]), prefix + data.reason)
        return found

    def fill(self, plan: Plan, places: Places, encoded: list[Encoded | None] | None = None) -> list[Encoded]:
        """The bytes of every place; places whose sample is bad go to their next candidates.

        Args:
            plan: what the candidates are.
            places: changed where a sample is bad.
            encoded: bytes that are at hand; None where a sample has turned out to be bad.

        Raises:
            TooManyBadSamplesError: if too many are.
        """
        filled = list(self.read(places.ids)) if encoded is None else encoded
        while rows := [row for row, data in enumerate(filled) if data is None]:
            for row in rows:
                self._advance(plan, places, row)
            for row, data in zip(rows, self.read(places.ids[rows]), strict=True):
                filled[row] = data
        return [data for data in filled if data is not None]

    def _advance(self, plan: Plan, places: Places, row: int) -> None:
        """To the next candidate that is not known to be bad."""
        while self.bad.contains(places.ids[row : row + 1])[0]:
            if places.attempts[row] >= MAX_ATTEMPTS:
                raise ShardError(
                    f"step {places.step}: of {MAX_ATTEMPTS} images drawn to stand in for a bad one, none is good: run "
                    "`fastmoco data check` on the shards"
                )
            plan.advance(places, row)

    def blame(self, error: DecodeError, sample_ids: NDArray[np.int64], encoded: list[Encoded]) -> list[Encoded | None]:
        """Find out which images broke a batch.

        Returns:
            ``encoded`` with None in the places of those; without any None where all decode alone.

        Raises:
            DecodeError: ``error`` itself where the decoder refuses everything, good images too: it is at fault.
            TooManyBadSamplesError: if too many are bad.
        """
        bad = self._suspects.find(error, encoded)
        for row, reason in bad.items():
            self.bad.add(int(sample_ids[row]), reason)
        return [None if row in bad else data for row, data in enumerate(encoded)]
