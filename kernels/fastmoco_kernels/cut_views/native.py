"""The compiled path: find the library that setup.py built, and pass it a batch."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import threading
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmoco_kernels.view_color.plan import Plan

LIBRARY = "fastmoco_kernels.cut_views._native"
"""Where setup.py puts it. It does not use the Python API: one file serves every version."""
VIEWS = "fastmoco_cut_views"
"""The function that writes normalised floats."""
LEVELS = "fastmoco_cut_levels"
"""The function that writes bytes; libraries built from older sources lack it."""
BICUBIC = "_bicubic"
"""Ends the names of the functions that resize by a cubic; older libraries lack them, too."""
PART = "_part"
"""Ends the names, after that, of the functions whose views are a part of the resized window."""

_POINTERS = (
    "pixels",
    "strides",
    "crops",
    "steps",
    "factors",
    "hue_shift",
    "flags",
    "boxes",
    "scale",
    "shift",
    "out",
)


class _Batch(ctypes.Structure):
    """The `Batch` of native/cut.c, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "size", "threshold")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        ("next", ctypes.c_longlong),
        ("base", ctypes.c_int64),
        ("corners", ctypes.c_void_p),
    ]


@functools.cache
def native_library() -> ctypes.CDLL | None:
    """The library; None where fastmoco was installed without a C compiler."""
    file = _library_file()
    if file is None:
        return None
    library = ctypes.CDLL(file)
    ends = ("", BICUBIC, PART, BICUBIC + PART)
    names = [name + end for name in (VIEWS, LEVELS) for end in ends]
    for function in (getattr(library, name, None) for name in names):
        if function is not None:
            function.argtypes = [ctypes.POINTER(_Batch)]
            function.restype = ctypes.c_int
    return library


def _library_file() -> str | None:
    spec = importlib.util.find_spec(LIBRARY)
    if spec is not None and spec.origin is not None:
        return spec.origin
    # Python without a global lock does not import files of this ending; ctypes loads them.
    beside = Path(__file__).with_name(f"{LIBRARY.rpartition('.')[2]}.abi3.so")
    return str(beside) if beside.is_file() else None


def cut_views_native(
    images: list[NDArray[np.uint8]],
    crops: Tensor,
    corners: Tensor | None,
    tables: Plan,
    scale: Tensor,
    shift: Tensor,
    threshold: int,
    interpolation: str,
    base_size: int,
    threads: int,
    out: Tensor,
) -> None:
    """Compute a batch into `out`.

    Args:
        images: B of [H, W, 3] uint8, the levels of a row side by side.
        crops: [B, 4] int32, top, left, height, width, inside their images.
        corners: [B, 2] int32, top, left of the views in their resized windows; None: all of these.
        tables: of the batch, on the CPU.
        scale: [3] float32, factor of a level in the result.
        shift: [3] float32, what is added then.
        threshold: level from which solarize inverts.
        interpolation: of the resize, "bilinear" or "bicubic".
        base_size: side of a resized window; not read without corners.
        threads: that work on it, this one among them.
        out: [B, 3, size, size] float32, contiguous; or uint8, for levels without factor and
            summand.

    Raises:
        RuntimeError: if the library was built from an older source.
        MemoryError: if a thread gets no memory to work in.
    """
    library = native_library()
    assert library is not None  # noqa: S101 - a type: callers have asked whether it is there
    name = LEVELS if out.dtype == torch.uint8 else VIEWS
    name += BICUBIC if interpolation == "bicubic" else ""
    name += "" if corners is None else PART
    cut = getattr(library, name, None)
    if cut is None:
        raise RuntimeError(
            f"cut_views: the compiled part has no {name}: "
            "it is older than its source. Install fastmoco again"
        )
    pixels = np.array([image.ctypes.data for image in images], dtype=np.uint64)
    strides = np.array([image.strides[0] for image in images], dtype=np.int64)
    fields = [
        t.contiguous()
        for t in (crops, tables.steps, tables.factors, tables.shift, tables.flags, tables.boxes)
    ]
    pointers = [t.data_ptr() for t in (*fields, scale, shift, out)]
    places = None if corners is None else corners.contiguous()
    batch = _Batch(
        len(images),
        out.shape[-1],
        threshold,
        pixels.ctypes.data,
        strides.ctypes.data,
        *pointers,
        0,
        base_size,
        None if places is None else places.data_ptr(),
    )
    # The batch keeps alive everything that the threads read: an interrupt may end this function
    # first.
    batch.memory = (images, pixels, strides, fields, places, scale, shift, out)
    results: list[int] = []

    def work() -> None:
        # ctypes releases the GIL during the call; the threads take images by `next`.
        results.append(cut(ctypes.byref(batch)))

    others = [
        threading.Thread(target=work, name="fastmoco-cut")
        for _ in range(min(threads, len(images)) - 1)
    ]
    for thread in others:
        thread.start()
    work()
    for thread in others:
        thread.join()
    if any(results):
        raise MemoryError(
            f"cut_views: no memory to cut {len(images)} views of {out.shape[-1]} pixels"
        )
