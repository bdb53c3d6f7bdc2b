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

import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastmoco_kernels.cut_views.native import native_library
from fastmoco_pipelines.arguments import named_inputs
from fastmoco_pipelines.dali_graph import Device, central_part, cut_view, decode, normalise
from fastmoco_pipelines.draws import ViewDraws
from fastmoco_pipelines.exact_color import exact_color, exact_views
from fastmoco_pipelines.images import structure_fault
from fastmoco_pipelines.spec import EvalSpec, ViewSpec, require

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

Finish = Callable[[Sequence[Any]], list[Tensor]]
"""What makes tensors of all outputs of a run of DALI, on their device: reads them, returns memory of its own."""


class DecodeError(RuntimeError):
    """A batch could not be made: as a rule one of its images cannot be decoded. The pipeline stays usable.

    Attributes:
        faults: (row, reason) of every image refused for its structure; empty where DALI failed without naming one.
    """

    def __init__(self, message: str, faults: tuple[tuple[int, str], ...] = ()) -> None:
        super().__init__(message)
        self.faults = faults


class _Engine:
    """A DALI pipeline that is built when first needed, and again after an error (DALI voids it then)."""

    def __init__(
        self, graph: Callable[[], Any], *, batch_size: int, threads: int, device: Device, device_id: int | None
    ) -> None:
        require(batch_size >= 1, "batch_size", batch_size, "needs at least one image")
        require(threads >= 1, "threads", threads, "needs at least one thread")
        require(device in ("cpu", "gpu"), "device", device, 'is "cpu" or "gpu"')
        # DALI would keep buffers of 32 MiB and more for ever. Read when it first allocates; a user's own setting stays.
        os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", "0")
        self.batch_size = batch_size
        self.finish_seconds = 0.0
        self._graph = graph
        self._on_gpu = device == "gpu"
        self._device_id = device_id or 0
        self._options = {
            "batch_size": batch_size,
            "num_threads": threads,
            "device_id": self._device_id if self._on_gpu else None,
            # One run is one batch: the loader's own queue prefetches.
            "prefetch_queue_depth": 1,
            "enable_conditionals": True,
        }
        self._pipeline: Pipeline | None = None
        self._stream: torch.cuda.Stream | None = None

    def run(
        self, encoded: Sequence[NDArray[np.uint8]], inputs: dict[str, NDArray[Any]], finish: Finish
    ) -> list[Tensor]:
        """Run one batch, and its outputs through ``finish``; every tensor returned owns its memory."""
        require(1 <= len(encoded) <= self.batch_size, "encoded", len(encoded), f"holds 1 to {self.batch_size} images")
        faults = tuple((row, fault) for row, image in enumerate(encoded) if (fault := structure_fault(image.tobytes())))
        if faults:
            row, fault = faults[0]
            raise DecodeError(f"{len(faults)} of {len(encoded)} images cannot be decoded; image {row}: {fault}", faults)
        if self._pipeline is None:
            self._pipeline = self._build()
        pipeline = self._pipeline
        try:
            pipeline.feed_input("encoded", list(encoded))
            for name, value in inputs.items():
                pipeline.feed_input(name, value)
            outputs = pipeline.run()
        except Exception as error:  # DALI raises several types; whichever it was, its pipeline is void now
            self._pipeline = None
            raise DecodeError(f"DALI could not make the views of a batch of {len(encoded)}: {error}") from error
        start = time.perf_counter()
        try:
            return self._finished(outputs, finish) if self._on_gpu else finish(outputs)
        finally:
            self.finish_seconds = time.perf_counter() - start

    def _finished(self, outputs: Sequence[Any], finish: Finish) -> list[Tensor]:
        """DALI's GPU outputs, finished: it takes a buffer back when Python drops it, though kernels may still read it.

        On a stream of their own, complete on return: on the trainer's they would wait for all that is queued there.
        """
        device = torch.device("cuda", self._device_id)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            tensors = finish(outputs)
        self._stream.synchronize()
        for tensor in tensors:
            # This memory belongs to the side stream: when the trainer drops it, it may be given out again only after
            # the kernels that the default stream holds by then. Who reads it on a third stream has to record that too.
            tensor.record_stream(torch.cuda.default_stream(device))
        return tensors

    def _build(self) -> Pipeline:
        from nvidia.dali import pipeline_def

        pipeline: Pipeline = pipeline_def(self._graph, **self._options)()
        pipeline.build()
        return pipeline


class ViewPipeline:
    """Encoded images and draws in, two augmented views out.

    Args:
        view1: the first view.
        view2: the second view.
        batch_size: largest number of images of one run.
        threads: DALI worker threads.
        device: where to decode and augment.
        device_id: ordinal of the GPU (0 if not given); ignored on the CPU.

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
        threads: int = 2,
        device: Device = "cpu",
        device_id: int | None = None,
    ) -> None:
        self.view1, self.view2 = view1, view2
        self._device, self._threads = device, threads
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
            views = [cut_view(images, view, device, prefix) for view, prefix in named if not self._cut_here(view)]
            return tuple([images, *views] if self._decoded else views)

        self._engine = _Engine(graph, batch_size=batch_size, threads=threads, device=device, device_id=device_id)

    @property
    def augment_seconds(self) -> float:
        """Seconds of the last run behind DALI: cutting and colouring exact views, or taking over what DALI made."""
        return self._engine.finish_seconds

    def _cut_here(self, view: ViewSpec) -> bool:
        """Whether a view is cut from the decoded images, outside of DALI."""
        return view.color == "exact" and self._device == "cpu"

    def run(self, encoded: Sequence[NDArray[np.uint8]], draws1: ViewDraws, draws2: ViewDraws) -> tuple[Tensor, Tensor]:
        """Make both views of a batch.

        Args:
            encoded: B arrays [bytes] uint8, each one whole image file; 1 <= B <= batch_size.
            draws1: draws of the first view, B rows in the order of ``encoded``.
            draws2: draws of the second view.

        Returns:
            Two tensors [B, 3, size, size] float32, normalised, on the pipeline's device. They own their memory: later
            runs do not touch them.

        Raises:
            DecodeError: if DALI cannot decode an image. The next run works again.
            ValueError: if the number of images and draws disagree or the batch is empty or too large.
        """
        for name, draws in (("draws1", draws1), ("draws2", draws2)):
            require(len(draws) == len(encoded), name, len(draws), f"needs one row for each of {len(encoded)} images")
        views = ((self.view1, draws1, "view1_"), (self.view2, draws2, "view2_"))
        inputs: dict[str, NDArray[Any]] = {}
        for view, draws, prefix in views:
            inputs |= {} if self._cut_here(view) else named_inputs(draws, view, prefix)

        def finish(outputs: Sequence[Any]) -> list[Tensor]:
            made = iter(outputs[1:] if self._decoded else outputs)
            return [
                exact_views(outputs[0], view, draws, self._threads)
                if self._cut_here(view)
                else self._finish(next(made), view, draws)
                for view, draws, _ in views
            ]

        first, second = self._engine.run(encoded, inputs, finish)
        return first, second

    def _finish(self, output: Any, view: ViewSpec, draws: ViewDraws) -> Tensor:
        """One output of DALI's graph that is a view, or one without its colours."""
        tensor = from_dlpack(output.as_tensor())
        if view.color == "exact":
            return exact_color(tensor, view, draws)
        return _owned(tensor)


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
            return normalise(central_part(decode(device), spec), spec)

        self._engine = _Engine(graph, batch_size=batch_size, threads=threads, device=device, device_id=device_id)

    def run(self, encoded: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Return [B, 3, size, size] float32, normalised, owning its memory, for 1 <= B <= batch_size images.

        Raises:
            DecodeError: if DALI cannot decode an image. The next run works again.
            ValueError: if the batch is empty or too large.
        """
        return self._engine.run(encoded, {}, lambda outputs: [_owned(from_dlpack(outputs[0].as_tensor()))])[0]
