"""A view by PIL's operations: torchvision's transforms where it can be imported, Pillow otherwise.

Both compute the same levels: torchvision's functions call Pillow for a PIL image.
"""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import Tensor

from fastmoco_pipelines.spec import ViewSpec
from fastmoco_pipelines.views.draws import ViewDraws


class PillowOperations:
    """The functions of torchvision that a view of MoCo v3 needs, for PIL images."""

    name = "Pillow"

    def resized_crop(
        self, image: Image.Image, top: int, left: int, height: int, width: int, size: list[int]
    ) -> Image.Image:
        """Cut a window and scale it, bilinear."""
        window = image.crop((left, top, left + width, top + height))
        return window.resize((size[1], size[0]), Image.Resampling.BILINEAR)

    def adjust_brightness(self, image: Image.Image, factor: float) -> Image.Image:
        """Multiply the levels."""
        return ImageEnhance.Brightness(image).enhance(factor)

    def adjust_contrast(self, image: Image.Image, factor: float) -> Image.Image:
        """Move the levels from the grey mean of the image."""
        return ImageEnhance.Contrast(image).enhance(factor)

    def adjust_saturation(self, image: Image.Image, factor: float) -> Image.Image:
        """Move the levels from the grey of the pixel."""
        return ImageEnhance.Color(image).enhance(factor)

    def adjust_hue(self, image: Image.Image, turns: float) -> Image.Image:
        """Shift the hue; its byte wraps around."""
        hue, saturation, value = image.convert("HSV").split()
        levels = np.array(hue, dtype=np.uint8)
        levels += np.int32(turns * 255).astype(np.uint8)
        merged = Image.merge("HSV", (Image.fromarray(levels), saturation, value))
        return merged.convert("RGB")

    def rgb_to_grayscale(self, image: Image.Image, num_output_channels: int) -> Image.Image:
        """Grey in three channels."""
        grey = np.array(image.convert("L"), dtype=np.uint8)
        return Image.fromarray(np.dstack([grey] * num_output_channels))

    def solarize(self, image: Image.Image, threshold: int) -> Image.Image:
        """Invert the levels from a threshold on."""
        return ImageOps.solarize(image, threshold)

    def hflip(self, image: Image.Image) -> Image.Image:
        """Mirror left and right."""
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)

    def to_tensor(self, image: Image.Image) -> Tensor:
        """[3, H, W] float32 in [0, 1]."""
        levels = torch.from_numpy(np.array(image, copy=True))
        return levels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)

    def normalize(self, tensor: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
        """Subtract the mean and divide by the deviation of each channel."""
        means = torch.as_tensor(mean, dtype=tensor.dtype).view(-1, 1, 1)
        return tensor.clone().sub_(means).div_(torch.as_tensor(std).view(-1, 1, 1))


def operations() -> Any:
    """torchvision's functional transforms, or the same in Pillow."""
    if importlib.util.find_spec("torchvision") is not None:
        try:
            from torchvision.transforms import functional
        except (ImportError, RuntimeError, OSError):  # built for another torch
            return PillowOperations()
        return functional
    return PillowOperations()


def library() -> str:
    """Which library makes the views: "torchvision" or "Pillow"."""
    return "Pillow" if isinstance(operations(), PillowOperations) else "torchvision"


OPERATIONS = operations()


class Parameters(NamedTuple):
    """What was drawn for one view of one image, in plain numbers."""

    crop: tuple[int, int, int, int]
    """Top, left, height, width."""
    jitter: tuple[tuple[str, float], ...]
    """Names of color functions and their factors, in the order of application."""
    grayscale: bool
    blur_sigma: float
    """0: no blur."""
    solarize: bool
    flip: bool


JITTER = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")


def parameters(draws: ViewDraws) -> list[Parameters]:
    """The rows of a batch of draws. A color function that changes nothing is left out."""
    factors = np.stack([draws.brightness, draws.contrast, draws.saturation, draws.hue], axis=1)
    idle = (1.0, 1.0, 1.0, 0.0)
    return [
        Parameters(
            tuple(crop), tuple((JITTER[i], own[i]) for i in order if own[i] != idle[i]), *rest
        )
        for crop, order, own, *rest in zip(
            draws.crop.tolist(),
            draws.jitter_order.tolist(),
            factors.tolist(),
            draws.grayscale.tolist(),
            draws.blur_sigma.tolist(),
            draws.solarize.tolist(),
            draws.flip.tolist(),
            strict=True,
        )
    ]


def make_view(image: Image.Image, spec: ViewSpec, drawn: Parameters) -> Tensor:
    """One augmented view: [3, size, size] float32."""
    f = OPERATIONS
    image = f.resized_crop(image, *drawn.crop, [spec.size, spec.size])
    for name, factor in drawn.jitter:
        image = getattr(f, name)(image, factor)
    if drawn.grayscale:
        image = f.rgb_to_grayscale(image, 3)
    if drawn.blur_sigma > 0:
        image = image.filter(ImageFilter.GaussianBlur(radius=drawn.blur_sigma))
    if drawn.solarize:
        image = f.solarize(image, spec.solarize_threshold)
    if drawn.flip:
        image = f.hflip(image)
    tensor: Tensor = f.normalize(f.to_tensor(image), spec.mean, spec.std)
    return tensor
