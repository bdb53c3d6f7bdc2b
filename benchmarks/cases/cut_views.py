"""Views of decoded images on the CPU: compiled C against Pillow one image at a
time, and against plain torch.

For both views of MoCo v3 with their draws. Errors are mean distances from
Pillow in levels of 255, measured first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.contest import Contender, Results, Task
from fastmoco_kernels.cut_views.native import native_library
from fastmoco_kernels.cut_views.op import cut_views
from fastmoco_pipelines import ViewSpec, moco_v3_views
from fastmoco_pipelines.views.draws import draw_views
from fastmoco_pipelines.views.exact_color import color_parameters
from fastmoco_pipelines.views.reference import reference_view

NAME = "cut_views"
DEFAULTS = {"images": 16, "height": 375, "width": 500, "size": 224, "rounds": 5, "threads": 1}
"""`images` of a batch, their `height` and `width`; `size` of a view; `threads` of torch and of the
C code (Pillow uses one)."""
SHAPES: dict[str, dict[str, Any]] = {"cpu": {}}
QUICK = {"images": 4, "rounds": 3}
LIMIT = 1e-4


def tasks(options: dict[str, Any], device: torch.device) -> dict[str, Task]:
    """Both views."""
    pair = moco_v3_views(options["size"])
    return {f"view{n}": _task(view, n, options) for n, view in enumerate(pair, start=1)}


def _task(view: ViewSpec, number: int, options: dict[str, Any]) -> Task:
    count, extent = options["images"], (options["height"], options["width"])
    sizes = np.tile(np.array([extent], dtype=np.int32), (count, 1))
    draws = draw_views(view, seed=0, epoch=0, sample_ids=np.arange(count), sizes=sizes, view=number)
    parameters, crops = color_parameters(draws), torch.from_numpy(draws.crop)

    def by_pillow(images: list[NDArray[np.uint8]]) -> Results:
        made = [reference_view(image, view, draws, i) for i, image in enumerate(images)]
        return {"levels": torch.from_numpy(np.stack(made))}

    def by(backend: str) -> Callable[[list[NDArray[np.uint8]]], Callable[[], Results]]:
        how = {"size": options["size"], "threads": options["threads"], "backend": backend}
        return lambda images: lambda: {"levels": cut_views(images, crops, parameters, **how)}

    no_native = "" if native_library() else "fastmoco was installed without a C compiler"
    return Task(
        inputs=lambda seed: pictures(count, extent, seed),
        truth=by_pillow,
        contenders=[
            Contender(name="native", open=by("native"), skipped=no_native),
            Contender(
                name="pillow, image by image", open=lambda images: partial(by_pillow, images)
            ),
            Contender(name="torch", open=by("torch")),
        ],
        subject="native",
        limits={"levels": LIMIT},
        error=partial(distance, view=view),
    )


def pictures(count: int, extent: tuple[int, int], seed: int) -> list[NDArray[np.uint8]]:
    """Smooth noise, with similar neighbours as in photographs; each [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)
    bicubic = Image.Resampling.BICUBIC
    return [np.asarray(Image.fromarray(c).resize(extent[::-1], bicubic)) for c in coarse]


def distance(made: Tensor, truth: Tensor, view: ViewSpec) -> float:
    """Mean distance of views in levels of 255."""
    apart = (made.float().cpu() - truth.float().cpu()).abs() * 255
    return float((apart * torch.tensor(view.std)[:, None, None]).mean())
