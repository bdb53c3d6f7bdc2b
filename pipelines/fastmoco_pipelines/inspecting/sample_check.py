"""`check_sample`: some images of a set, drawn at random over all of it, checked as `check_shards`
checks all; and what the faults among them mean for the rest.

Of each tar only the index, the size and the ends are read, and of the images only those that were
drawn. So a sample costs as much as there are tars and drawn images, however many images the set
has. What needs a walk over whole tars is left to the full check: damaged headers, members that no
index lists, names.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastmoco_pipelines.errors import RemoteError, ShardError
from fastmoco_pipelines.formats.index_file import CURE
from fastmoco_pipelines.formats.members import split_name
from fastmoco_pipelines.formats.quarantine import Quarantine
from fastmoco_pipelines.inspecting.checked_set import CheckedSet, Meter, Progress, open_checked
from fastmoco_pipelines.inspecting.draw import draw_sample, share_bound
from fastmoco_pipelines.inspecting.report import CheckReport
from fastmoco_pipelines.inspecting.tar_check import Candidate, TarCheck
from fastmoco_pipelines.sets.remote_set import THREADS
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores.retries import Limits
from fastmoco_pipelines.views.decode_pool import ChildLimits, DecodePool, Item

_GROUP_IMAGES = 512
_GROUP_BYTES = 128 << 20
"""Images that are at hand at a time, as copies on the disk where they are a server's."""


def check_sample(
    pattern: str,
    count: int,
    *,
    seed: int = 0,
    workers: int | None = None,
    quarantine: bool = True,
    progress: Progress | None = None,
    limits: ChildLimits | None = None,
    cache: CacheSpec | None = None,
    remote_lists: Path | None = None,
    transfers: Limits | None = None,
) -> CheckReport:
    """Check `count` images of the shards that `pattern` names.

    Every image that a fitting index lists is as likely to be drawn as any other one. The choice
    depends on the seed and the set alone. Tars without a fitting index are faults, and nothing is
    drawn from them. In `quarantine.jsonl` only the lines about drawn images are replaced.

    Args:
        pattern: as for `ShardSet.open`.
        count: images to draw; all, if the set has no more.
        seed: of the draw.
        workers, quarantine, progress, limits, cache, remote_lists, transfers: as for
            `check_shards`; `progress` counts the bytes of drawn images.

    Raises:
        ValueError: if `count` is below 1, the pattern names no shard, or no tar has a fitting
            index.
        ShardError, ModuleNotFoundError: as for `check_shards`.
    """
    start = time.perf_counter()
    if count < 1:
        raise ValueError(f"sample={count}: must be at least 1")
    with open_checked(
        pattern, cache=cache, remote_lists=remote_lists, transfers=transfers
    ) as checked:
        report = checked.report
        checks, sizes = _survey(checked)
        population = int(sizes.sum())
        if not population:
            raise ValueError(
                f"{report.pattern}: no tar has an index that fits it, so no image can be drawn: "
                f"{CURE}, or check all, without --sample"
            )
        drawn = draw_sample(population, min(count, population), seed)
        with DecodePool(workers or os.cpu_count() or 1, limits) as pool:
            looked_at = _check_drawn(checked, checks, sizes, drawn, pool, progress)
            report.restarts = pool.restarts
        found = {folder: Quarantine() for folder in checked.folders}
        for check in checks:
            report.take(check.result)
            found[check.path.parent].update(check.result.entries)
        checked.find_missing(count_samples=False)
        report.sample = len(drawn)
        report.population = population
        report.seed = seed
        report.bad = report.quarantined
        whole = len(drawn) == population
        report.bad_share_bound = (
            report.bad / population if whole else share_bound(report.bad, len(drawn))
        )
        if quarantine:
            checked.write_lists(found, lambda folder, entry: (folder, *entry.identity) in looked_at)
    report.seconds = time.perf_counter() - start
    return report


def _survey(checked: CheckedSet) -> tuple[list[TarCheck], NDArray[np.int64]]:
    """For each tar a check, with what is wrong with the tar or its index, and the number of images
    that can be drawn from it."""

    def look(number: int) -> tuple[TarCheck, int]:
        path = checked.tars.paths[number]
        check = TarCheck(path, checked.promises.get(path), checked.places.get(path, ""))

        def refuse(kind: str, reason: str) -> tuple[TarCheck, int]:
            check.fault("", kind, reason)
            check.result.refused = True
            return check, 0

        try:
            index = checked.tars.index(number)
            if index is not None:
                index.records  # noqa: B018  # broken records, too, are a fault
        except RemoteError:
            raise
        except ShardError as error:
            return refuse("broken index", str(error))
        if index is None:
            check.result.unindexed = True
            return refuse(
                "not indexed",
                f"has no index beside it, so none of its images could be drawn: {CURE}",
            )
        if not checked.tars.fits(number, index.header):
            return refuse(
                "stale index",
                f"{os.path.basename(index.name)} was made for another state of this tar (size or ends "
                "differ), so none of its images could be drawn: check all of it, without --sample",
            )
        check.fits = True
        check.compare_promise(index.header.samples)
        return check, index.header.samples

    with ThreadPoolExecutor(THREADS, thread_name_prefix="fastmoco-survey") as pool:
        looks = list(pool.map(look, range(len(checked.tars.paths))))
    return [check for check, _ in looks], np.array([size for _, size in looks], dtype=np.int64)


def _check_drawn(
    checked: CheckedSet,
    checks: Sequence[TarCheck],
    sizes: NDArray[np.int64],
    drawn: NDArray[np.int64],
    pool: DecodePool,
    progress: Progress | None,
) -> set[tuple[Path, str, int, int, int]]:
    """Check the drawn images, group by group; returns folder and identity of each of them."""
    report = checked.report
    ends = np.cumsum(sizes)
    numbers = np.searchsorted(ends, drawn, side="right")
    rows = drawn - (ends - sizes)[numbers]
    report.sampled_shards = len(np.unique(numbers))

    looked_at = set()
    meter = Meter(progress, 0, len(drawn))
    places = zip(numbers.tolist(), rows.tolist(), strict=True)
    for group in _groups(checked, checks, places):
        wanted = {number: [image.item for image in images] for number, images in group.items()}
        with checked.tars.images(wanted):
            results = pool.run([item for items in wanted.values() for item in items], meter.count)
        images = ((checks[number], image) for number, some in group.items() for image in some)
        for (check, image), decoded in zip(images, results, strict=True):
            check.judge(image, decoded)
            item = image.item
            assert item.crc32 is not None  # noqa: S101 - a type: read with the image
            report.total_bytes += item.size
            identity = (check.path.name, item.offset, item.size, item.crc32)
            looked_at.add((check.path.parent, *identity))
    return looked_at


def _groups(
    checked: CheckedSet, checks: Sequence[TarCheck], places: Iterable[tuple[int, int]]
) -> Iterator[dict[int, list[Candidate]]]:
    """The images at some places (tar, row), by tar, in groups that are at hand together."""
    group: dict[int, list[Candidate]] = {}
    count = 0
    size = 0
    for number, some in groupby(places, key=lambda place: place[0]):
        check = checks[number]
        images = _candidates(checked, number, check, [row for _, row in some])
        for image in images:
            if count and (count == _GROUP_IMAGES or size + image.item.size > _GROUP_BYTES):
                yield group
                group = {}
                count = size = 0
            group.setdefault(number, []).append(image)
            count += 1
            size += image.item.size
    yield group


def _candidates(
    checked: CheckedSet, number: int, check: TarCheck, rows: Sequence[int]
) -> list[Candidate]:
    """The images of some rows of an index, which is read again: all of them may be too large for
    the memory."""
    index = checked.tars.index(number)
    if index is None or max(rows) >= index.header.samples:
        raise ShardError(f"{check.path.name}: its index has changed during the check: start again")
    images = []
    for row in rows:
        key, extension = split_name(index.member(row))
        offset, size, crc32, _, height, width = index.records[row].tolist()
        item = Item(str(check.path), offset, size, crc32)
        path = index.path(row)
        file = "" if path == index.member(row) else path
        images.append(Candidate(key, extension, item, row, (height, width), file))
    return images
