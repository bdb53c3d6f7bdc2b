"""Exact colors against Pillow one image at a time, and the pipeline with exact
colors against the one with DALI's.

Two tasks. `view1` and `view2`: cropped bytes to normalised views with MoCo v3's draws, by Pillow,
by torch and by the kernels. `pipeline`: encoded images to both views. Errors are mean distances
from Pillow in levels of 255, measured first; DALI's is some levels, because it has no HSV and one
order for all images. There is no compiled contender, because each image has its own order of
operations and its own blur, and a graph of the whole task would compute all 24 orders.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from benchmarks.contest import Contender, contest
from fastmoco_kernels.view_color.op import view_color
from fastmoco_pipelines import ViewSpec, moco_v3_views
from fastmoco_pipelines.views.draws import ViewDraws, draw_views
from fastmoco_pipelines.views.exact_color import color_parameters
from fastmoco_pipelines.views.reference import reference_view

NAME = "view_color"
DEFAULTS = {"device": "auto", "images": 24, "size": 224, "rounds": 5, "threads": 1}
QUICK = {"images": 3, "size": 96, "rounds": 3}


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Check, then measure.

    Args:
        options: `device` ("auto", "cpu" or "cuda"); `images` of a batch; `size` of a view;
            `rounds`; `threads` of torch and of DALI on the CPU.

    Returns:
        One contest each for `view1` and `view2`; for `pipeline` too if DALI is installed, otherwise
        the reason. `us_per_image` of both views by the kernels on CUDA.
    """
    available = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(available if options["device"] == "auto" else options["device"])
    before = torch.get_num_threads()
    torch.set_num_threads(options["threads"])
    try:
        images = _pictures(options["images"], options["size"])
        pair = moco_v3_views(options["size"])
        results = {
            f"view{number}": _colour_contest(images, view, number, device, options["rounds"])
            for number, view in enumerate(pair, start=1)
        }
        # Last, and in a separate result, because the kernels can be measured without DALI.
        pipeline: dict[str, Any] = {"skipped": {"DALI": "absent"}}
        if _has_dali():
            try:
                pipeline = _pipeline_contest(images, pair, device, options)
            except (RuntimeError, ValueError, ImportError) as error:  # keep the results so far
                pipeline = {"failed": {"DALI": f"{type(error).__name__}: {str(error)[:300]}"}}
        both = [part.get("milliseconds", {}).get("triton") for part in results.values()]
        per_image = {"us_per_image": round(1e3 * sum(both) / len(images), 3)} if all(both) else {}
        return {**results, "pipeline": pipeline, **per_image}
    finally:
        torch.set_num_threads(before)


def _has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # nor its parent package
        return False


def _pictures(count: int, size: int) -> NDArray[np.uint8]:
    """[count, size, size, 3]: smooth noise, with similar neighbours as in photographs."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 24, 24, 3), dtype=np.uint8)
    return np.stack(
        [
            np.asarray(Image.fromarray(c).resize((size, size), Image.Resampling.BICUBIC))
            for c in coarse
        ]
    )


def _whole(view: ViewSpec, color: Literal["dali", "exact"]) -> ViewSpec:
    """The view without its crop: the window is the whole image, and the resize is the identity."""
    return replace(view, color=color, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))


def _draws(view: ViewSpec, images: NDArray[np.uint8], number: int) -> ViewDraws:
    sizes = np.full((len(images), 2), view.size, dtype=np.int32)
    return draw_views(
        view, seed=0, epoch=0, sample_ids=np.arange(len(images)), sizes=sizes, view=number
    )


def _distance(made: Tensor, truth: NDArray[np.float32], view: ViewSpec) -> float:
    levels = np.abs(made.float().cpu().numpy() - truth) * 255 * np.array(view.std)[:, None, None]
    return float(levels.mean())


def _colour_contest(
    images: NDArray[np.uint8], view: ViewSpec, number: int, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Cropped bytes to one normalised view."""
    spec = _whole(view, "exact")
    draws = _draws(spec, images, number)
    parameters, batch = color_parameters(draws), torch.from_numpy(images).to(device)

    def by_pillow() -> NDArray[np.float32]:
        return np.stack([reference_view(image, spec, draws, i) for i, image in enumerate(images)])

    truth = by_pillow()

    def by(backend: str) -> Callable[[], Tensor]:
        return lambda: view_color(batch, parameters, mean=spec.mean, std=spec.std, backend=backend)

    def contender(name: str, call: Callable[[], Tensor], skipped: str = "") -> Contender:
        def errors() -> dict[str, float]:
            return {"levels": _distance(call(), truth, spec)}

        return Contender(
            name=name, call=call, skipped=skipped, errors=errors, limits={"levels": 0.5}
        )

    contenders = [
        contender("pillow, image by image", lambda: torch.from_numpy(by_pillow()).to(device)),
        contender("torch", by("torch")),
        contender("triton", by("triton"), "" if device.type == "cuda" else "needs a CUDA device"),
    ]
    subject = "triton" if device.type == "cuda" else "torch"
    return contest(contenders, subject=subject, device=device, rounds=rounds)


def _pipeline_contest(
    images: NDArray[np.uint8],
    pair: tuple[ViewSpec, ViewSpec],
    device: torch.device,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Encoded images to both views."""
    from fastmoco_pipelines.views.dali import ViewPipeline

    encoded = [_jpeg(image) for image in images]
    decoded = [Image.open(io.BytesIO(data.tobytes())).convert("RGB") for data in encoded]
    contenders = []
    for color in ("exact", "dali"):
        view1, view2 = _whole(pair[0], color), _whole(pair[1], color)
        draws = _draws(view1, images, 1), _draws(view2, images, 2)
        truth = [
            reference_view(image, _whole(view1, "exact"), draws[0], i)
            for i, image in enumerate(decoded)
        ]
        on_gpu = device.type == "cuda"
        pipeline = ViewPipeline(
            (view1, view2),
            batch_size=len(images),
            threads=options["threads"],
            device="gpu" if on_gpu else "cpu",
            device_id=0 if on_gpu else None,
        )

        def call(
            pipeline: ViewPipeline = pipeline, draws: tuple[ViewDraws, ViewDraws] = draws
        ) -> Tensor:
            return pipeline.run(encoded, draws)[0]

        def errors(
            call: Callable[[], Tensor] = call,
            truth: list[NDArray[np.float32]] = truth,
            view: ViewSpec = view1,
        ) -> dict[str, float]:
            return {"levels": _distance(call(), np.stack(truth), view)}

        limits = {
            "levels": 0.5 if color == "exact" else 20.0
        }  # DALI's augmentation differs and only has a sanity check
        contenders.append(Contender(name=color, call=call, errors=errors, limits=limits))
    return contest(contenders, subject="exact", device=device, rounds=options["rounds"])


def _jpeg(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=92)
    return np.frombuffer(out.getvalue(), dtype=np.uint8)
