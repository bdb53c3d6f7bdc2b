"""The views in PIL semantics, one image at a time: the oracle that the fast path is measured
against.

The operations are the ones torchvision's PIL backend uses, written with Pillow alone. Every
function takes and returns an RGB image of 8 bits a channel, so that rounding and clipping happen
after each of them, as they do there.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from fastmoco_pipelines.spec import EvalSpec, ViewSpec
from fastmoco_pipelines.views.draws import ViewDraws

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
"""Pillow's filters by `ViewSpec.interpolation`."""


def crop_and_resize(
    image: Image.Image,
    crop: tuple[int, int, int, int],
    size: int,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
    *,
    base_size: int = 0,
    corner: tuple[int, int] = (0, 0),
) -> Image.Image:
    """Cut (top, left, height, width) and scale it to `size` x `size` with antialiasing; with
    `base_size` scale it to that, and cut `size` x `size` at `corner` (top, left) from it.

    Along the rows first, as Pillow does by itself up to version 12. Version 13 takes the other
    order for some windows taller than wide and than `size`. There a bilinear level may differ by
    one, and a bicubic one by more at edges between 0 and 255, where it is cut to a byte in between.
    """
    top, left, height, width = crop
    window = image.crop((left, top, left + width, top + height))
    side = base_size or size
    narrow = window.resize((side, height), FILTERS[interpolation])
    resized = narrow.resize((side, side), FILTERS[interpolation])
    if not base_size:
        return resized
    top, left = corner
    return resized.crop((left, top, left + size, top + size))


def adjust_brightness(image: Image.Image, factor: float) -> Image.Image:
    """Multiply every level by `factor`."""
    return ImageEnhance.Brightness(image).enhance(factor)


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Move every level away from the image's grey mean by `factor`."""
    return ImageEnhance.Contrast(image).enhance(factor)


def adjust_saturation(image: Image.Image, factor: float) -> Image.Image:
    """Move every pixel away from its own grey by `factor`."""
    return ImageEnhance.Color(image).enhance(factor)


def adjust_hue(image: Image.Image, turns: float) -> Image.Image:
    """Shift the hue byte of HSV by `turns` of a full turn, cut (not rounded) to 1/255 of it."""
    hue, saturation, value = image.convert("HSV").split()
    shift = int(np.trunc(turns * 255)) % 256
    turned = ((np.asarray(hue).astype(np.int64) + shift) % 256).astype(np.uint8)
    return Image.merge("HSV", (Image.fromarray(turned), saturation, value)).convert("RGB")


def to_grayscale(image: Image.Image) -> Image.Image:
    """Replace the three channels by the ITU-R 601 luma."""
    return image.convert("L").convert("RGB")


def gaussian_blur(image: Image.Image, sigma: float) -> Image.Image:
    """Blur with standard deviation `sigma` pixels (Pillow approximates the Gaussian by box
    filters)."""
    return image.filter(ImageFilter.GaussianBlur(radius=sigma))


def solarize(image: Image.Image, threshold: int = 128) -> Image.Image:
    """Invert the levels at or above `threshold`."""
    return ImageOps.solarize(image, threshold)


def flip_horizontally(image: Image.Image) -> Image.Image:
    """Mirror left and right."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def normalise(image: Image.Image, spec: ViewSpec | EvalSpec) -> NDArray[np.float32]:
    """[3, H, W] float32, (level / 255 - mean) / std."""
    levels = np.asarray(image, dtype=np.float32) / 255
    scaled = (levels - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1), dtype=np.float32)


def reference_image(
    image: Image.Image | NDArray[np.uint8], spec: ViewSpec, draws: ViewDraws, i: int
) -> Image.Image:
    """Row `i`'s view before normalisation, as an RGB image; the operations in the order of
    `ViewSpec`, the four of the jitter in the row's own where `spec.color` is "exact"."""
    source = image if isinstance(image, Image.Image) else Image.fromarray(image)
    top, left, height, width = (int(value) for value in draws.crop[i])
    from_top, from_left = (int(value) for value in draws.corner[i])
    view = crop_and_resize(
        source.convert("RGB"),
        (top, left, height, width),
        spec.size,
        spec.interpolation,
        base_size=spec.base_size,
        corner=(from_top, from_left),
    )
    for operation in draws.jitter_order[i].tolist() if spec.color == "exact" else range(4):
        view = _jitter(view, operation, draws, i)
    if draws.grayscale[i]:
        view = to_grayscale(view)
    if draws.blur_sigma[i] > 0:
        view = gaussian_blur(view, float(draws.blur_sigma[i]))
    if draws.solarize[i]:
        view = solarize(view, spec.solarize_threshold)
    return flip_horizontally(view) if draws.flip[i] else view


def _jitter(view: Image.Image, operation: int, draws: ViewDraws, i: int) -> Image.Image:
    """One of 0 brightness, 1 contrast, 2 saturation, 3 hue; left out where its draw changes
    nothing."""
    if operation == 0 and draws.brightness[i] != 1:
        return adjust_brightness(view, float(draws.brightness[i]))
    if operation == 1 and draws.contrast[i] != 1:
        return adjust_contrast(view, float(draws.contrast[i]))
    if operation == 2 and draws.saturation[i] != 1:
        return adjust_saturation(view, float(draws.saturation[i]))
    if operation == 3 and draws.hue[i] != 0:
        return adjust_hue(view, float(draws.hue[i]))
    return view


def reference_view(
    image: Image.Image | NDArray[np.uint8], spec: ViewSpec, draws: ViewDraws, i: int
) -> NDArray[np.float32]:
    """Make one view of one image.

    Args:
        image: the decoded image; an array is uint8 [H, W, 3].
        spec: what the view is.
        draws: what was drawn, as for the fast path.
        i: the row of `draws` to use.

    Returns:
        [3, size, size] float32, normalised.
    """
    return normalise(reference_image(image, spec, draws, i), spec)


def reference_eval(image: Image.Image | NDArray[np.uint8], spec: EvalSpec) -> NDArray[np.float32]:
    """Shorter side to `spec.resize` (the longer one cut to whole pixels, as torchvision does),
    central crop of `spec.size`, normalise: [3, size, size] float32."""
    source = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
    shorter = min(source.size)
    width, height = (spec.resize * side // shorter for side in source.size)
    resized = source.resize((width, height), Image.Resampling.BILINEAR)
    left, top = (width - spec.size) // 2, (height - spec.size) // 2
    return normalise(resized.crop((left, top, left + spec.size, top + spec.size)), spec)
