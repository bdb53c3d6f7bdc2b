"""Which images of a batch broke the decoder. DALI fails a whole batch and names no file; here each
is tried alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.errors import BadImageError, DecodeError, ImageRefusedError
from fastmoco_pipelines.formats.images import check_decodes
from fastmoco_pipelines.sets.shard_set import ShardSet
from fastmoco_pipelines.spec import Device, EvalSpec
from fastmoco_pipelines.views.runtime import cause_of

if TYPE_CHECKING:
    from fastmoco_pipelines.views.dali import EvalPipeline

# images tried together at first: all threads have work, and one bad image costs 32 single tries
_GROUP = 32


class Suspects:
    """Finds the bad images of a batch by the decoder that refused it, on the same device.

    Args:
        device: where the views are made.
        device_id: index of the GPU.
        threads: DALI worker threads.
        decode_bytes: as of `Engine`.
    """

    def __init__(
        self, *, device: Device, device_id: int | None, threads: int, decode_bytes: int = 0
    ) -> None:
        self._decode_bytes = decode_bytes
        self._device = device
        self._device_id = device_id
        self._threads = threads

    def find(self, error: DecodeError, encoded: list[NDArray[np.uint8]]) -> dict[int, str]:
        """The rows of images that fail alone, and why; empty where all decode alone.

        If the batch was refused for images of broken structure, only those are returned: no other
        was tried.

        Args:
            error: how the batch failed.
            encoded: B arrays [bytes] uint8.

        Raises:
            DecodeError: `error` itself where none decodes though Pillow reads them all: the decoder
                is at fault.
        """
        if error.faults:  # the engine has looked at the structure of all
            return {row: f"it cannot be decoded ({fault})" for row, fault in error.faults}

        bad: dict[int, str] = {}
        rows = list(range(len(encoded)))
        # Pipelines of their own: the one that failed is void.
        together = self._pipeline(_GROUP)
        alone = self._pipeline(1)
        blameless = 0
        for start in range(0, len(rows), _GROUP):
            group = rows[start : start + _GROUP]
            if _refused(together, [encoded[row] for row in group]) is None:
                continue
            for row in group:
                failure = _refused(alone, [encoded[row]])
                if failure is not None:
                    reason = _pillow_reason(encoded[row])
                    blameless += reason is None
                    bad[row] = reason or _dali_reason(failure)
        if blameless == len(encoded) > 1:
            raise error
        return bad

    def _pipeline(self, batch_size: int) -> EvalPipeline:
        from fastmoco_pipelines.views.dali import EvalPipeline

        return EvalPipeline(
            EvalSpec(size=8, resize=8),
            batch_size=batch_size,
            threads=min(self._threads, batch_size),
            device=self._device,
            device_id=self._device_id,
            decode_bytes=self._decode_bytes,
        )


def raise_bad_image(
    error: DecodeError,
    *,
    shards: ShardSet,
    sample_ids: NDArray[np.int64],
    encoded: list[NDArray[np.uint8]],
    device: Device,
    device_id: int | None,
) -> NoReturn:
    """Raise an error that names the first bad image of a failed batch, where nothing may stand in
    for it.

    Raises:
        BadImageError: from `error`, naming tar and member.
        DecodeError: `error` itself where no image is to blame: all decode alone, or none does
            though Pillow reads it.
    """
    bad = Suspects(device=device, device_id=device_id, threads=1).find(error, encoded)
    if not bad:
        raise error
    row = min(bad)
    others = f" (and {len(bad) - 1} more images of this batch)" if len(bad) > 1 else ""
    raise BadImageError(
        f"{shards.describe(int(sample_ids[row]))}: {bad[row]}{others}. `fastmoco data check` lists "
        "such images, and training leaves them out; or remove it in the source folder and pack "
        "that again."
    ) from error


def _refused(pipeline: EvalPipeline, encoded: list[NDArray[np.uint8]]) -> DecodeError | None:

    try:
        pipeline.run(encoded)
    except DecodeError as failure:
        return failure
    return None


def _pillow_reason(data: NDArray[np.uint8]) -> str | None:
    try:
        check_decodes(data.tobytes())
    except ImageRefusedError as refused:
        return str(refused)
    return None


def _dali_reason(failure: DecodeError) -> str:
    return f"it cannot be decoded (DALI: {cause_of(failure)})"
