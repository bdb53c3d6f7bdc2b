"""Reading with patience: what may pass is tried again, what does not is told apart from the samples that are fine.

A set of shards reads a batch or raises the first fault. Here a fault costs its own sample. A disk or a server that fails
is given ``PATIENCE`` on top of the tries that the files themselves make; bytes that differ from the index are final.
"""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.errors import RemoteError, StoppedError
from fastmoco_pipelines.sets.shard_set import ShardError, ShardSet

PATIENCE = (1.0, 3.0, 10.0)
"""Pauses in seconds before a shard that cannot be read is tried again."""
_OWN_TROUBLE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of this machine, not of a shard
_ONE_PLACE = (errno.EIO, errno.EILSEQ, errno.EUCLEAN, errno.EBADMSG)  # a damaged spot; the rest of the file may be fine


@dataclass(frozen=True, slots=True)
class ReadFault:
    """Why a sample was not read: ``lost`` says "shard", "sample" (this machine cannot read it) or "bytes" (they are bad)."""

    reason: str
    lost: str


class PatientReader:
    """Reads samples of one set; several threads may.

    Args:
        shards: the set.
        stop: set when nobody waits any more.
    """

    def __init__(self, shards: ShardSet, stop: threading.Event) -> None:
        self._shards, self._stop = shards, stop
        self._given_up: set[str] = set()

    def read(self, sample_ids: NDArray[np.int64]) -> list[NDArray[np.uint8] | ReadFault]:
        """The bytes of each sample, or why there are none.

        Raises:
            ShardError: where nothing can be read whatever the sample: this process may open no more files, or is closing.
        """
        try:
            return list(self._shards.read(sample_ids))
        except (ShardError, OSError) as error:
            _raise_if_general(error)
        return [self._read_one(sample_id) for sample_id in sample_ids.tolist()]

    def _read_one(self, sample_id: int) -> NDArray[np.uint8] | ReadFault:
        shard = self._shards.shard_of(sample_id)[0]
        for pause in (*(PATIENCE if shard not in self._given_up else ()), None):
            try:
                return self._shards.read(np.array([sample_id]))[0]
            except (ShardError, OSError) as error:
                _raise_if_general(error)
                fault = self._judge(error, sample_id)
                if fault.lost == "bytes":
                    return fault
                if pause is None or self._stop.wait(pause):
                    break
        self._given_up.add(shard)  # the next sample of it is not waited for again
        return fault

    def _judge(self, error: ShardError | OSError, sample_id: int) -> ReadFault:
        text = str(error).removeprefix(f"{self._shards.describe(sample_id)}: ").rstrip(".")
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError):
            return ReadFault(text, "sample" if cause.errno in _ONE_PLACE else "shard")
        if isinstance(error, RemoteError):
            return ReadFault(text, "shard")
        return ReadFault(text.partition(". ")[0].partition(": run ")[0], "bytes")


def _raise_if_general(error: Exception) -> None:
    """Raise what says nothing about a shard."""
    cause = error if isinstance(error, OSError) else error.__cause__
    if isinstance(cause, OSError) and cause.errno in _OWN_TROUBLE:
        raise ShardError(
            f"{error}: this process may not open another file or take more memory: ulimit -n, ulimit -v"
        ) from error
    if isinstance(error, StoppedError):
        raise error
