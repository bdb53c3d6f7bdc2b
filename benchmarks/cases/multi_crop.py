"""The training loader with DINO's crops, 2 large and 8 small ones, against torchvision's PIL
transforms with the same crops of the same photographs.

Images per CPU-second: processor time of this process between two idle moments, in turns. The first
batch of the loader is compared with the reference first: every level of every crop is equal, or
there are no ratios. The transforms get the draws of the loader: they spend no time on random
numbers of their own, only the loader pays for its threads and checks.

torchvision is optional, because few pairs of it with torch import: without it the case compares with
`pillow`, the operations that torchvision's PIL backend calls, written with Pillow alone.
`python -m benchmarks.photos` makes shards of photographs.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import __version__ as pillow_version

from benchmarks.cpu_time import images_per_cpu_second
from benchmarks.loading import (
    Color,
    Feed,
    Job,
    Views,
    augment_feed,
    fastmoco_feed,
    pillow_decode,
    pillow_decoding_feed,
    pillow_feed,
    reading_feed,
    torchvision_feed,
)
from benchmarks.measure import interleave, ratios
from benchmarks.photos import sample_shards
from fastmoco_pipelines.spec import ViewSpec, dino_views
from fastmoco_pipelines.views.reference import reference_view

NAME = "multi_crop"
DEFAULTS = {
    "shards": "",
    "size": 224,
    "local_size": 96,
    "local_copies": 8,
    "batch": 32,
    "batches": 2,
    "rounds": 5,
    "threads": 1,
    "parts": 1,
}
"""`shards` (empty: cut from the two sample photographs of scikit-learn); `size` of the two large
crops; `local_size` and `local_copies` of the small ones; images of a `batch`; `batches` of a turn;
`rounds`; `threads` of the loader; `parts`: 1 times the parts of the loader's work too."""
QUICK = {"size": 64, "local_size": 32, "local_copies": 3, "batch": 8, "batches": 1, "rounds": 2}
SUBJECT = "fastmoco exact"
LIMIT = 0.05
"""Mean distance of the transforms from the reference, in levels of 255: Pillow 13 resizes windows
much taller than wide in another order."""


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Check, then measure.

    Returns:
        `checked`: largest distance from the reference by feed, in levels; `failed`, by feed;
        `images_per_cpu_s` by feed and round; `speedup` of the loader over the others; `profile` in
        CPU milliseconds per image; `skipped`: why torchvision is absent.
    """

    def groups(size: int, color: Color) -> tuple[ViewSpec, ...]:
        return dino_views(size, options["local_size"], options["local_copies"], color=color)

    before = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        shards = options["shards"]
        if not shards:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            shards = sample_shards(Path(folder), options["batch"])
        job = Job(
            shards=shards,
            size=options["size"],
            batch=options["batch"],
            device=torch.device("cpu"),
            threads=options["threads"],
            groups=groups,
        )
        return _run(job, options, stack)


def _run(job: Job, options: dict[str, Any], stack: ExitStack) -> dict[str, Any]:
    feeds = [fastmoco_feed(job, "exact"), pillow_feed(job)]
    skipped: dict[str, str] = {}
    versions = {"pillow": pillow_version}
    try:
        feeds.append(torchvision_feed(job))
        import torchvision

        versions["torchvision"] = torchvision.__version__
    # Beside another torch than its own it raises a RuntimeError while it is imported.
    except (ImportError, RuntimeError) as error:
        skipped["torchvision"] = f"cannot be imported ({error}); pillow is its stand-in"
    for feed in feeds:
        stack.callback(feed.close)

    # Levels first.
    checked, failed = _check(feeds, job)
    result: dict[str, Any] = {
        "images": len(job.set),
        "crops": [view.size for view in job.views("exact")],
        "versions": versions,
        "skipped": skipped,
        "subject": SUBJECT,
        "checked": checked,
        "failed": failed,
        "speedup": {},
    }
    if SUBJECT in failed:
        return result
    compared = [feed.name for feed in feeds if feed.name not in failed]
    feeds = [feed for feed in feeds if feed.name in compared]
    if options["parts"]:
        feeds += [reading_feed(job), pillow_decoding_feed(job), augment_feed(job)]

    # Then time, after one round of warm-up.
    images = options["batches"] * job.batch
    measures = {
        feed.name: images_per_cpu_second(feed, images, options["batches"]) for feed in feeds
    }
    for measure in measures.values():
        measure()
    figures = interleave(measures, rounds=options["rounds"])
    result["images_per_cpu_s"] = {
        name: [round(x, 2) for x in values] for name, values in figures.items()
    }
    result["speedup"] = {
        name: {which: round(x, 3) for which, x in ratios(figures[SUBJECT], figures[name]).items()}
        for name in compared
        if name != SUBJECT
    }
    result["profile"] = {
        name: round(1e3 / statistics.median(values), 3) for name, values in figures.items()
    }
    return result


def _check(feeds: Sequence[Feed], job: Job) -> tuple[dict[str, float], dict[str, str]]:
    """Distances of the first batch of each feed from the reference, and faults."""
    specs, ids = job.views("exact"), job.ids(0)
    images = [pillow_decode(data) for data in job.set.read(ids)]
    truth = []
    for number, spec in enumerate(specs, start=1):
        draws = job.draws(ids, number)
        truth.append(
            np.stack([reference_view(image, spec, draws, i) for i, image in enumerate(images)])
        )
    checked: dict[str, float] = {}
    failed: dict[str, str] = {}
    for feed in feeds:
        views = feed.next() or ()
        if [tuple(view.shape) for view in views] != [some.shape for some in truth]:
            failed[feed.name] = f"delivers {[tuple(view.shape) for view in views]}"
            continue
        most, mean = _levels(views, truth, specs)
        subject = feed.name == SUBJECT
        checked[feed.name] = float(f"{most if subject else mean:.3g}")
        if subject and round(most) != 0:
            failed[feed.name] = f"a level is {most:.3g} from the reference; all must be equal"
        elif not mean <= LIMIT:
            failed[feed.name] = f"{mean:.3g} levels from the reference > {LIMIT}"
    return checked, failed


def _levels(
    views: Views, truth: Sequence[np.ndarray], specs: Sequence[ViewSpec]
) -> tuple[float, float]:
    """Largest and mean distance, in levels of 255."""
    apart = [
        np.abs(view.numpy() - some) * 255 * np.array(spec.std)[:, None, None]
        for view, some, spec in zip(views, truth, specs, strict=True)
    ]
    return max(float(some.max()) for some in apart), max(float(some.mean()) for some in apart)
