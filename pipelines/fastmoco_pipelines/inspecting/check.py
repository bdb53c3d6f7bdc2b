"""`check_shards`: read and decode everything, report every fault, and write the quarantine list
beside the tars.

Each tar is walked strictly, compared with its index and the manifest, and every image in it is
decoded, by the decoder that training uses, in a disposable process. What is found depends only on
the bytes. No tar is ever changed. Those of a server are checked in copies, and the list is written
to this machine: the user copies it there.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from fastmoco_pipelines.formats.quarantine import Quarantine
from fastmoco_pipelines.inspecting.checked_set import CheckedSet, Meter, Progress, open_checked
from fastmoco_pipelines.inspecting.decode_pool import ChildLimits, DecodePool
from fastmoco_pipelines.inspecting.report import CheckReport
from fastmoco_pipelines.inspecting.tar_check import TarCheck
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores.retries import Limits


def check_shards(
    pattern: str,
    *,
    workers: int | None = None,
    quarantine: bool = True,
    progress: Progress | None = None,
    limits: ChildLimits | None = None,
    cache: CacheSpec | None = None,
    remote_lists: Path | None = None,
    transfers: Limits | None = None,
) -> CheckReport:
    """Check the shards that `pattern` names.

    Args:
        pattern: as for `ShardSet.open`.
        workers: decoding processes; default one for each core.
        quarantine: write `quarantine.jsonl` beside the tars. Lines about tars that are not checked
            stay; an empty list is only written over an older file.
        progress: called with (bytes done, bytes in all), by one thread at a time.
        limits: what one image may cost.
        cache: where copies of shards of a server are kept; None: the default folder and size.
        remote_lists: folder for the lists about shards of a server, quarantine-PLACE.jsonl for each
            of their places; None: the current one. Written unless the list on the server is the
            same already; lines about tars that are not checked, of that list and of an older file,
            stay.
        transfers: times and tries of each transfer.

    Raises:
        ValueError: if the pattern names no shard, or is a local one and `remote_lists` is given.
        ShardError: if a manifest is broken; RemoteError, which is one, if a server fails or a shard
            does not fit into the cache.
        ModuleNotFoundError: if DALI is not installed.
    """
    start = time.perf_counter()
    with open_checked(
        pattern, cache=cache, remote_lists=remote_lists, transfers=transfers
    ) as checked:
        report = checked.report
        report.total_bytes = sum(checked.tars.sizes)
        found = _check(checked, workers, limits, progress)
        if quarantine:
            whole = {(path.parent, path.name) for path in checked.tars.paths}
            checked.write_lists(found, lambda folder, entry: (folder, entry.shard) in whole)
    report.seconds = time.perf_counter() - start
    return report


def _check(
    checked: CheckedSet,
    workers: int | None,
    limits: ChildLimits | None,
    progress: Progress | None,
) -> dict[Path, Quarantine]:
    """Check all tars; returns the entries for the list of each folder."""
    tars = checked.tars
    report = checked.report
    found = {folder: Quarantine() for folder in checked.folders}
    with DecodePool(workers or os.cpu_count() or 1, limits) as pool:
        before = 0
        for number, size in enumerate(tars.sizes):
            meter = Meter(progress, before, report.total_bytes)
            with tars.at_hand(number) as path:
                promise = checked.promises.get(path)
                result = TarCheck(path, promise, checked.places.get(path, "")).run(pool, meter.add)
            report.take(result)
            found[path.parent].update(result.entries)
            before += size
            meter.set(before)
    checked.find_missing(count_samples=True)
    if report.promised != report.delivered + report.quarantined:
        raise AssertionError(
            f"the account does not add up: {report.promised=} {report.delivered=} "
            f"{report.quarantined=}"
        )
    return found
