"""Which image of a batch broke the decoder. DALI fails a whole batch and names no file; here each is tried alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.images import ImageRefusedError, check_decodes
from fastmoco_pipelines.shards import ShardSet
from fastmoco_pipelines.spec import EvalSpec

if TYPE_CHECKING:
    from fastmoco_pipelines.dali import DecodeError


class BadImageError(RuntimeError):
    """An image in a shard that cannot be decoded: names tar and member, what is wrong and the cure."""


def raise_bad_image(
    error: DecodeError,
    *,
    shards: ShardSet,
    sample_ids: NDArray[np.int64],
    encoded: list[NDArray[np.uint8]],
    device: Literal["cpu", "gpu"],
    device_id: int | None,
) -> NoReturn:
    """Decode every image of a failed batch alone and raise an error that names the first one that fails.

    Raises:
        BadImageError: from ``error``, naming tar and member.
        DecodeError: ``error`` itself where no image is to blame: all decode alone, or none does though Pillow reads it.
    """
    from fastmoco_pipelines.dali import DecodeError, EvalPipeline

    # A pipeline of its own: the one that failed need not be usable any more.
    alone = EvalPipeline(EvalSpec(size=8, resize=8), batch_size=1, threads=1, device=device, device_id=device_id)
    bad: list[tuple[int, str]] = []
    blameless = 0
    for sample_id, data in zip(sample_ids.tolist(), encoded, strict=True):
        try:
            alone.run([data])
        except DecodeError as failure:
            reason = _pillow_reason(data)
            blameless += reason is None and not failure.faults
            bad.append((sample_id, reason or _dali_reason(failure)))
    if not bad or (blameless == len(encoded) > 1):
        raise error
    sample_id, reason = bad[0]
    others = f" (and {len(bad) - 1} more images of this batch)" if len(bad) > 1 else ""
    raise BadImageError(
        f"{shards.describe(sample_id)}: cannot be decoded: {reason}{others}. Remove or replace this image in the source "
        "folder and pack it again."
    ) from error


def _pillow_reason(data: NDArray[np.uint8]) -> str | None:
    try:
        check_decodes(data.tobytes())
    except ImageRefusedError as refused:
        return str(refused)
    return None


def _dali_reason(failure: DecodeError) -> str:
    said = re.search(r"encountered:\s*(.+)", str(failure))  # the rest of DALI's text is a traceback of the graph
    reason = failure.faults[0][1] if failure.faults else said.group(1) if said else str(failure)
    return f"DALI refuses it although Pillow reads it ({reason})"
