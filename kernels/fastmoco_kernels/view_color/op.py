"""The color augmentations of a MoCo v3 view, bit for bit as PIL and torchvision compute them.

One function takes a batch of cropped images with per-image parameters and returns the normalised
views: flip, brightness, contrast, saturation and hue in each image's own order, grayscale, Gaussian
blur, solarize, normalise, cast, layout. Two sweeps over the pixels, and a third after a blur; why
it is exact, and how, is in kernels/README.md, "Design notes".

On the CPU plain torch computes the same, operation by operation in float32 (`reference.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmoco_kernels.backends import choose_backend, require_triton, triton_is_default
from fastmoco_kernels.blur.op import check_sigmas
from fastmoco_kernels.view_color.plan import Plan, ViewColorParameters, plan
from fastmoco_kernels.view_color.reference import view_color_reference

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8)
_LARGEST = 2**31 // (256 * 4)
"""Pixels of an image, so that offsets and sums of one image fit int32."""


def view_color(
    images: Tensor,
    parameters: ViewColorParameters,
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
    solarize_threshold: int = 128,
    channels_last: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Jitter, grayscale, blur, solarize and normalise every image by its own parameters.

    `(level / 255 - mean) / std` of the levels that torchvision's PIL transforms give for the same
    parameters: the augmentation of Chen, Xie, He 2021 (MoCo v3). With `dtype=torch.uint8` those
    levels themselves.

    Args:
        images: [B, H, W, 3] uint8 RGB, any stride, CPU or CUDA, at most 2^21 pixels each.
        parameters: a row for each image; on the CPU or on the images' device. On the CPU their
            range is checked.
        mean: of the three channels, subtracted after scaling to [0, 1].
        std: of the three channels, divided by; positive.
        dtype: float32, float16 or bfloat16; or uint8: levels, not normalised, whatever `mean` and
            `std` are.
        solarize_threshold: level, 0 to 256, from which solarize inverts.
        channels_last: whether the channels are innermost in memory.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        [B, 3, H, W] of `dtype` on the images' device, contiguous (or channels-last). Not
        differentiable.

    Raises:
        ValueError: for images of another type or shape, parameters of another length, place or
            range, a std that is not positive, another dtype, or a backend that cannot run here.

    Numerics: levels are whole numbers, equal to Pillow's to the bit on every backend; the last step
        is one product and one sum in float32, rounded once more to `dtype`. Deterministic. Autocast
        changes nothing.
    Memory and cost: the result, and temporarily 9 bytes a pixel of blurred images; `bytes_moved`.
        With parameters on a GPU every launch is made whether a batch needs it or not.
    Distributed: none.

    Example:
        >>> import torch
        >>> from fastmoco_kernels.view_color.op import ViewColorParameters, view_color
        >>> grey = ViewColorParameters.neutral(1)._replace(grayscale=torch.tensor([True]))
        >>> red = torch.tensor([255, 0, 0], dtype=torch.uint8).expand(1, 2, 2, 3)
        >>> view_color(red, grey, mean=(0, 0, 0), std=(1, 1, 1))[0, :, 0, 0] * 255
        tensor([76., 76., 76.])
    """
    _check(images, parameters, mean, std, dtype, solarize_threshold)
    default = "triton" if triton_is_default(images.device) else "torch"
    chosen = choose_backend("view_color", backend, default, ("torch", "triton"))
    if chosen == "triton":
        require_triton("view_color", images.device)
    scale, shift = level_factors(mean, std) if dtype.is_floating_point else ([1.0] * 3, [0.0] * 3)
    # Outside a graph the operator is bypassed: its first call imports torch's compiler, which takes
    # seconds.
    traced = torch.compiler.is_compiling() or type(images) is not Tensor
    result: Tensor = (_view_color if traced else _compute)(
        images,
        *parameters,
        scale,
        shift,
        solarize_threshold,
        dtype,
        channels_last,
        chosen == "triton",
    )
    return result


def _compute(
    images: Tensor,
    brightness: Tensor,
    contrast: Tensor,
    saturation: Tensor,
    hue: Tensor,
    order: Tensor,
    grayscale: Tensor,
    blur_sigma: Tensor,
    solarize: Tensor,
    flip: Tensor,
    scale: list[float],
    shift: list[float],
    threshold: int,
    dtype: torch.dtype,
    channels_last: bool,
    triton: bool,
) -> Tensor:
    parameters = ViewColorParameters(
        brightness, contrast, saturation, hue, order, grayscale, blur_sigma, solarize, flip
    )
    check_ranges("view_color", parameters)
    out = _empty(images, dtype, channels_last)
    tables = plan(parameters)
    if triton:
        from fastmoco_kernels.view_color.launch import Normalisation, view_color_triton

        numbers = Normalisation(
            (scale[0], scale[1], scale[2]), (shift[0], shift[1], shift[2]), threshold
        )
        view_color_triton(images.contiguous(), tables, numbers, out)
    else:
        factor, offset = (
            torch.tensor(x, dtype=torch.float32, device=images.device) for x in (scale, shift)
        )
        view_color_reference(
            images, Plan(*(table.cpu() for table in tables)), factor, offset, threshold, out
        )
    return out


_view_color = torch.library.custom_op(
    "fastmoco::view_color",
    mutates_args=(),
    schema=(
        "(Tensor images, Tensor brightness, Tensor contrast, Tensor saturation, Tensor hue, "
        "Tensor order, Tensor grayscale, "
        "Tensor blur_sigma, Tensor solarize, Tensor flip, float[] scale, float[] shift, "
        "int threshold, ScalarType dtype, "
        "bool channels_last, bool triton) -> Tensor"
    ),
)(_compute)


@_view_color.register_fake
def _(images: Tensor, *arguments: object) -> Tensor:
    *_, dtype, channels_last, _ = arguments
    assert isinstance(dtype, torch.dtype)  # noqa: S101 - a type: by the operator's schema
    return _empty(images, dtype, bool(channels_last))


def _empty(images: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    batch, height, width, _ = images.shape
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(
        batch, 3, height, width, dtype=dtype, device=images.device, memory_format=layout
    )


def _check(
    images: Tensor,
    parameters: ViewColorParameters,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    threshold: int,
) -> None:
    """Refuse wrong shapes and types; every message contains both values."""
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[-1] != 3:
        raise ValueError(f"view_color: images are {images.dtype} {shape}; need uint8 [B, H, W, 3]")
    if images.numel() == 0:
        raise ValueError(f"view_color: images {shape} are empty")
    if shape[1] * shape[2] > _LARGEST:
        raise ValueError(
            f"view_color: images of {shape[1]} x {shape[2]} pixels; an image has at most {_LARGEST}"
        )

    for name, value in parameters._asdict().items():
        wanted = (shape[0], 4) if name == "order" else (shape[0],)
        if tuple(value.shape) != wanted:
            raise ValueError(
                f"view_color: {name} is {tuple(value.shape)} but {shape[0]} images need {wanted}"
            )
        if value.device != parameters.brightness.device or value.device.type not in (
            "cpu",
            images.device.type,
        ):
            raise ValueError(
                f"view_color: {name} is on {value.device}, "
                f"brightness on {parameters.brightness.device} "
                f"and the images on {images.device}; parameters are all on the CPU or all on the "
                "images' device"
            )

    check_normalisation("view_color", mean, std)
    if dtype not in TYPES:
        raise ValueError(f"view_color: dtype={dtype} is none of {TYPES}")
    if not 0 <= threshold <= 256:
        raise ValueError(f"view_color: solarize_threshold={threshold} is outside 0 to 256")


def level_factors(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """Factors and summands such that `(level / 255 - mean) / std = level * factor + summand`.

    Both are rounded to float32, then the product is, then the sum.
    """
    return [1 / (255 * s) for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


def check_normalisation(op: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """Refuse what does not normalise three channels.

    Raises:
        ValueError: naming the op and the numbers.
    """
    for name, numbers in (("mean", mean), ("std", std)):
        if len(numbers) != 3:
            raise ValueError(f"{op}: {name} has {len(numbers)} numbers but an image has 3 channels")
    if not all(s > 0 for s in std):
        raise ValueError(f"{op}: std={tuple(std)} must be positive")


def check_ranges(op: str, parameters: ViewColorParameters) -> None:
    """Refuse invalid parameters; those on a GPU are not checked, because that would wait for it.

    Raises:
        ValueError: naming the op, the parameter and the first image that it is wrong for.
    """
    if parameters.brightness.device.type != "cpu":
        return
    for name in ("brightness", "contrast", "saturation"):
        value = getattr(parameters, name)
        bad = (~(torch.isfinite(value) & (value >= 0))).nonzero()
        if len(bad):
            row = int(bad[0])
            raise ValueError(
                f"{op}: {name} of image {row} is {float(value[row])}; must be finite and at least 0"
            )
    bad = (~(parameters.hue.abs() <= 0.5)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"{op}: hue of image {row} is {float(parameters.hue[row])}; "
            "must be in -0.5 to 0.5 turns"
        )
    bad = (parameters.order.long().sort(1).values != torch.arange(4)).any(1).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(
            f"{op}: order of image {row} is {parameters.order[row].tolist()}; "
            "must be a permutation of 0 to 3"
        )
    check_sigmas(op, parameters.blur_sigma)


def bytes_moved(
    images: int,
    height: int,
    width: int,
    *,
    dtype: torch.dtype,
    with_contrast: int = 0,
    blurred: int = 0,
) -> int:
    """Bytes of pixels that the launches read and write (tables of 128 bytes an image left out).

    Args:
        images: B.
        height: of an image.
        width: of an image.
        dtype: of the result.
        with_contrast: number of images with a contrast factor other than 1, whose pixels are read
            twice.
        blurred: number of blurred images: 3 bytes a pixel written and read, besides the six boxes.
    """
    from fastmoco_kernels.blur.op import bytes_moved as blur_bytes

    levels = 3 * height * width
    own = images * levels * (1 + dtype.itemsize) + with_contrast * levels
    return own + blurred * 2 * levels + (blur_bytes(blurred, height, width) if blurred else 0)
