"""Without DALI: Pillow decodes on the CPU, with the same pixels, and makes the same views.

The views of `color="exact"` are cut from decoded images by `fastmoco_kernels.cut_views` in any
case, so they are equal to the bit. Decoded levels are DALI's for JPEG, WebP and PNG of 8 bits a
channel; of PNG with 16 bits and color or alpha Pillow keeps the upper byte where DALI rounds, at
most one level apart. The kNN images are resized by Pillow, at most one level from DALI's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fastmoco_pipelines.errors import DecodeError
from fastmoco_pipelines.spec import SECONDS_PER_IMAGE, EvalSpec, ViewSpec
from fastmoco_pipelines.views.decoding import decode_image
from fastmoco_pipelines.views.engine import Engine
from fastmoco_pipelines.views.levels import normalise


class PillowEngine(Engine):
    """An `Engine` whose images are decoded by Pillow in threads: its one output is a list of them.

    Args:
        batch_size: largest number of images of one batch.
        sub_batch: largest number of images that are decoded at once; None: one batch.
        threads: that decode.
        decode_bytes, seconds_per_image: as of `Engine`.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        sub_batch: int | None = None,
        threads: int,
        decode_bytes: int = 0,
        seconds_per_image: float = SECONDS_PER_IMAGE,
    ) -> None:
        def no_graph() -> Any:
            raise AssertionError("Pillow needs no graph")

        super().__init__(
            no_graph,
            batch_size=batch_size,
            sub_batch=sub_batch,
            threads=threads,
            device="cpu",
            device_id=None,
            decode_bytes=decode_bytes,
            seconds_per_image=seconds_per_image,
        )
        self._threads = threads
        self._pool: ThreadPoolExecutor | None = None

    def _outputs(
        self,
        encoded: Sequence[NDArray[np.uint8]],
        inputs: Mapping[str, NDArray[Any]],
        rows: slice,
        count: int,
    ) -> Sequence[Any]:
        """Decode some rows of a batch of `count` images; all views are cut elsewhere.

        Raises:
            DecodeError: naming every row that cannot be decoded.
        """
        if inputs:
            raise ValueError("views that are cut elsewhere have no inputs")
        if self._pool is None and self._threads > 1:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="fastmoco-decode")
        run = map if self._pool is None else self._pool.map
        decoded = list(run(_decoded_or_reason, encoded))
        faults = tuple(
            (rows.start + row, image) for row, image in enumerate(decoded) if isinstance(image, str)
        )
        if faults:
            row, reason = faults[0]
            raise DecodeError(
                f"{len(faults)} of {count} images cannot be decoded; image {row}: {reason}", faults
            )
        return [decoded]

    def _leave_behind(self) -> None:
        self._pool = None


def _decoded_or_reason(data: NDArray[np.uint8]) -> NDArray[np.uint8] | str:
    try:
        return decode_image(data.tobytes())
    except DecodeError as error:
        return str(error)


def central_parts(decoded: Sequence[NDArray[np.uint8]], spec: EvalSpec) -> Tensor:
    """The central square of `spec.size` of each image whose shorter side is resized to
    `spec.resize`: [B, 3, size, size] float32, normalised.

    Only that square is computed, because the whole of an image of 16384 x 1 pixels would be large.
    """
    levels = np.stack([_central_part(image, spec) for image in decoded])
    view = ViewSpec(size=spec.size, mean=spec.mean, std=spec.std, color="dali")
    planes = torch.from_numpy(levels).permute(0, 3, 1, 2).contiguous()
    return normalise(planes, view)


def _central_part(image: NDArray[np.uint8], spec: EvalSpec) -> NDArray[np.uint8]:
    """[size, size, 3] uint8."""
    extent = image.shape[1], image.shape[0]  # width and height, as Pillow orders them
    shorter = min(extent)
    resized = [spec.resize * side // shorter for side in extent]
    starts = [(side - spec.size) // 2 for side in resized]
    scales = [side / new for side, new in zip(extent, resized, strict=True)]
    low = [start * scale for start, scale in zip(starts, scales, strict=True)]
    high = [
        min((start + spec.size) * scale, side)
        for start, scale, side in zip(starts, scales, extent, strict=True)
    ]
    # Unlike a crop, a box is filtered with the pixels around it, as a crop after the resize is.
    part = Image.fromarray(image).resize(
        (spec.size, spec.size), Image.Resampling.BILINEAR, box=(low[0], low[1], high[0], high[1])
    )
    return np.asarray(part)
