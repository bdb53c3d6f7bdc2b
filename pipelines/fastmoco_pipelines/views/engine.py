"""One DALI pipeline at work: built when needed, run on parts of a batch, its outputs taken over.

DALI's buffers are as large as what it works on at once. So a batch goes through in parts of a
bounded number of images and a bounded size of these when they are decoded, and each part is written
into its rows of the batch. A row depends on its own image and draws, so the parts change nothing.
"""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmoco_pipelines.errors import DecodeError, StructureError
from fastmoco_pipelines.formats.headers import plain_image
from fastmoco_pipelines.formats.images import admitted
from fastmoco_pipelines.spec import DECODE_GB, SECONDS_PER_IMAGE, Device, require
from fastmoco_pipelines.views.runtime import build_pipeline
from fastmoco_pipelines.views.watch import StuckError, watched

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

Inputs = Callable[[slice], Mapping[str, NDArray[Any]]]
"""The inputs of DALI's graph, by name, for some rows of a batch."""
Finish = Callable[[Sequence[Any], slice], list[Tensor]]
"""What makes tensors of all outputs of a run of DALI on some rows, on their device: returns memory
of its own."""


class Engine:
    """A DALI pipeline that is built when first needed, and again after an error (DALI voids it
    then).

    Args:
        graph: what builds the graph.
        batch_size: largest number of images of one batch.
        sub_batch: largest number of images of one run of DALI; None: of one batch.
        threads: DALI worker threads.
        device: where it works.
        device_id: ordinal of the GPU (0 if not given); ignored on the CPU.
        decode_bytes: largest size of the decoded images of one run, where it is more than one; 0:
            as usual on the device.
        seconds_per_image: longest time to decode one.

    Attributes:
        finish_seconds: of the last batch, spent on the outputs of DALI.
    """

    def __init__(
        self,
        graph: Callable[[], Any],
        *,
        batch_size: int,
        sub_batch: int | None = None,
        threads: int,
        device: Device,
        device_id: int | None,
        decode_bytes: int = 0,
        seconds_per_image: float = SECONDS_PER_IMAGE,
    ) -> None:
        require(batch_size >= 1, "batch_size", batch_size, "needs at least one image")
        require(
            sub_batch is None or sub_batch >= 1, "sub_batch", sub_batch, "needs at least one image"
        )
        require(threads >= 1, "threads", threads, "needs at least one thread")
        require(device in ("cpu", "gpu"), "device", device, 'is "cpu" or "gpu"')
        # DALI would keep buffers of 32 MiB and more indefinitely. Read when it first allocates; a
        # user's own setting stays.
        os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "0")
        self.finish_seconds = 0.0
        self._batch_size = batch_size
        self._sub_batch = min(sub_batch or batch_size, batch_size)
        self._decode_bytes = decode_bytes or int(1e9 * DECODE_GB[device])
        self._seconds = seconds_per_image
        self._graph = graph
        self._on_gpu = device == "gpu"
        self._device_id = device_id or 0
        self._options = {
            "batch_size": self._sub_batch,
            "num_threads": threads,
            "device_id": self._device_id if self._on_gpu else None,
            # One run is one batch or a part of one: the loader's own queue prefetches.
            "prefetch_queue_depth": 1,
            "enable_conditionals": True,
        }
        self._pipeline: Pipeline | None = None
        self._stream: torch.cuda.Stream | None = None

    def run(
        self,
        encoded: Sequence[NDArray[np.uint8]],
        inputs: Inputs,
        finish: Finish,
        before_output: Callable[[], None] | None = None,
        beside: NDArray[np.int64] | None = None,
        finishing: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> list[Tensor]:
        """Run one batch, and its outputs through `finish`; every tensor returned owns its memory.

        Args:
            encoded: 1 to `batch_size` arrays [bytes] uint8.
            inputs: called for each part of the rows.
            finish: called with the outputs of each part; a part's first dimension is its rows.
            before_output: called once, before memory is taken for the batch.
            beside: [B] bytes that DALI takes for each image beside the decoded one; None: nothing.
            finishing: makes the contexts of the work on DALI's outputs.

        Raises:
            DecodeError: if an image's structure is broken or its decoding does not end, with rows
                of the batch, or DALI fails.
        """
        count = len(encoded)
        require(
            1 <= count <= self._batch_size,
            "encoded",
            count,
            f"holds 1 to {self._batch_size} images",
        )

        # The one place that guarantees the structure of what DALI gets, from shards or elsewhere:
        # images alone, without the metadata over which it stumbles or prints.
        faults: list[tuple[int, str]] = []
        found = []
        sizes = []
        for row, image in enumerate(encoded):
            try:
                found.append(admitted(_bytes_of(image)))
                sizes.append(found[-1].decoder_bytes + (0 if beside is None else int(beside[row])))
            except StructureError as error:
                faults.append((row, str(error)))
        if faults:
            raise _refusal(faults, count)
        whole: list[Tensor] = []
        self.finish_seconds = 0.0
        for rows in parts_of(sizes, self._sub_batch, self._decode_bytes):
            # Without their metadata they are copies, of a part at a time.
            plain = [
                np.frombuffer(plain_image(_bytes_of(image), known), np.uint8)
                for image, known in zip(encoded[rows], found[rows], strict=True)
            ]
            pixels = sum(known.pixels for known in found[rows])
            decode = partial(self._outputs, plain, inputs(rows), rows, count)
            try:
                outputs = watched(decode, plain, pixels, seconds=self._seconds)
            except StuckError as stuck:
                if stuck.at_work:
                    self._leave_behind()
                faults = [(rows.start + row, why) for row, why in stuck.reasons.items()]
                raise _refusal(faults, count) from None
            start = time.perf_counter()
            try:
                if before_output is not None and not rows.start:
                    before_output()
                with finishing(), self._own_stream():
                    whole = _gathered(whole, finish(outputs, rows), rows, count)
            finally:
                self.finish_seconds += time.perf_counter() - start
            del outputs, decode, plain  # or DALI could not use their memory in its next run
        if self._on_gpu:
            for tensor in whole:
                # This memory belongs to the side stream: when the trainer drops it, it may be given
                # out again only after the kernels that the default stream holds by then. A reader
                # on a third stream must record that too.
                tensor.record_stream(torch.cuda.default_stream(tensor.device))
        return whole

    def _outputs(
        self,
        encoded: Sequence[NDArray[np.uint8]],
        inputs: Mapping[str, NDArray[Any]],
        rows: slice,
        count: int,
    ) -> Sequence[Any]:
        """One run of DALI on some rows of a batch of `count` images."""
        if self._pipeline is None:
            self._pipeline = build_pipeline(self._graph, **self._options)
        pipeline = self._pipeline
        try:
            pipeline.feed_input("encoded", list(encoded))
            for name, value in inputs.items():
                pipeline.feed_input(name, value)
            outputs: Sequence[Any] = pipeline.run()
            return outputs
        # DALI raises several types; whichever it was, its pipeline is void now
        except Exception as error:
            if self._pipeline is pipeline:  # and not one that was built since
                self._pipeline = None
            # Its buffers go now: the images are about to be decoded again, one by one.
            traceback.clear_frames(error.__traceback__)
            del pipeline
            part = f" (images {rows.start} to {rows.stop - 1})" if len(encoded) < count else ""
            raise DecodeError(
                f"DALI could not make the views of a batch of {count}{part}: {error}"
            ) from error

    def _leave_behind(self) -> None:
        """Take another decoder from now on: the thread that waits for this one keeps it."""
        self._pipeline = None

    @contextlib.contextmanager
    def _own_stream(self) -> Iterator[None]:
        """Where DALI's outputs are finished: it takes a buffer back when Python drops it, though
        kernels may still read it.

        On a GPU a stream of its own, complete at the end: on the trainer's they would wait for all
        that is queued there.
        """
        if not self._on_gpu:
            yield
            return
        if self._stream is None:
            self._stream = torch.cuda.Stream(torch.device("cuda", self._device_id))  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._stream.synchronize()


def _bytes_of(image: NDArray[np.uint8]) -> bytes:
    """The bytes of an encoded image: those that it is a view of, where these are no others."""
    base = image.base
    if isinstance(base, bytes) and len(base) == image.nbytes:
        return base
    return image.tobytes()


def parts_of(sizes: Sequence[int], most: int, budget: int) -> Iterator[slice]:
    """The rows of a batch in parts, in order.

    Args:
        sizes: bytes of each row; at least one row.
        most: rows of a part at most.
        budget: bytes of a part at most, unless it is one row.
    """
    first = 0
    held = 0
    for row, size in enumerate(sizes):
        if row > first and (row - first == most or held + size > budget):
            yield slice(first, row)
            first, held = row, 0
        held += size
    yield slice(first, len(sizes))


def _refusal(faults: Sequence[tuple[int, str]], count: int) -> DecodeError:
    """The error of a batch of `count` images, with the rows that are at fault and why."""
    row, fault = faults[0]
    what = f"{len(faults)} of {count} images cannot be decoded; image {row}: {fault}"
    return DecodeError(what, tuple(faults))


def _gathered(whole: list[Tensor], parts: list[Tensor], rows: slice, count: int) -> list[Tensor]:
    """The batch with some rows more; made when the first part's shapes are known. A part that is
    the whole batch is returned as it is."""
    if rows.stop - rows.start == count:
        return parts
    whole = whole or [part.new_empty(count, *part.shape[1:]) for part in parts]
    for target, part in zip(whole, parts, strict=True):
        target[rows].copy_(part)
    return whole
