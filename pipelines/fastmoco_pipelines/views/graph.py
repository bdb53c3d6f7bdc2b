"""The pieces of DALI's graph: decode, cut, color, normalise. What is drawn arrives as inputs, by
name (`arguments.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastmoco_pipelines.spec import Device, EvalSpec, ViewSpec
from fastmoco_pipelines.views.arguments import TRUNCATION, operations

GPU_DECODER = {
    "hw_decoder_load": 1.0,
    "device_memory_padding": 4 << 20,
    "host_memory_padding": 2 << 20,
}
"""Options of the decoder on a GPU.

* All JPEGs that the GPU's JPEG engines can read go to them. With a share below 1 (DALI: 0.65) an
  image's decoder, and so the last bit of its levels, would depend on its neighbours in the batch;
  and the rest would take CPU threads, and processors of the GPU that training needs. DALI's authors
  measured 0.9 as 1.8 % faster in training than 0.65 (NVIDIA/DALI pull request 6366).
* Buffers for each thread, in bytes, for what the engines do not read. They grow where an image
  needs more. DALI's defaults are four times as large: 16 MiB of GPU memory for each of 14 threads
  would be a ninth of what a loader may hold.
"""


def decode(device: Device) -> Any:
    """Encoded bytes to uint8 RGB HWC. EXIF orientation is not applied: torchvision's ImageFolder
    does not either."""
    from nvidia.dali import fn, types

    encoded = fn.external_source(name="encoded", ndim=1, dtype=types.UINT8, no_copy=True)
    options = {"device": "mixed", **GPU_DECODER} if device == "gpu" else {"device": "cpu"}
    return fn.decoders.image(encoded, output_type=types.RGB, adjust_orientation=False, **options)


def normalise(images: Any, spec: ViewSpec | EvalSpec, **more: Any) -> Any:
    """uint8 HWC to float32 CHW, (x / 255 - mean) / std."""
    from nvidia.dali import fn, types

    mean, std = [255 * m for m in spec.mean], [255 * s for s in spec.std]
    return fn.crop_mirror_normalize(
        images, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std, **more
    )


def levels(images: Any, **more: Any) -> Any:
    """uint8 HWC to uint8 CHW."""
    from nvidia.dali import fn, types

    return fn.crop_mirror_normalize(images, dtype=types.UINT8, output_layout="CHW", **more)


def cut_view(
    images: Any, spec: ViewSpec, device: Device, prefix: str, *, as_levels: bool = False
) -> Any:
    """One view of the decoded images, operations in the order of `ViewSpec`; with exact
    color only resized.

    `as_levels` leaves out the normalisation.
    """
    from nvidia.dali import fn, types

    def argument(name: str, dtype: Any = types.FLOAT, ndim: int = 0) -> Any:
        return fn.external_source(name=prefix + name, ndim=ndim, dtype=dtype)

    # Cut first: a resize with a region of interest would read pixels from outside the window at its
    # border.
    window = fn.slice(
        images,
        start=argument("start", types.INT32, 1),
        shape=argument("shape", types.INT32, 1),
        axes=(0, 1),
    )
    cubic = spec.interpolation == "bicubic"
    interpolation = types.INTERP_CUBIC if cubic else types.INTERP_LINEAR
    # The part of the window, resized to `base_size`, that is the view: nothing else is computed.
    ends = {name: argument(name, ndim=1) for name in ("roi_start", "roi_end") if spec.base_size}
    part = {**ends, "roi_relative": True} if ends else {}
    view = fn.resize(
        window, size=(spec.size, spec.size), interp_type=interpolation, antialias=True, **part
    )
    if spec.color == "exact":
        return view
    uses = operations(spec)
    if "brightness" in uses:
        view = fn.brightness_contrast(
            view, brightness=argument("brightness"), brightness_shift=TRUNCATION / 255
        )
    if "contrast" in uses:
        grey = fn.color_space_conversion(view, image_type=types.RGB, output_type=types.GRAY)
        grey_mean = fn.reductions.mean(grey)
        if device == "gpu":
            grey_mean = grey_mean.cpu()  # DALI takes named arguments from the host
        view = fn.brightness_contrast(
            view,
            contrast=argument("contrast"),
            contrast_center=grey_mean,
            brightness_shift=TRUNCATION / 255,
        )
    if "color" in uses:
        view = fn.coord_transform(
            view,
            M=argument("color", ndim=2),
            T=argument("color_shift", ndim=1),
            dtype=types.UINT8,
        )
    if "blur" in uses:
        view = _blur_some(view, argument)
    if "solarize" in uses:
        view = _solarize_some(view, spec.solarize_threshold, argument)
    mirror = argument("flip", types.INT32) if "flip" in uses else 0
    return levels(view, mirror=mirror) if as_levels else normalise(view, spec, mirror=mirror)


def central_part(images: Any, spec: EvalSpec) -> Any:
    """The central square of `spec.size` of the image whose shorter side was resized to
    `spec.resize`.

    Only that square is computed: of an image of 16384 x 1 pixels the whole resized one would take 3
    GiB.
    """
    from nvidia.dali import fn, math, types

    extent = fn.cast(images.shape(), dtype=types.FLOAT)[0:2]
    resized = math.floor(extent * spec.resize / fn.reductions.min(extent))
    start = math.floor((resized - spec.size) / 2)
    ends = {"roi_start": start / resized, "roi_end": (start + spec.size) / resized}
    # Unlike a slice, a region of interest is filtered with the pixels around it, as a crop after
    # the resize is.
    return fn.resize(images, size=(spec.size, spec.size), roi_relative=True, antialias=True, **ends)


def _blur_some(view: Any, argument: Callable[..., Any]) -> Any:
    from nvidia.dali import fn, types

    # DALI turns this into a split of the batch: the others pass by untouched
    if argument("blur", types.BOOL):
        view = fn.gaussian_blur(
            view, sigma=argument("blur_sigma"), window_size=argument("blur_window", types.INT32)
        )
    return view


def _solarize_some(view: Any, threshold: int, argument: Callable[..., Any]) -> Any:
    from nvidia.dali import types

    if argument("solarize", types.BOOL):
        view = view ^ (
            (view >= types.Constant(threshold, dtype=types.UINT8))
            * types.Constant(255, dtype=types.UINT8)
        )
    return view
