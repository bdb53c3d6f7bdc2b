"""The engine: NVIDIA DALI decodes each image once and cuts its views, on the GPU or on the CPU, by
one graph. On a CPU without DALI, Pillow decodes (`pillow.py`).

DALI draws nothing here. Crop windows, flips, strengths and sigmas arrive per sample
(`draws.py`), so a batch is a function of its bytes and its draws, and the state of the data is
the step number. What differs from the PIL semantics of `reference.py`, and by how much, is
written down in docs/views.md and held by tests.

Color stays uint8 between operations, because PIL rounds and clips there. An operation that a
`ViewSpec` never applies is not in the graph; one that touches only a share of the images
(blur, solarize) runs on that share alone. A view with `color="exact"` leaves the graph as bytes, on
a GPU after its resize and on the CPU after decoding, and `exact_color.py` does the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastmoco_kernels.cut_views.native import native_library
from fastmoco_pipelines.errors import DecodeError
from fastmoco_pipelines.spec import (
    SECONDS_PER_IMAGE,
    Device,
    EvalSpec,
    ViewSpec,
    each_view,
    require,
    require_views,
)
from fastmoco_pipelines.views.arguments import named_inputs
from fastmoco_pipelines.views.draws import ViewDraws
from fastmoco_pipelines.views.engine import Engine
from fastmoco_pipelines.views.exact_color import exact_color, exact_views
from fastmoco_pipelines.views.graph import central_part, cut_view, decode
from fastmoco_pipelines.views.graph import normalise as normalise_in_graph
from fastmoco_pipelines.views.levels import normalise
from fastmoco_pipelines.views.pillow import PillowEngine, central_parts
from fastmoco_pipelines.views.runtime import has_dali, require_dali

__all__ = ["DecodeError", "EvalPipeline", "ViewPipeline"]


class ViewPipeline:
    """Encoded images and draws in, augmented views out. An image is decoded once for all its views.

    Args:
        views: what is made of each image; a group of n copies is n views.
        batch_size: largest number of images of one batch.
        sub_batch: images of one run of DALI, which bounds what it holds; None: the whole batch. It
            changes no bit.
        threads: DALI worker threads.
        device: where to decode and augment.
        device_id: ordinal of the GPU (0 if not given); ignored on the CPU.
        view_dtype: "float32", normalised, or "uint8": the levels, without the normalisation.
        decode_bytes: largest size of the decoded images, and of the windows that DALI cuts from
            them, of one run that is of more than one image; 0: as usual on the device. It changes
            no bit.
        seconds_per_image: longest time to decode one.

    Raises:
        ValueError: if a size is out of its range, there is no view, or the device or a view's color
            needs DALI, which is not installed.
    """

    def __init__(
        self,
        views: Sequence[ViewSpec],
        *,
        batch_size: int,
        sub_batch: int | None = None,
        threads: int = 2,
        device: Device = "cpu",
        device_id: int | None = None,
        view_dtype: Literal["float32", "uint8"] = "float32",
        decode_bytes: int = 0,
        seconds_per_image: float = SECONDS_PER_IMAGE,
    ) -> None:
        require(
            view_dtype in ("float32", "uint8"), "view_dtype", view_dtype, 'is "float32" or "uint8"'
        )
        require_views(views, "views")
        self.views = each_view(views)
        self._device = device
        self._threads = threads
        self._dtype = torch.uint8 if view_dtype == "uint8" else torch.float32
        self._decoded = any(map(self._cut_here, self.views))
        if self._decoded and native_library() is None:
            warnings.warn(
                "fastmoco was installed without a C compiler: views are cut by plain torch, ten "
                "times as slowly. Install one and fastmoco again, or take --data.view1.color dali "
                "--data.view2.color dali",
                RuntimeWarning,
                stacklevel=2,
            )

        # Without DALI, on a CPU: Pillow decodes, and all views are cut here.
        self._engine: Engine
        _require_device(device)
        limits: dict[str, Any] = {
            "batch_size": batch_size,
            "sub_batch": sub_batch,
            "threads": threads,
            "decode_bytes": decode_bytes,
            "seconds_per_image": seconds_per_image,
        }
        if not has_dali():
            for number, view in enumerate(self.views, start=1):
                otherwise = f"cut the view from decoded images: --data.view{number}.color exact"
                if not self._cut_here(view):
                    require_dali(f"view{number}.color", view.color, otherwise)
            self._engine = PillowEngine(**limits)
            return

        def graph() -> Any:
            images = decode(device)
            # On a GPU DALI would round the normalisation otherwise than on a CPU: there `normalise`
            # does it.
            as_levels = view_dtype == "uint8" or device == "gpu"
            cut = [
                cut_view(images, view, device, _prefix(number), as_levels=as_levels)
                for number, view in enumerate(self.views, start=1)
                if not self._cut_here(view)
            ]
            return tuple([images, *cut] if self._decoded else cut)

        self._engine = Engine(graph, device=device, device_id=device_id, **limits)

    @property
    def augment_seconds(self) -> float:
        """Seconds of the last run after DALI: making exact views, or taking over the views of
        DALI."""
        return self._engine.finish_seconds

    def _cut_here(self, view: ViewSpec) -> bool:
        """Whether a view is cut from the decoded images, outside of DALI."""
        return view.color == "exact" and self._device == "cpu"

    def run(
        self,
        encoded: Sequence[NDArray[np.uint8]],
        draws: Sequence[ViewDraws],
        *,
        before_output: Callable[[], None] | None = None,
        finishing: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> tuple[Tensor, ...]:
        """Make all views of a batch.

        Args:
            encoded: B arrays [bytes] uint8, each one whole image file; 1 <= B <= batch_size.
            draws: of each view, in the order of the views (`draw_batch`): B rows in the order of
                `encoded`.
            before_output: called once before memory is taken for the views.
            finishing: makes the contexts of the work that `augment_seconds` counts.

        Returns:
            A tensor [B, 3, size, size] for each view, of the size of the view: float32 normalised
            or uint8 levels, on the pipeline's device. They own their memory: later runs do not
            touch them.

        Raises:
            DecodeError: if DALI cannot decode an image. The next run works again.
            ValueError: if the number of images and draws disagree or the batch is empty or too
                large.
        """
        rule = f"needs one for each of {len(self.views)} views"
        require(len(draws) == len(self.views), "draws", len(draws), rule)
        rule = f"needs one row for each of {len(encoded)} images"
        for number, some in enumerate(draws, start=1):
            require(len(some) == len(encoded), f"draws of view {number}", len(some), rule)
        drawn = list(zip(self.views, draws, strict=True))

        def inputs(rows: slice) -> dict[str, NDArray[Any]]:
            named: dict[str, NDArray[Any]] = {}
            for number, (view, some) in enumerate(drawn, start=1):
                if not self._cut_here(view):
                    named |= named_inputs(some.rows(rows), view, _prefix(number))
            return named

        def finish(outputs: Sequence[Any], rows: slice) -> list[Tensor]:
            made = iter(outputs[1:] if self._decoded else outputs)
            count = rows.stop - rows.start if self._decoded else 0
            decoded = [outputs[0][row] for row in range(count)]
            return [
                exact_views(decoded, view, some.rows(rows), self._threads, dtype=self._dtype)
                if self._cut_here(view)
                else self._finish(next(made), view, some.rows(rows))
                for view, some in drawn
            ]

        beside: NDArray[np.int64] | None = None
        for view, some in drawn:
            if not self._cut_here(view):  # DALI cuts the window into memory of its own
                window = 3 * np.prod(some.crop[:, 2:], axis=1, dtype=np.int64)
                beside = window if beside is None else beside + window
        return tuple(self._engine.run(encoded, inputs, finish, before_output, beside, finishing))

    def _finish(self, output: Any, view: ViewSpec, draws: ViewDraws) -> Tensor:
        """One output of DALI's graph that is a view, or a view before its color operations."""
        tensor = from_dlpack(output.as_tensor())
        if view.color == "exact":
            return exact_color(tensor, view, draws, dtype=self._dtype)
        return _owned(tensor) if tensor.dtype == self._dtype else normalise(tensor, view)


def _require_device(device: Device) -> None:
    """Refuse a GPU without DALI."""
    if device == "gpu":
        require_dali("data.device", device, "decode on the CPU: --data.device cpu")


def _prefix(number: int) -> str:
    """Of the names of a view's inputs to DALI's graph."""
    return f"view{number}_"


def _owned(tensor: Tensor) -> Tensor:
    """DALI's memory on a CPU is the tensor's own already."""
    return tensor.clone() if tensor.is_cuda else tensor


class EvalPipeline:
    """Encoded images in, one plain view out: shorter side to `spec.resize`, central crop,
    normalise.

    The work and memory of an image grow with its own size alone, whatever its shape.

    Args:
        spec: sizes and normalisation.
        batch_size: largest number of images of one run.
        threads: DALI worker threads.
        device: where to decode and resize.
        device_id: ordinal of the GPU (0 if not given); ignored on the CPU.
        decode_bytes: as of `Engine`.

    Raises:
        ValueError: for a GPU without DALI.
    """

    def __init__(
        self,
        spec: EvalSpec,
        *,
        batch_size: int,
        threads: int = 2,
        device: Device = "cpu",
        device_id: int | None = None,
        decode_bytes: int = 0,
    ) -> None:
        _require_device(device)
        self._spec = spec
        self._engine: Engine
        self._by_dali = has_dali()
        if not self._by_dali:
            sub_batch = min(batch_size, 4 * threads)  # decoded images are large
            self._engine = PillowEngine(
                batch_size=batch_size,
                sub_batch=sub_batch,
                threads=threads,
                decode_bytes=decode_bytes,
            )
            return

        def graph() -> Any:
            return normalise_in_graph(central_part(decode(device), spec), spec)

        self._engine = Engine(
            graph,
            batch_size=batch_size,
            threads=threads,
            device=device,
            device_id=device_id,
            decode_bytes=decode_bytes,
        )

    def run(self, encoded: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Return [B, 3, size, size] float32, normalised, owning its memory, for 1 <= B <=
        batch_size images.

        Raises:
            DecodeError: if DALI cannot decode an image. The next run works again.
            ValueError: if the batch is empty or too large.
        """

        def finish(outputs: Sequence[Any], _: slice) -> list[Tensor]:
            if self._by_dali:
                return [_owned(from_dlpack(outputs[0].as_tensor()))]
            return [central_parts(outputs[0], self._spec)]

        return self._engine.run(encoded, lambda _: {}, finish)[0]
