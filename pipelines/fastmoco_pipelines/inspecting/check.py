"""`check_shards`: read and decode everything, report every fault, and write the quarantine list
beside the tars.

Each tar is walked strictly, compared with its index and the manifest, and every image in it is
decoded, by the decoder that training uses, in a disposable process. What is found depends only on
the bytes. No tar is ever changed. Those of a server are checked in copies, and the list is written
to this machine: the user copies it there.

The result of each tar is recorded as soon as it is there (progress_file.py), so that a check which
goes on later ends with the same report.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fastmoco_pipelines.formats.quarantine import Quarantine
from fastmoco_pipelines.inspecting.checked_set import CheckedSet, Meter, Progress, open_checked
from fastmoco_pipelines.inspecting.progress_file import ProgressFile, Tell, places_for, versions
from fastmoco_pipelines.inspecting.report import CheckReport, TarResult
from fastmoco_pipelines.inspecting.tar_check import TarCheck
from fastmoco_pipelines.sets.remote_set import THREADS
from fastmoco_pipelines.spec import CacheSpec
from fastmoco_pipelines.stores.retries import Limits
from fastmoco_pipelines.views.decode_pool import ChildLimits, DecodePool


class CheckInterruptedError(KeyboardInterrupt):
    """Ctrl-C during a check. `recorded` of `total` tars are done and need not be checked again."""

    def __init__(self, recorded: int, total: int) -> None:
        super().__init__(f"{recorded} of {total} tars are checked")
        self.recorded = recorded
        self.total = total


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
    resume: bool = False,
    tell: Tell = lambda text: None,
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
        resume: take over what an interrupted check of the same shards, with the same limits and
            versions, has found in tars that are unchanged since. The report is the same as that of
            a check from the beginning, but for its times.
        tell: receives sentences for the user about an interrupted check.

    Raises:
        CheckInterruptedError: instead of KeyboardInterrupt.
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
        record = _progress_file(checked, limits or ChildLimits(), quarantine, resume, tell)
        try:
            found = _check(checked, workers, limits, progress, record, tell)
            if quarantine:
                whole = {(path.parent, path.name) for path in checked.tars.paths}
                checked.write_lists(found, lambda folder, entry: (folder, entry.shard) in whole)
            else:
                report.refused_shards += sum(len(entries.checked) for entries in found.values())
        except KeyboardInterrupt as stop:
            raise CheckInterruptedError(record.recorded, report.shards) from stop
        except BaseException:
            if record.recorded:
                tell(
                    f"{record.recorded} of {report.shards} tars are checked: --continue goes on "
                    "with the others"
                )
            raise
        else:
            record.finish()
        finally:
            record.close()
    report.seconds = time.perf_counter() - start
    return report


def _progress_file(
    checked: CheckedSet, limits: ChildLimits, quarantine: bool, resume: bool, tell: Tell
) -> ProgressFile:
    terms: dict[str, Any] = {
        "shards": checked.identity,
        "seconds_per_image": limits.seconds,
        "memory_bytes": limits.memory_bytes,
        **versions(),
    }
    folder, place = checked.list_place()
    places = places_for(folder, place, checked.identity, beside=quarantine)
    return ProgressFile(places, terms, resume=resume, tell=tell)


def _check(
    checked: CheckedSet,
    workers: int | None,
    limits: ChildLimits | None,
    progress: Progress | None,
    record: ProgressFile,
    tell: Tell,
) -> dict[Path, Quarantine]:
    """Check all tars; returns the entries for the list of each folder."""
    tars = checked.tars
    report = checked.report
    found = {folder: Quarantine() for folder in checked.folders}
    taken = _take_over(checked, record, tell)
    tars.skip(taken)
    with DecodePool(workers or os.cpu_count() or 1, limits) as pool:
        before = 0
        for number, size in enumerate(tars.sizes):
            result = taken.get(number)
            if result is None:
                meter = Meter(progress, before, report.total_bytes)
                result = _check_tar(checked, number, pool, meter, record)
                meter.set(before + size)
            report.take(result)
            entries = found[tars.paths[number].parent]
            entries.update(result.entries)
            if result.checked is not None:
                entries.checked[result.checked.identity] = result.checked
            before += size
        Meter(progress, before, report.total_bytes).set(before)
    checked.find_missing(count_samples=True)
    if report.promised != report.delivered + report.quarantined:
        raise AssertionError(
            f"the account does not add up: {report.promised=} {report.delivered=} "
            f"{report.quarantined=}"
        )
    return found


def _check_tar(
    checked: CheckedSet, number: int, pool: DecodePool, meter: Meter, record: ProgressFile
) -> TarResult:
    """Check one tar and record the result."""
    tars = checked.tars
    path = tars.paths[number]
    with tars.at_hand(number):
        # Before it is read: if it changes meanwhile, a later check finds another state.
        state = tars.state_at_hand(number)
        check = TarCheck(path, checked.promises.get(path), checked.places.get(path, ""))
        result = check.run(pool, meter.add)
    if state is not None and len(tars.paths) > 1:
        record.add(checked.name(number), _state(checked, number, state), result)
    return result


def _take_over(checked: CheckedSet, record: ProgressFile, tell: Tell) -> dict[int, TarResult]:
    """The results, by number, of the tars that are in the state in which they were checked."""
    known = {
        number: record.known[name]
        for number in range(len(checked.tars.paths))
        if (name := checked.name(number)) in record.known
    }
    if not known:
        return {}
    with ThreadPoolExecutor(THREADS, thread_name_prefix="fastmoco-state") as pool:
        states = dict(zip(known, pool.map(checked.tars.state, known), strict=True))
    taken = {
        number: known[number].result
        for number, state in states.items()
        if state is not None and _state(checked, number, state) == known[number].state
    }
    changed = len(known) - len(taken)
    again = f"; {changed} have changed since and are checked again" if changed else ""
    tell(f"{len(taken)} of {len(checked.tars.paths)} tars are checked already{again}")
    return taken


def _state(checked: CheckedSet, number: int, state: dict[str, Any]) -> dict[str, Any]:
    """All that the result of a tar depends on, beside the terms of the check."""
    path = checked.tars.paths[number]
    return state | {
        "promise": checked.promises.get(path),
        "place": checked.places.get(path, ""),
    }
