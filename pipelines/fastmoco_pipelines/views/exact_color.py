"""Views in PIL's own arithmetic, `color="exact"`: of decoded images on the CPU, of cropped and
resized ones on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmoco_kernels.cut_views.op import cut_views
from fastmoco_kernels.view_color.op import view_color
from fastmoco_kernels.view_color.plan import ViewColorParameters
from fastmoco_pipelines.spec import ViewSpec
from fastmoco_pipelines.views.draws import ViewDraws


def color_parameters(draws: ViewDraws) -> ViewColorParameters:
    """The draws of B samples as the parameters of `fastmoco_kernels.view_color`, on the CPU: B
    rows, sharing memory."""
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


def exact_color(
    resized: Tensor, spec: ViewSpec, draws: ViewDraws, *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[B, size, size, 3] uint8, cropped and resized, to [B, 3, size, size] on the same device,
    memory of its own.

    `dtype` is float32, normalised, or uint8, levels.
    """
    return view_color(
        resized,
        color_parameters(draws),
        mean=spec.mean,
        std=spec.std,
        dtype=dtype,
        solarize_threshold=spec.solarize_threshold,
    )


def exact_views(
    decoded: Sequence[Any],
    spec: ViewSpec,
    draws: ViewDraws,
    threads: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Views of B decoded images on the CPU, [B, 3, size, size].

    Args:
        decoded: B images that numpy reads as [H, W, 3] uint8: arrays, or DALI's tensors.
        spec: what the view is.
        draws: B rows.
        threads: that cut.
        dtype: float32, normalised, or uint8, levels.
    """
    return cut_views(
        decoded,
        torch.from_numpy(draws.crop),
        color_parameters(draws),
        size=spec.size,
        base_size=spec.base_size,
        corners=torch.from_numpy(draws.corner) if spec.base_size else None,
        mean=spec.mean,
        std=spec.std,
        dtype=dtype,
        solarize_threshold=spec.solarize_threshold,
        interpolation=spec.interpolation,
        threads=threads,
    )
