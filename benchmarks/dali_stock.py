"""MoCo v3's views as usually written with DALI: its operators and random
numbers, and one decoding per view.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from benchmarks.loading import Feed, Job, Views
from fastmoco_pipelines import ViewSpec
from fastmoco_pipelines.views.runtime import build_pipeline


def stock_feed(job: Job) -> Feed:
    """Both views, decoded separately, so that DALI decodes only the window of each."""
    pair = job.views("dali")

    def graph(encoded: Any) -> Any:
        return tuple(_view(encoded, spec, job) for spec in pair)

    run = _runner(graph, job)

    def following() -> Views:
        view1, view2 = (_owned(output, job.device) for output in run())
        return view1, view2

    return Feed(name="dali stock", next=following)


def decoding_feed(job: Job) -> Feed:
    """Reading and decoding with DALI only."""

    def graph(encoded: Any) -> Any:
        from nvidia.dali import fn, types

        return (fn.decoders.image(encoded, device=_decoder(job), output_type=types.RGB),)

    run = _runner(graph, job)

    def following() -> None:
        run()

    return Feed(name="decode dali", next=following)


def _runner(graph: Callable[[Any], Any], job: Job) -> Callable[[], Any]:
    """Feed the next batch to a built pipeline and run it."""
    from nvidia.dali import fn, types

    def whole() -> Any:
        return graph(fn.external_source(name="encoded", ndim=1, dtype=types.UINT8, no_copy=True))

    on_gpu = job.device.type == "cuda"
    pipeline = build_pipeline(
        whole,
        batch_size=job.batch,
        num_threads=job.threads,
        device_id=0 if on_gpu else None,
        prefetch_queue_depth=1,
        enable_conditionals=True,
        seed=1,
    )
    batches = job.batches()

    def run() -> Any:
        pipeline.feed_input("encoded", next(batches)[1])
        return pipeline.run()

    return run


def _decoder(job: Job) -> str:
    return "mixed" if job.device.type == "cuda" else "cpu"


def _owned(output: Any, device: torch.device) -> torch.Tensor:
    """A copy on the GPU, because DALI reuses its buffer; on the CPU the tensor owns it."""
    tensor = from_dlpack(output.as_tensor())
    return tensor.clone() if device.type == "cuda" else tensor


def _view(encoded: Any, spec: ViewSpec, job: Job) -> Any:
    """Crop while decoding, resize, jitter colors, grayscale, blur, solarize, flip and normalise."""
    from nvidia.dali import fn, types

    def between(low: float, high: float) -> Any:
        return fn.random.uniform(range=(low, high))

    def coin(probability: float) -> Any:
        return fn.random.coin_flip(probability=probability, dtype=types.BOOL)

    view = fn.decoders.image_random_crop(
        encoded,
        device=_decoder(job),
        output_type=types.RGB,
        random_area=spec.crop_scale,
        random_aspect_ratio=spec.crop_ratio,
        num_attempts=10,
    )
    view = fn.resize(view, size=(spec.size, spec.size))
    if coin(spec.jitter_probability):
        view = fn.color_twist(
            view,
            brightness=between(1 - spec.brightness, 1 + spec.brightness),
            contrast=between(1 - spec.contrast, 1 + spec.contrast),
            saturation=between(1 - spec.saturation, 1 + spec.saturation),
            hue=between(-360 * spec.hue, 360 * spec.hue),
        )
    if coin(spec.grayscale_probability):
        view = fn.saturation(view, saturation=0.0)
    if coin(spec.blur_probability):
        view = fn.gaussian_blur(view, sigma=between(*spec.blur_sigma))
    if spec.solarize_probability > 0:
        threshold = types.Constant(spec.solarize_threshold, dtype=types.UINT8)
        if coin(spec.solarize_probability):
            view = view ^ ((view >= threshold) * types.Constant(255, dtype=types.UINT8))
    mean, std = [255 * m for m in spec.mean], [255 * s for s in spec.std]
    mirror = fn.random.coin_flip(probability=spec.flip_probability)
    return fn.crop_mirror_normalize(
        view, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std, mirror=mirror
    )
