"""From what a loader delivers to what an encoder reads, a chunk at a time: levels become numbers
where they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastmoco_pipelines.spec import ViewSpec
from fastmoco_pipelines.views.levels import normalise_by, numbers

PrepareViews = Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]
"""Views as a loader delivers them -> the same number as the encoder reads them."""


def as_they_are(views: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Views that an encoder can read already."""
    return views


def view_preparation(
    specs: Sequence[ViewSpec], precision: str, *, compiled: bool = False, exact: bool = False
) -> PrepareViews:
    """Levels (uint8) are normalised, straight into the dtype of the encoder's first product;
    float32 views pass as they are.

    Args:
        specs: how each view is made: mean, std and color are used.
        precision: "bf16", "fp32" or "fp64".
        compiled: one kernel by torch.compile in place of three operations; the last bit of the
            float32 result may differ.
        exact: float32 also in a run in bf16 (`Objective.exact_views`).
    """
    narrow = torch.float32 if exact else torch.bfloat16
    dtype = {"bf16": narrow, "fp32": torch.float32, "fp64": torch.float64}[precision]
    kernel = torch.compile(normalise_by, dynamic=False) if compiled else normalise_by

    def one(view: Tensor, spec: ViewSpec) -> Tensor:
        if view.dtype != torch.uint8:
            return view.to(dtype) if dtype == torch.float64 else view
        # The numbers are made outside of what is compiled: inside, they would be copied to the
        # device at every call. Without gradient, because both passes over a chunk then share one
        # graph.
        with torch.no_grad():
            return kernel(
                view, *numbers(spec, view.device), multiply_first=spec.color == "exact", dtype=dtype
            )

    return lambda views: tuple(one(view, spec) for view, spec in zip(views, specs, strict=True))
