"""Views in PIL's own arithmetic: what ``color="exact"`` does to the cropped and resized bytes, on their device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastmoco_kernels.view_color.op import view_color
from fastmoco_kernels.view_color.plan import ViewColorParameters
from fastmoco_pipelines.draws import ViewDraws
from fastmoco_pipelines.spec import ViewSpec


def color_parameters(draws: ViewDraws) -> ViewColorParameters:
    """The draws of B samples as the parameters of `fastmoco_kernels.view_color`, on the CPU: B rows, sharing memory."""
    return ViewColorParameters(
        brightness=torch.from_numpy(draws.brightness),
        contrast=torch.from_numpy(draws.contrast),
        saturation=torch.from_numpy(draws.saturation),
        hue=torch.from_numpy(draws.hue),
        order=torch.from_numpy(draws.jitter_order),
        grayscale=torch.from_numpy(draws.grayscale),
        blur_sigma=torch.from_numpy(draws.blur_sigma),
        solarize=torch.from_numpy(draws.solarize),
        flip=torch.from_numpy(draws.flip),
    )


def exact_finish(spec: ViewSpec, draws: ViewDraws) -> Callable[[Tensor], Tensor] | None:
    """What turns resized [B, size, size, 3] uint8 into the normalised view; None where DALI does the colours."""
    if spec.color != "exact":
        return None
    parameters = color_parameters(draws)

    def finish(images: Tensor) -> Tensor:
        return view_color(images, parameters, mean=spec.mean, std=spec.std, solarize_threshold=spec.solarize_threshold)

    return finish
