"""Views of decoded images on the CPU: compiled C against Pillow one image at a
time, and against plain torch.

For both views of MoCo v3 with their draws. Errors are mean distances from
Pillow in levels of 255, measured first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.contest import Contender, contest
from fastmoco_kernels.cut_views.native import native_library
from fastmoco_kernels.cut_views.op import cut_views
from fastmoco_pipelines import ViewSpec, moco_v3_views
from fastmoco_pipelines.views.draws import draw_views
from fastmoco_pipelines.views.exact_color import color_parameters
from fastmoco_pipelines.views.reference import reference_view

NAME = "cut_views"
DEFAULTS = {"images": 16, "height": 375, "width": 500, "size": 224, "rounds": 5, "threads": 1}
QUICK = {"images": 4, "rounds": 3}


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Check, then measure.

    Args:
        options: `images` of a batch, their `height` and `width`; `size` of a view; `rounds`;
            `threads` of torch and of the C code (Pillow uses one).

    Returns:
        One contest each for `view1` and `view2`.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(options["threads"])
    try:
        pair = moco_v3_views(options["size"])
        return {
            f"view{number}": _contest(view, number, options)
            for number, view in enumerate(pair, start=1)
        }
    finally:
        torch.set_num_threads(before)


def _contest(view: ViewSpec, number: int, options: dict[str, Any]) -> dict[str, Any]:
    count, extent = options["images"], (options["height"], options["width"])
    coarse = np.random.default_rng(0).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)
    images = [
        np.asarray(Image.fromarray(c).resize(extent[::-1], Image.Resampling.BICUBIC))
        for c in coarse
    ]
    sizes = np.tile(np.array([extent], dtype=np.int32), (count, 1))
    draws = draw_views(view, seed=0, epoch=0, sample_ids=np.arange(count), sizes=sizes, view=number)
    parameters, crops = color_parameters(draws), torch.from_numpy(draws.crop)

    def by_pillow() -> Tensor:
        return torch.from_numpy(
            np.stack([reference_view(image, view, draws, i) for i, image in enumerate(images)])
        )

    def by(backend: str) -> Callable[[], Tensor]:
        size, threads = options["size"], options["threads"]
        return lambda: cut_views(
            images, crops, parameters, size=size, threads=threads, backend=backend
        )

    truth = by_pillow()

    def contender(name: str, call: Callable[[], Tensor], skipped: str = "") -> Contender:
        def errors() -> dict[str, float]:
            apart = (call() - truth).abs() * 255 * torch.tensor(view.std)[:, None, None]
            return {"levels": float(apart.mean())}

        return Contender(
            name=name, call=call, skipped=skipped, errors=errors, limits={"levels": 1e-4}
        )

    contenders = [
        contender(
            "native",
            by("native"),
            "" if native_library() else "fastmoco was installed without a C compiler",
        ),
        contender("pillow, image by image", by_pillow),
        contender("torch", by("torch")),
    ]
    return contest(
        contenders, subject="native", device=torch.device("cpu"), rounds=options["rounds"]
    )
