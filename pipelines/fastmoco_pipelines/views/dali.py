"""The engine: NVIDIA DALI decodes each image once and cuts its views, on the GPU or on the CPU, by one graph.

DALI draws nothing here. Crop windows, flips, strengths and sigmas arrive per sample (:mod:`.draws`), so a batch is a
function of its bytes and its draws, and the state of the data is the step number. What differs from the PIL semantics
of :mod:`.reference`, and by how much, is written down in docs/views.md and held by tests.

Colour stays uint8 between operations, because PIL rounds and clips there. An operation that a :class:`ViewSpec` never
applies is not in the graph; one that touches only a share of the images (blur, solarize) runs on that share alone.
A view with ``color="exact"`` leaves the graph as bytes, on a GPU after its resize and on the CPU after decoding, and
:mod:`.exact_color` does the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastmoco_kernels.cut_views.native import native_library
from fastmoco_pipelines.errors import DecodeError
from fastmoco_pipelines.spec import Device, EvalSpec, ViewSpec, require
from fastmoco_pipelines.views.arguments import named_inputs
from fastmoco_pipelines.views.draws import ViewDraws
from fastmoco_pipelines.views.engine import Engine
from fastmoco_pipelines.views.exact_color import exact_color, exact_views
from fastmoco_pipelines.views.graph import central_part, cut_view, decode
from fastmoco_pipelines.views.graph import normalise as normalise_in_graph
from fastmoco_pipelines.views.levels import normalise

__all__ = ["DecodeError", "EvalPipeline", "ViewPipeline"]


class ViewPipeline:
    """Encoded images and draws in, two augmented views out.

    Args:
        view1: the first view.
        view2: the second view.
        batch_size: largest number of images of one batch.
        sub_batch: images of one run of DALI, which bounds what it holds; None: the whole batch. It changes no bit.
        threads: DALI worker threads.
        device: where to decode and augment.
        device_id: ordinal of the GPU (0 if not given); ignored on the CPU.
        view_dtype: "float32", normalised, or "uint8": the levels, without the normalisation.

    Raises:
        ValueError: if a size is out of its range.
        ModuleNotFoundError: at the first run, if DALI is not installed.
    """

    def __init__(
        self,
        view1: ViewSpec,
        view2: ViewSpec,
        *,
        batch_size: int,
        sub_batch: int | None = None,
        threads: int = 2,
        device: Device = "cpu",
        device_id: int | None = None,
        view_dtype: Literal["float32", "uint8"] = "float32",
    ) -> None:
        require(view_dtype in ("float32", "uint8"), "view_dtype", view_dtype, 'is "float32" or "uint8"')
        self.view1, self.view2 = view1, view2
        self._device, self._threads = device, threads
        self._dtype = torch.uint8 if view_dtype == "uint8" else torch.float32
        self._decoded = any(map(self._cut_here, (view1, view2)))
        if self._decoded and native_library() is None:
            warnings.warn(
                "fastmoco was installed without a C compiler: views are cut by plain torch, ten times as slowly. Install one and "
                "fastmoco again, or take --data.view1.color dali --data.view2.color dali",
                RuntimeWarning,
                stacklevel=2,
            )

        def graph() -> Any:
            images = decode(device)
            named = ((view1, "view1_"), (view2, "view2_"))
            # On a GPU DALI would round the normalisation otherwise than on a CPU: there `normalise` does it.
            as_levels = view_dtype == "uint8" or device == "gpu"
            views = [
                cut_view(images, view, device, prefix, as_levels=as_levels)
                for view, prefix in named
                if not self._cut_here(view)
            ]
            return tuple([images, *views] if self._decoded else views)

        self._engine = Engine(
            graph,
            batch_size=batch_size,
            sub_batch=sub_batch,
            threads=threads,
            device=device,
            device_id=device_id,
        )

    @property
    def augment_seconds(self) -> float:
        """Seconds of the last run behind DALI: cutting and colouring exact views, or taking over what DALI made."""
        return self._engine.finish_seconds

    def _cut_here(self, view: ViewSpec) -> bool:
        """Whether a view is cut from the decoded images, outside of DALI."""
        return view.color == "exact" and self._device == "cpu"

    def run(
        self,
        encoded: Sequence[NDArray[np.uint8]],
        draws1: ViewDraws,
        draws2: ViewDraws,
        *,
        before_output: Callable[[], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Make both views of a batch.

        Args:
            encoded: B arrays [bytes] uint8, each one whole image file; 1 <= B <= batch_size.
            draws1: draws of the first view, B rows in the order of ``encoded``.
            draws2: draws of the second view.
            before_output: called once before memory is taken for the views.

        Returns:
            Two tensors [B, 3, size, size], float32 normalised or uint8 levels, on the pipeline's device. They own their
            memory: later runs do not touch them.

        Raises:
            DecodeError: if DALI cannot decode an image. The next run works again.
            ValueError: if the number of images and draws disagree or the batch is empty or too large.
        """
        for name, draws in (("draws1", draws1), ("draws2", draws2)):
            require(len(draws) == len(encoded), name, len(draws), f"needs one row for each of {len(encoded)} images")
        views = ((self.view1, draws1, "view1_"), (self.view2, draws2, "view2_"))

        def inputs(rows: slice) -> dict[str, NDArray[Any]]:
            named: dict[str, NDArray[Any]] = {}
            for view, draws, prefix in views:
                named |= {} if self._cut_here(view) else named_inputs(draws.rows(rows), view, prefix)
            return named

        def finish(outputs: Sequence[Any], rows: slice) -> list[Tensor]:
            made = iter(outputs[1:] if self._decoded else outputs)
            return [
                exact_views(outputs[0], view, draws.rows(rows), self._threads, dtype=self._dtype)
                if self._cut_here(view)
                else self._finish(next(made), view, draws.rows(rows))
                for view, draws, _ in views
            ]

        first, second = self._engine.run(encoded, inputs, finish, before_output)
        return first, second

    def _finish(self, output: Any, view: ViewSpec, draws: ViewDraws) -> Tensor:
        """One output of DALI's graph that is a view, or one without its colours."""
        tensor = from_dlpack(output.as_tensor())
        if view.color == "exact":
            return exact_color(tensor, view, draws, dtype=self._dtype)
        return _owned(tensor) if tensor.dtype == self._dtype else normalise(tensor, view)


def _owned(tensor: Tensor) -> Tensor:
    """DALI's memory on a CPU is the tensor's own already."""
    return tensor.clone() if tensor.is_cuda else tensor


class EvalPipeline:
    """Encoded images in, one plain view out: shorter side to ``spec.resize``, central crop, normalise.

    The work and memory of an image grow with its own size alone, whatever its shape.

    Args:
        spec: sizes and normalisation.
        batch_size: largest number of images of one run.
        threads: DALI worker threads.
        device: where to decode and resize.
        device_id: ordinal of the GPU (0 if not given); ignored on the CPU.
    """

    def __init__(
        self, spec: EvalSpec, *, batch_size: int, threads: int = 2, device: Device = "cpu", device_id: int | None = None
    ) -> None:
        def graph() -> Any:
            return normalise_in_graph(central_part(decode(device), spec), spec)

        self._engine = Engine(graph, batch_size=batch_size, threads=threads, device=device, device_id=device_id)

    def run(self, encoded: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Return [B, 3, size, size] float32, normalised, owning its memory, for 1 <= B <= batch_size images.

        Raises:
            DecodeError: if DALI cannot decode an image. The next run works again.
            ValueError: if the batch is empty or too large.
        """
        return self._engine.run(
            encoded, lambda _: {}, lambda outputs, _: [_owned(from_dlpack(outputs[0].as_tensor()))]
        )[0]
