"""A decoder that does not come back: which images keep it, so that it is left behind and they are
left out.

A thread inside a decoder cannot be interrupted. So a decoder works in a thread of its own, and when
it takes longer than it may, its images are decoded in the disposable processes of `fastmoco data
check`, with the same limits. Only an image that does not end there is to blame; where all end, the
machine is slow, and the decoder is waited for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.views.decode_pool import ChildLimits, DecodePool, Item

SLOW_SECONDS_PER_PIXEL = 1e-7
"""What a slow machine may take for each pixel of several images: fifty times what a core needs."""
_INTERRUPTED_SECONDS = 5.0
_KINDS = ("hang", "crash")

Result = TypeVar("Result")


class StuckError(Exception):
    """A decoder did not come back in time.

    Attributes:
        reasons: of the images that keep it, by row.
        at_work: whether it has not come back yet: then its thread holds what it works on until it
            does.
    """

    def __init__(self, reasons: dict[int, str], at_work: bool) -> None:
        super().__init__("a decoder does not come back")
        self.reasons = reasons
        self.at_work = at_work


class _Work(threading.Thread, Generic[Result]):
    """A call in a thread that does not keep the interpreter from exiting."""

    def __init__(self, call: Callable[[], Result]) -> None:
        super().__init__(name="fastmoco-decode", daemon=True)
        self._call: Callable[[], Result] | None = call
        self._results: list[Result] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        assert self._call is not None  # noqa: S101 - a type: given before the thread starts
        try:
            self._results.append(self._call())
        except BaseException as error:
            self._error = error
        finally:
            self._call = None

    def result(self) -> Result:
        """What the call returned or raised; gives it away."""
        if self._error is not None:
            error, self._error = self._error, None
            try:
                raise error
            finally:
                del error  # or it would hold this frame, and that all the decoder holds
        return self._results.pop()


def watched(
    decode: Callable[[], Result],
    encoded: Sequence[NDArray[np.uint8]],
    pixels: int,
    *,
    seconds: float,
) -> Result:
    """What a decoder makes of some images.

    Args:
        decode: decodes them all.
        encoded: the images.
        pixels: of all of them.
        seconds: that one image may take.

    Raises:
        StuckError: if the decoder takes longer than they may, and some of them, each alone in a
            process of its own, take longer than one may.
    """
    work = _Work(decode)
    work.start()
    try:
        work.join(seconds + pixels * SLOW_SECONDS_PER_PIXEL)
        if work.is_alive():
            reasons = endless_images(encoded, seconds=seconds)
            if reasons:
                raise StuckError(reasons, work.is_alive())
            work.join()
    except KeyboardInterrupt:
        work.join(_INTERRUPTED_SECONDS)  # an interpreter that ends must not take DALI down at work
        raise
    return work.result()


def endless_images(encoded: Sequence[NDArray[np.uint8]], *, seconds: float) -> dict[int, str]:
    """The images, by row, whose decoding in a process of its own does not end within `seconds`, or
    ends that process; and what happened."""
    descriptor = os.memfd_create("suspects", os.MFD_CLOEXEC)
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    with os.fdopen(descriptor, "wb") as file, DecodePool(1, ChildLimits(seconds=seconds)) as pool:
        items = []
        for data in encoded:
            items.append(Item(path, file.tell(), len(data)))
            file.write(data.data)
        file.flush()
        try:
            results = pool.run(items)
        except RuntimeError:  # no process can be started: the decoder is waited for
            return {}
    return {row: each.reason for row, each in enumerate(results) if each.kind in _KINDS}
