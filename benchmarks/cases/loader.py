"""The training loader against torchvision's PIL transforms, DALI's stock graph
and webdataset, on the same shards.

Images per CPU-second: processor time of this process and its workers between two idle moments,
because wall-clock time of a shared machine is unreliable. Every feed is checked before timing:
finite float32 views of plausible levels, and fastmoco's against Pillow on the same draws. Without a
passing check there are no ratios. `python -m benchmarks.photos` makes shards of photographs. On a
GPU images/s by wall-clock time are reported too.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cpu_time import images_per_cpu_second, images_per_second
from benchmarks.dali_stock import decoding_feed, stock_feed
from benchmarks.loading import (
    Color,
    Feed,
    Job,
    augment_feed,
    fastmoco_feed,
    pillow_decode,
    pillow_decoding_feed,
    pillow_feed,
    reading_feed,
    webdataset_feed,
)
from benchmarks.measure import interleave, ratios
from benchmarks.photos import sample_shards
from fastmoco_pipelines.sets.patterns import expand_shards
from fastmoco_pipelines.views.reference import reference_view

NAME = "loader"
DEFAULTS = {
    "shards": "",
    "packed256": "",
    "packed512": "",
    "device": "auto",
    "size": 224,
    "batch": 32,
    "batches": 3,
    "rounds": 5,
    "threads": "1",
    "workers": 2,
    "memory": 20,
    "feeds": "",
}
QUICK = {"size": 96, "batch": 8, "batches": 1, "rounds": 2, "workers": 1, "memory": 5}
SUBJECT, DALI = "fastmoco exact", "fastmoco dali"
CHECKED_IMAGES = 64
"""Images of the first batch that are compared with Pillow, which makes about 150 per second."""
LIMITS = {
    "cpu": {"fastmoco exact": 1e-4, "fastmoco dali": 20.0, "pillow": 0.05},
    "cuda": {"fastmoco exact": 1.5, "fastmoco dali": 20.0, "pillow": 0.05},
}
"""Mean distance from the reference in levels of 255, by device. On GPUs DALI resizes; Pillow 13
resizes some windows in another order; the other augmentation and order of DALI only have a sanity
check."""
PARTS = ("read and draw", "decode dali", "decode pillow", "exact views alone")
"""Parts of the work: timed, but not compared."""


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Check, then measure.

    Args:
        options: `shards` (empty: cut from the two sample photographs of scikit-learn); `packed256`
            and `packed512`, the same images packed with that `max_side`; `device` ("auto", "cpu" or
            "gpu"); `size` of a view; images of a `batch`; `batches` of a turn; `rounds`; `threads`
            of DALI and torch, further ones after a comma are the scaling line; `workers` of torch's
            DataLoader; `memory`: steps over which the memory is followed; `feeds`: prefix of their
            names, without the parts of the work (empty: all feeds, and the parts).

    Returns:
        Only `skipped_because` if DALI, or webdataset for packing shards, is missing. Otherwise
        `checked` and `failed` by feed; `images_per_cpu_s` by feed and round; `speedup` of fastmoco
        with exact colors over the others and `speedup_dali` with DALI's; gains by `packed` shards;
        `profile` in CPU milliseconds per image; `stages` of the loader by its own measurement;
        `scaling`; `memory`.
    """
    if options["device"] not in ("auto", "cpu", "gpu"):
        raise ValueError(f"device={options['device']!r}: is auto, cpu or gpu")
    # webdataset packs the sample shards; given shards exist.
    for module in ("nvidia.dali", *(() if options["shards"] else ("webdataset",))):
        if not _has(module):
            return {"skipped_because": f"the loader needs {module}, which is not here"}
    available = torch.cuda.is_available()
    on_gpu = available if options["device"] == "auto" else options["device"] == "gpu"
    threads = [int(word) for word in options["threads"].split(",")]
    before = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        shards = options["shards"] or sample_shards(
            Path(stack.enter_context(tempfile.TemporaryDirectory())), options["batch"]
        )
        job = Job(
            shards=shards,
            size=options["size"],
            batch=options["batch"],
            device=torch.device("cuda" if on_gpu else "cpu"),
            threads=threads[0],
        )
        return _run(job, options, threads[1:], stack)


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # nor its parent package
        return False


def _feeds(job: Job, options: dict[str, Any], skipped: dict[str, str]) -> list[Feed]:
    """The selected feeds that run on this machine."""
    wanted = options["feeds"]
    makers: dict[str, Callable[[], Feed]] = {
        # Workers are forked, so start them before DALI has threads.
        "webdataset": lambda: webdataset_feed(job, options["workers"], expand_shards(job.shards)),
        SUBJECT: lambda: fastmoco_feed(job, "exact"),
        DALI: lambda: fastmoco_feed(job, "dali"),
        "pillow": lambda: pillow_feed(job),
        "dali stock": lambda: stock_feed(job),
    }
    if not _has("webdataset"):
        del makers["webdataset"]
        skipped["webdataset"] = "webdataset is not here"
    return [make() for name, make in makers.items() if name.startswith(wanted)]


def _run(
    job: Job, options: dict[str, Any], more_threads: Sequence[int], stack: ExitStack
) -> dict[str, Any]:
    def added(feed: Feed) -> Feed:
        stack.callback(feed.close)
        return feed

    skipped: dict[str, str] = {}
    feeds = [added(feed) for feed in _feeds(job, options, skipped)]
    checked, failed = check(feeds, job)
    result: dict[str, Any] = {
        "images": len(job.set),
        "checked": checked,
        "failed": failed,
        "speedup": {},
    }
    result |= {"skipped": skipped, "subject": SUBJECT}
    if SUBJECT in failed:
        return result
    feeds = [feed for feed in feeds if feed.name not in failed]
    compared = [feed.name for feed in feeds]
    if not options["feeds"]:
        feeds += map(
            added,
            (reading_feed(job), decoding_feed(job), pillow_decoding_feed(job), augment_feed(job)),
        )

    # Further feeds: the same images packed smaller, and more threads.
    packed: list[str] = []
    for side in ("packed256", "packed512"):
        if options[side]:
            colors: tuple[Color, Color] = ("exact", "dali")
            feeds += [
                added(fastmoco_feed(replace(job, shards=options[side]), c, f"{side} {c}"))
                for c in colors
            ]
            packed += [f"{side} {color}" for color in colors]
    for feed in feeds:
        feed.next()  # all thread pools have read their number by now
    scaled = [
        added(fastmoco_feed(replace(job, threads=n), "exact", f"{n} threads")) for n in more_threads
    ]
    for feed in scaled:
        feed.next()
    torch.set_num_threads(job.threads)
    feeds += scaled

    # Images per CPU-second of all feeds, after one round of warm-up.
    rounds, batches = options["rounds"], options["batches"]
    images = batches * job.batch
    subjects = [feed for feed in feeds if feed.loader is not None and feed.name in compared]
    earlier = {feed.name: feed.loader.figures() for feed in subjects if feed.loader}
    measures = {feed.name: images_per_cpu_second(feed, images, batches) for feed in feeds}
    for measure in measures.values():
        measure()
    figures = interleave(measures, rounds=rounds)

    result["images_per_cpu_s"] = {
        name: [round(x, 1) for x in values] for name, values in figures.items()
    }
    result["median"] = {
        name: round(statistics.median(values), 1) for name, values in figures.items()
    }
    result["speedup"] = {
        name: _ratio(figures, SUBJECT, name) for name in compared if name != SUBJECT
    }
    result["speedup_dali"] = {
        name: _ratio(figures, DALI, name) for name in compared if DALI in compared and name != DALI
    }
    result["packed"] = {
        name: _ratio(figures, name, f"fastmoco {name.split()[1]}") for name in packed
    }
    if not options["feeds"]:
        result["profile"] = _profile(figures)
    result["stages"] = {
        feed.name: (feed.loader.figures() - earlier[feed.name]).metrics()
        for feed in subjects
        if feed.loader
    }

    # Images per second by wall-clock time: of every feed on a GPU, of the scaling line elsewhere.
    clocked = {feed.name: feed for feed in feeds if feed.name in compared or feed.name in packed}
    if job.device.type != "cuda":
        clocked = {}
    clocked |= {feed.name: feed for feed in feeds if scaled and feed.name == SUBJECT}
    clocked |= {feed.name: feed for feed in scaled}
    by_clock = {
        name: images_per_second(feed, images, batches, job.device) for name, feed in clocked.items()
    }
    seconds = interleave(by_clock, rounds=rounds)
    result["images_per_s"] = {
        name: [round(x, 1) for x in values] for name, values in seconds.items()
    }
    if job.device.type == "cuda":  # per image, for the table of benchmarks.gpu
        result["milliseconds"] = {
            name: round(1e3 / statistics.median(x), 4) for name, x in seconds.items()
        }
    result["scaling"] = {
        feed.name: {
            "images_per_s": _ratio(seconds, feed.name, SUBJECT),
            "per_cpu_s": _ratio(figures, feed.name, SUBJECT),
        }
        for feed in scaled
    }
    result["memory"] = memory(job, options["memory"])
    return result


def check(feeds: Sequence[Feed], job: Job) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Figures and faults of the first batch of every feed; call it before any
    other batch is taken.
    """
    checked: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for feed in feeds:
        views = feed.next()
        if views is None or len(views) != 2:
            failed[feed.name] = "delivers no pair of views"
            continue
        fault = next((found for view in views if (found := _implausible(view, job))), "")
        figures = (
            {"mean": float(torch.stack(views).mean()), "std": float(torch.stack(views).std())}
            if not fault
            else {}
        )
        limit = LIMITS[job.device.type].get(feed.name)
        if not fault and limit is not None:
            figures["levels"] = _levels(views, job)
            if not figures["levels"] <= limit:
                fault = f"{figures['levels']:.3g} levels from Pillow > {limit}"
        checked[feed.name] = {name: float(f"{value:.3g}") for name, value in figures.items()}
        if fault:
            failed[feed.name] = fault
    return checked, failed


def _implausible(view: torch.Tensor, job: Job) -> str:
    """The fault of one view of a batch, or ""."""
    expected = (job.batch, 3, job.size, job.size)
    if (
        tuple(view.shape) != expected
        or view.dtype != torch.float32
        or view.device.type != job.device.type
    ):
        return (
            f"{view.dtype} {tuple(view.shape)} on {view.device.type}, "
            f"not float32 {expected} on {job.device.type}"
        )
    if not torch.isfinite(view).all():
        return "values that are not finite"
    mean, std, least = float(view.mean()), float(view.std()), float(view.flatten(1).std(1).max())
    if not (abs(mean) < 1.8 and 0.1 < std < 2.5 and least > 0.05):
        return f"mean {mean:.3g} and deviation {std:.3g} are not those of pictures"
    if torch.equal(view[0], view[-1]):
        return "the same picture again and again"
    return ""


def _levels(views: Sequence[torch.Tensor], job: Job) -> float:
    """Mean distance of the first images from Pillow's views with the same
    draws, in levels of 255.
    """
    ids = job.ids(0)[:CHECKED_IMAGES]
    images = [pillow_decode(data) for data in job.set.read(ids)]
    distances = []
    for number, (view, spec) in enumerate(zip(views, job.views("exact"), strict=True), start=1):
        draws = job.draws(ids, number)
        truth = np.stack([reference_view(image, spec, draws, i) for i, image in enumerate(images)])
        apart = (
            np.abs(view[: len(ids)].cpu().numpy() - truth) * 255 * np.array(spec.std)[:, None, None]
        )
        distances.append(float(apart.mean()))
    return max(distances)


def _ratio(
    figures: Mapping[str, list[float]], numerator: str, denominator: str
) -> dict[str, float]:
    return {
        name: round(x, 3) for name, x in ratios(figures[numerator], figures[denominator]).items()
    }


def _profile(figures: Mapping[str, list[float]]) -> dict[str, float]:
    """Medians of CPU milliseconds per image of the parts of fastmoco's loader with exact colors."""
    ms = {name: 1e3 / statistics.median(values) for name, values in figures.items()}
    shown = {name: ms[name] for name in (*PARTS, SUBJECT, "pillow") if name in ms}
    decode = ms["decode dali"]  # reading included, drawing not
    shown["rest: draw, hand over"] = ms[SUBJECT] - decode - ms["exact views alone"]
    if "pillow" in ms:
        shown["allowed at 2.5 x pillow"] = ms["pillow"] / 2.5
    return {name: round(value, 3) for name, value in shown.items()}


def memory(job: Job, steps: int) -> dict[str, Any]:
    """Resident MB of this process after each fifth of some steps of fastmoco's loader."""
    on_gpu = job.device.type == "cuda"
    free = torch.cuda.mem_get_info()[0] if on_gpu else 0
    feed = fastmoco_feed(job, "exact")
    try:
        resident = []
        for fifth in range(5):
            for _ in range(fifth * steps // 5, (fifth + 1) * steps // 5):
                feed.next()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1))
        # From the driver, because DALI does not allocate through torch.
        device = (
            {"device_mb": round((free - torch.cuda.mem_get_info()[0]) / 1e6, 1)} if on_gpu else {}
        )
    finally:
        feed.close()
    return {
        "steps": steps,
        "resident_mb": resident,
        "growth_mb": round(resident[-1] - resident[0], 1),
        **device,
    }
