"""Exact colors against Pillow one image at a time, and the pipeline with exact
colors against the one with DALI's.

Two tasks. `view1` and `view2`: cropped bytes to normalised views with MoCo v3's draws, by Pillow,
by torch and by the kernels. `pipeline`: encoded images to both views. Errors are mean distances
from Pillow in levels of 255, measured first; DALI's is some levels, because it has no HSV and one
order for all images. There is no compiled contender, because each image has its own order of
operations and its own blur, and a graph of the whole task would compute all 24 orders.
"""

from __future__ import annotations

import functools
import importlib.util
import io
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks.cases.cut_views import distance, pictures
from benchmarks.contest import Contender, Results, Task
from fastmoco_kernels.view_color.op import view_color
from fastmoco_pipelines import ViewSpec, moco_v3_views
from fastmoco_pipelines.views.draws import ViewDraws, draw_views
from fastmoco_pipelines.views.exact_color import color_parameters
from fastmoco_pipelines.views.reference import reference_view

NAME = "view_color"
DEFAULTS = {"images": 24, "size": 224, "rounds": 5, "threads": 1}
"""`images` of a batch; `size` of a view; `threads` of torch and of DALI on the CPU."""
QUICK = {"images": 3, "size": 96, "rounds": 3}
LIMIT = 0.5
DALI_LIMIT = 20.0
"""DALI's augmentation differs and only has a sanity check."""
Images = list[NDArray[np.uint8]]


def tasks(options: dict[str, Any], device: torch.device) -> dict[str, Task]:
    """Each view by itself, then the pipeline, which needs DALI and the kernels do not."""
    pair = moco_v3_views(options["size"])
    views = {f"view{n}": _view_task(view, n, options, device) for n, view in enumerate(pair, 1)}
    return {**views, "pipeline": _pipeline_task(pair, options, device)}


def together(result: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """`us_per_image` of both views by the kernels on CUDA."""
    both = [part.get("milliseconds", {}).get("triton") for part in result.values()][:2]
    return {"us_per_image": round(1e3 * sum(both) / options["images"], 3)} if all(both) else {}


def _has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # nor its parent package
        return False


def _whole(view: ViewSpec, color: Literal["dali", "exact"]) -> ViewSpec:
    """The view without its crop: the window is the whole image, and the resize is the identity."""
    return replace(view, color=color, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))


def _draws(view: ViewSpec, count: int, number: int) -> ViewDraws:
    sizes = np.full((count, 2), view.size, dtype=np.int32)
    return draw_views(view, seed=0, epoch=0, sample_ids=np.arange(count), sizes=sizes, view=number)


def _by_pillow(images: Images, spec: ViewSpec, draws: ViewDraws) -> Results:
    made = [reference_view(image, spec, draws, i) for i, image in enumerate(images)]
    return {"levels": torch.from_numpy(np.stack(made))}


def _view_task(view: ViewSpec, number: int, options: dict[str, Any], device: torch.device) -> Task:
    """Cropped bytes to one normalised view."""
    spec, count, cuda = _whole(view, "exact"), options["images"], device.type == "cuda"
    draws = _draws(spec, count, number)
    parameters = color_parameters(draws)

    def by(backend: str) -> Callable[[Images], Callable[[], Results]]:
        def open_(images: Images) -> Callable[[], Results]:
            batch = torch.from_numpy(np.stack(images)).to(device)
            how: Any = {"mean": spec.mean, "std": spec.std, "backend": backend}
            return lambda: {"levels": view_color(batch, parameters, **how)}

        return open_

    def pillow(images: Images) -> Callable[[], Results]:
        return lambda: {"levels": _by_pillow(images, spec, draws)["levels"].to(device)}  # type: ignore[union-attr]

    return Task(
        inputs=lambda seed: pictures(count, (spec.size, spec.size), seed),
        truth=lambda images: _by_pillow(images, spec, draws),
        contenders=[
            Contender(name="pillow, image by image", open=pillow),
            Contender(name="torch", open=by("torch")),
            Contender(
                name="triton", open=by("triton"), skipped="" if cuda else "needs a CUDA device"
            ),
        ],
        subject="triton" if cuda else "torch",
        limits={"levels": LIMIT},
        error=partial(distance, view=spec),
    )


def _pipeline_task(
    pair: tuple[ViewSpec, ViewSpec], options: dict[str, Any], device: torch.device
) -> Task:
    """Encoded images to both views; the first is compared."""
    count, spec = options["images"], _whole(pair[0], "exact")
    extent = (spec.size, spec.size)

    @functools.cache
    def pipeline_of(color: Literal["dali", "exact"]) -> Callable[[Images], Results]:
        from fastmoco_pipelines.views.dali import ViewPipeline

        views = _whole(pair[0], color), _whole(pair[1], color)
        draws = _draws(views[0], count, 1), _draws(views[1], count, 2)
        cuda = device.type == "cuda"
        pipeline = ViewPipeline(
            views,
            batch_size=count,
            threads=max(1, options["threads"]),
            device="gpu" if cuda else "cpu",
            device_id=0 if cuda else None,
        )
        return lambda encoded: {"levels": pipeline.run(encoded, draws)[0]}

    def open_(color: Literal["dali", "exact"], encoded: Images) -> Callable[[], Results]:
        return partial(pipeline_of(color), encoded)

    def truth(encoded: Images) -> Results:
        opened = (Image.open(io.BytesIO(data.tobytes())) for data in encoded)
        decoded = [np.asarray(image.convert("RGB")) for image in opened]
        return _by_pillow(decoded, spec, _draws(spec, count, 1))

    skipped = "" if _has_dali() else "DALI is absent"
    return Task(
        inputs=lambda seed: [_jpeg(image) for image in pictures(count, extent, seed)],
        truth=truth,
        contenders=[
            Contender(name="exact", open=partial(open_, "exact"), skipped=skipped),
            Contender(
                name="dali",
                open=partial(open_, "dali"),
                skipped=skipped,
                limits={"levels": DALI_LIMIT},
            ),
        ],
        subject="exact",
        limits={"levels": LIMIT},
        error=partial(distance, view=spec),
    )


def _jpeg(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=92)
    return np.frombuffer(out.getvalue(), dtype=np.uint8)
