"""Gaussian blur of uint8 images, one sigma each, equal to Pillow's `ImageFilter.GaussianBlur`.

MoCo v3 was trained on Pillow's blur, which is not a sampled Gaussian: three extended boxes along
each axis, levels rounded to 8 bits after every one of the six. A box is two weights and a radius,
the sums are integers below 2^31, and so the result is Pillow's bit for bit on every backend,
whatever the order of the additions. The price is six light passes instead of two heavy ones: at
MoCo v3's sigmas (below 2.45 pixels) a box reaches one or two pixels to each side, so a pass reads 3
or 5 neighbours from the cache. Any sigma works; a pass reads about 2 sigma + 1 neighbours.

The three passes of an axis are not fused. On a GPU each moves 2 bytes a level, and the planes of a
batch of views fit the L2 cache of current GPUs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmoco_kernels.backends import choose_backend, require_triton, triton_is_default
from fastmoco_kernels.blur.boxes import PASSES, extended_boxes
from fastmoco_kernels.blur.reference import blur_reference


def gaussian_blur(images: Tensor, sigmas: Tensor, *, backend: str = "auto") -> Tensor:
    """Blur every image by its own Gaussian.

    Six boxes, three along the width and then three along the height; a box of width `2 r + 1 + 2 e`
    weighs its whole taps `1 / (2 r + 1 + 2 e)` and its two edge taps `e` times that, with r and e
    such that its variance is `sigma^2 / 3` (Gwosdek et al. 2011). Levels beyond the border repeat
    the border.

    Args:
        images: [B, C, H, W] uint8, any stride, CPU or CUDA.
        sigmas: [B] floating point, standard deviations in pixels, >= 0; 0 leaves an image as it is.
            On the CPU or on the images' device; on the CPU their range is checked.
        backend: `"auto"`, `"torch"` or `"triton"`.

    Returns:
        [B, C, H, W] uint8, contiguous, a new tensor. Not differentiable.

    Raises:
        ValueError: for another dtype or number of dimensions, an empty tensor, a number of sigmas
            other than B, mixed devices, or a sigma below 0 or not finite.

    Numerics: integers throughout; equal to Pillow to the bit, on every backend. Autocast changes
        nothing.
    Memory and cost: two more tensors of the images' size; `bytes_moved`.
    Distributed: none.

    Example:
        >>> import torch
        >>> from fastmoco_kernels import gaussian_blur
        >>> image = torch.zeros(1, 1, 3, 5, dtype=torch.uint8); image[..., 2] = 90
        >>> gaussian_blur(image, torch.tensor([1.0]))[0, 0, 1]
        tensor([ 5, 21, 37, 21,  5], dtype=torch.uint8)
    """
    if images.dtype != torch.uint8 or images.dim() != 4:
        raise ValueError(
            f"gaussian_blur: images are {images.dtype} {tuple(images.shape)}; need uint8 [B, C, "
            "H, W]"
        )
    if images.numel() == 0:
        raise ValueError(f"gaussian_blur: images {tuple(images.shape)} are empty")
    if sigmas.shape != images.shape[:1]:
        raise ValueError(
            f"gaussian_blur: {images.shape[0]} images but sigmas of shape {tuple(sigmas.shape)}"
        )
    if sigmas.device.type != "cpu" and sigmas.device != images.device:
        raise ValueError(f"gaussian_blur: sigmas on {sigmas.device} but images on {images.device}")
    default = "triton" if triton_is_default(images.device) else "torch"
    chosen = choose_backend("gaussian_blur", backend, default, ("torch", "triton"))
    if chosen == "triton":
        require_triton("gaussian_blur", images.device)
    # Outside a graph the operator is bypassed: its first call imports torch's compiler, which takes
    # seconds.
    traced = torch.compiler.is_compiling() or type(images) is not Tensor
    result: Tensor = (_gaussian_blur if traced else _compute)(images, sigmas, chosen == "triton")
    return result


def _compute(images: Tensor, sigmas: Tensor, triton: bool) -> Tensor:
    check_sigmas("gaussian_blur", sigmas)
    boxes = extended_boxes(sigmas)
    if not triton:
        return blur_reference(images, boxes.cpu())
    from fastmoco_kernels.blur.launch import blur_triton

    return blur_triton(images.contiguous(), boxes.to(images.device, non_blocking=True))


_gaussian_blur = torch.library.custom_op(
    "fastmoco::gaussian_blur",
    mutates_args=(),
    schema="(Tensor images, Tensor sigmas, bool triton) -> Tensor",
)(_compute)


@_gaussian_blur.register_fake
def _(images: Tensor, sigmas: Tensor, triton: bool) -> Tensor:
    return torch.empty_like(images, memory_format=torch.contiguous_format)


def check_sigmas(op: str, sigmas: Tensor) -> None:
    """Refuse invalid sigmas; those on a GPU are not checked, because that would wait for it.

    Raises:
        ValueError: naming the first bad one.
    """
    if sigmas.device.type == "cpu":
        bad = (~(torch.isfinite(sigmas) & (sigmas >= 0))).nonzero()
        if len(bad):
            row = int(bad[0])
            raise ValueError(
                f"{op}: the sigma of image {row} is {float(sigmas[row])}; "
                "it must be finite and at least 0"
            )


def bytes_moved(images: int, height: int, width: int, *, channels: int = 3) -> int:
    """Bytes that the six passes move.

    Each reads every level once, neighbours from the cache, and writes it once.

    """
    return 2 * PASSES * 2 * images * channels * height * width
