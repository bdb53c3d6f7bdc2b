"""The engine: NVIDIA DALI decodes each image once and cuts its views, on the GPU or on the CPU, by one graph.

DALI draws nothing here. Crop windows, flips, strengths and sigmas arrive per sample (:mod:`.draws`), so a batch is a
function of its bytes and its draws, and the state of the data is the step number. What differs from the PIL semantics
of :mod:`.reference`, and by how much, is written down in docs/views.md and held by tests.

Colour stays uint8 between operations, because PIL rounds and clips there. An operation that a :class:`ViewSpec` never
applies is not in the graph; one that touches only a share of the images (blur, solarize) runs on that share alone.
A view with ``color="exact"`` leaves the graph after its resize, as bytes, and :mod:`.exact_color` does the rest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from fastmoco_pipelines.arguments import TRUNCATION, named_inputs, operations
from fastmoco_pipelines.draws import ViewDraws
from fastmoco_pipelines.exact_color import exact_finish
from fastmoco_pipelines.images import structure_fault
from fastmoco_pipelines.spec import EvalSpec, ViewSpec, require

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

Device = Literal["cpu", "gpu"]
Finish = Callable[[Tensor], Tensor]
"""What is still done to an output of DALI, on its device: reads it, returns memory of its own."""


class DecodeError(RuntimeError):
    """A batch could not be made: as a rule one of its images cannot be decoded. The pipeline stays usable.

    Attributes:
        faults: (row, reason) of every image refused for its structure; empty where DALI failed without naming one.
    """

    def __init__(self, message: str, faults: tuple[tuple[int, str], ...] = ()) -> None:
        super().__init__(message)
        self.faults = faults


def _decode(device: Device) -> Any:
    """Encoded bytes to uint8 RGB HWC. EXIF orientation is not applied: torchvision's ImageFolder does not either."""
    from nvidia.dali import fn, types

    encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8, no_copy=True)
    decoder = "mixed" if device == "gpu" else "cpu"
    return fn.decoders.image(encoded, device=decoder, output_type=types.RGB, adjust_orientation=False)


def _normalise(images: Any, spec: ViewSpec | EvalSpec, **more: Any) -> Any:
    """uint8 HWC to float32 CHW, (x / 255 - mean) / std."""
    from nvidia.dali import fn, types

    mean, std = [255 * m for m in spec.mean], [255 * s for s in spec.std]
    return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std, **more)


def _cut_view(images: Any, spec: ViewSpec, device: Device, prefix: str) -> Any:
    """One view of the decoded images, operations in the order of :class:`ViewSpec`; with exact colours only resized."""
    from nvidia.dali import fn, types

    def argument(name: str, dtype: Any = types.FLOAT, ndim: int = 0) -> Any:
        return fn.external_source(name=prefix + name, ndim=ndim, dtype=dtype)

    # Cut first: a resize with a region of interest would read pixels from outside the window at its border.
    window = fn.slice(
        images, start=argument("start", types.INT32, 1), shape=argument("shape", types.INT32, 1), axes=(0, 1)
    )
    view = fn.resize(window, size=(spec.size, spec.size), antialias=True)
    if spec.color == "exact":
        return view
    uses = operations(spec)
    if "brightness" in uses:
        view = fn.brightness_contrast(view, brightness=argument("brightness"), brightness_shift=TRUNCATION / 255)
    if "contrast" in uses:
        grey = fn.color_space_conversion(view, image_type=types.RGB, output_type=types.GRAY)
        grey_mean = fn.reductions.mean(grey)
        if device == "gpu":
            grey_mean = grey_mean.cpu()  # DALI takes named arguments from the host
        view = fn.brightness_contrast(
            view, contrast=argument("contrast"), contrast_center=grey_mean, brightness_shift=TRUNCATION / 255
        )
    if "colour" in uses:
        view = fn.coord_transform(
            view, M=argument("colour", ndim=2), T=argument("colour_shift", ndim=1), dtype=types.UINT8
        )
    if "blur" in uses:
        view = _blur_some(view, argument)
    if "solarize" in uses:
        view = _solarize_some(view, spec.solarize_threshold, argument)
    mirror = argument("flip", types.INT32) if "flip" in uses else 0
    return _normalise(view, spec, mirror=mirror)


def _central_part(images: Any, spec: EvalSpec) -> Any:
    """The central square of ``spec.size`` of the image whose shorter side was resized to ``spec.resize``.

    Only that square is computed: of an image of 16384 x 1 pixels the whole resized one would take 3 GiB.
    """
    from nvidia.dali import fn, math, types

    extent = fn.cast(images.shape(), dtype=types.FLOAT)[0:2]
    resized = math.floor(extent * spec.resize / fn.reductions.min(extent) + 0.5)
    start = math.floor((resized - spec.size) / 2)
    ends = {"roi_start": start / resized, "roi_end": (start + spec.size) / resized}
    # Unlike a slice, a region of interest is filtered with the pixels around it, as a crop after the resize is.
    return fn.resize(images, size=(spec.size, spec.size), roi_relative=True, antialias=True, **ends)


def _blur_some(view: Any, argument: Callable[..., Any]) -> Any:
    from nvidia.dali import fn, types

    if argument("blur", types.BOOL):  # DALI turns this into a split of the batch: the others pass by untouched
        view = fn.gaussian_blur(view, sigma=argument("blur_sigma"), window_size=argument("blur_window", types.INT32))
    return view


def _solarize_some(view: Any, threshold: int, argument: Callable[..., Any]) -> Any:
    from nvidia.dali import types

    if argument("solarize", types.BOOL):
        view = view ^ ((view >= types.Constant(threshold, dtype=types.UINT8)) * types.Constant(255, dtype=types.UINT8))
    return view


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
        self, encoded: Sequence[NDArray[np.uint8]], inputs: dict[str, NDArray[Any]], *finishes: Finish | None
    ) -> list[Tensor]:
        """Run one batch, and each output through its finish; every tensor returned owns its memory."""
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
        if self._on_gpu:
            return self._copied(outputs, finishes)
        tensors = [from_dlpack(output.as_tensor()) for output in outputs]
        return [finish(tensor) if finish else tensor for tensor, finish in zip(tensors, finishes, strict=True)]

    def _copied(self, outputs: Sequence[Any], finishes: Sequence[Finish | None]) -> list[Tensor]:
        """DALI's GPU outputs, finished or copied: it takes a buffer back when Python drops it, though kernels may read it.

        Both on a stream of their own, complete on return: on the trainer's they would wait for all that is queued there.
        """
        device = torch.device("cuda", self._device_id)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            tensors = [
                (finish or torch.clone)(from_dlpack(output.as_tensor()))
                for output, finish in zip(outputs, finishes, strict=True)
            ]
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

        def graph() -> Any:
            images = _decode(device)
            return _cut_view(images, view1, device, "view1_"), _cut_view(images, view2, device, "view2_")

        self._engine = _Engine(graph, batch_size=batch_size, threads=threads, device=device, device_id=device_id)

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
        inputs = named_inputs(draws1, self.view1, "view1_") | named_inputs(draws2, self.view2, "view2_")
        finishes = (exact_finish(self.view1, draws1), exact_finish(self.view2, draws2))
        view1, view2 = self._engine.run(encoded, inputs, *finishes)
        return view1, view2


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
            return _normalise(_central_part(_decode(device), spec), spec)

        self._engine = _Engine(graph, batch_size=batch_size, threads=threads, device=device, device_id=device_id)

    def run(self, encoded: Sequence[NDArray[np.uint8]]) -> Tensor:
        """Return [B, 3, size, size] float32, normalised, owning its memory, for 1 <= B <= batch_size images.

        Raises:
            DecodeError: if DALI cannot decode an image. The next run works again.
            ValueError: if the batch is empty or too large.
        """
        return self._engine.run(encoded, {}, None)[0]
