"""`fastmoco data check` and `fastmoco data stats`: faults and statistics of shards."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from tyro.conf import Positional

from fastmoco.cli.data import CACHE, progress_bar, tell_of_decoder
from fastmoco.cli.images import set_of_folder
from fastmoco.errors import (
    EXIT_FAILED,
    EXIT_FINISHED,
    EXIT_INTERRUPTED,
    EXIT_REFUSED,
    one_line,
    say,
    show,
)
from fastmoco_pipelines.spec import SECONDS_PER_IMAGE, CacheSpec
from fastmoco_pipelines.text import counted, escaped

if TYPE_CHECKING:
    from fastmoco_pipelines.inspecting.report import CheckReport
    from fastmoco_pipelines.inspecting.stats import ShardStats


def check(
    shards: Positional[str],
    *,
    json: Path | None = None,
    quarantine: bool = True,
    quarantine_out: Path | None = None,
    workers: int | None = None,
    shown: Annotated[int, tyro.conf.arg(name="show")] = 20,
    seconds_per_image: float = SECONDS_PER_IMAGE,
    sample: int | None = None,
    seed: int = 0,
    resume: Annotated[bool, tyro.conf.arg(name="continue")] = False,
    cache: Annotated[CacheSpec, tyro.conf.arg(name="")] = CACHE,
) -> int:
    """Read and decode every image, report every fault, and list unusable images in
    quarantine.jsonl.

    The list is written next to the tars; loaders skip the images in it. Tars and servers are never
    changed. The sets of a folder are checked one after the other. Exit code 0: no fault, 1: faults
    found, 2: refused, 130: interrupted.

    Args:
        shards: A path, glob, brace pattern or folder, also a URL with https://, http://, s3:// or
            gs://; or a folder of images, which is packed in the user's cache first.
        json: Write the whole report here as JSON; of each set of a folder in a file of its own,
            with the set's name added.
        quarantine: Write quarantine.jsonl.
        quarantine_out: For shards on a server: folder for that list, named quarantine-PLACE.jsonl;
            default the current folder.
        workers: Decoding processes; default one per core.
        shown: Number of faults, and of notes, to print; the JSON report contains all.
        seconds_per_image: Longest time for decoding one image.
        sample: Check only so many images, drawn at random over the whole set, and report how many
            of all may be bad.
        seed: Of --sample: another seed draws other images.
        resume: Go on with an interrupted check of the same shards and options: unchanged tars
            that it finished are not checked again.
        cache: Where shards of a server are kept.
    """
    from fastmoco_pipelines.inspecting.check import CheckInterruptedError, check_shards
    from fastmoco_pipelines.inspecting.sample_check import check_sample
    from fastmoco_pipelines.sets.patterns import sets_of
    from fastmoco_pipelines.views.decode_pool import ChildLimits

    code = EXIT_FINISHED
    with one_line(EXIT_REFUSED, ValueError, OSError):
        shards = set_of_folder(shards)
        if sample is not None and resume:
            raise ValueError(
                f"sample={sample}: a sample is short and keeps no progress: give --sample or "
                "--continue, not both"
            )
        tell_of_decoder()
        options: dict[str, Any] = {
            "workers": workers,
            "quarantine": quarantine,
            "limits": ChildLimits(seconds=seconds_per_image),
            "cache": cache,
            "remote_lists": quarantine_out,
        }
        sets = sets_of(shards)
        for number, (name, pattern) in enumerate(sets):
            if name:
                show(f"set {name}: {pattern}")
            if sample is not None:
                with progress_bar("checking") as advance:
                    report = check_sample(pattern, sample, seed=seed, progress=advance, **options)
            else:
                try:
                    with progress_bar("checking", unit="bytes") as advance:
                        report = check_shards(
                            pattern, progress=advance, resume=resume, tell=say, **options
                        )
                except CheckInterruptedError as stop:
                    more = {
                        "--json": json,
                        "--quarantine-out": quarantine_out,
                        "--workers": workers,
                        "--show": shown if shown != 20 else None,
                        "--seconds-per-image": (
                            seconds_per_image if seconds_per_image != SECONDS_PER_IMAGE else None
                        ),
                        "--cache-dir": cache.cache_dir or None,
                        "--cache-size-gb": (
                            cache.cache_size_gb
                            if cache.cache_size_gb != CACHE.cache_size_gb
                            else None
                        ),
                        "--no-quarantine": None if quarantine else "",
                    }
                    how = _how_to_go_on(pattern, more) if stop.recorded else ""
                    rest = ", ".join(name for name, _ in sets[number + 1 :])
                    say(f"interrupted, {stop}{how}" + (f"; not checked: {rest}" if rest else ""))
                    return EXIT_INTERRUPTED
            if json is not None:
                json.parent.mkdir(parents=True, exist_ok=True)
                report.write(_of_set(json, name))
            _print_report(report, shown)
            if report.faults:
                code = EXIT_FAILED
    return code


def _of_set(path: Path, name: str) -> Path:
    """A file for one set of several: its name is added."""
    safe = re.sub(r"[^A-Za-z0-9_.-]", "_", name)
    return path.with_name(f"{path.stem}-{safe}{path.suffix}") if name else path


def _how_to_go_on(shards: str, options: Mapping[str, object]) -> str:
    """The command that goes on with an interrupted check; not a URL's secrets, which would remain
    on the screen.

    Args:
        shards: the pattern.
        options: by flag; None: not given, "": a flag without a value.
    """
    from fastmoco_pipelines.text import redact

    if redact(shards) != shards:
        return ": the same command with --continue goes on"
    words = ["fastmoco", "data", "check", shards]
    for flag, value in options.items():
        words += [] if value is None else [flag] if value == "" else [flag, str(value)]
    return f"; to go on: {shlex.join([*words, '--continue'])}"


def stats(
    shards: Positional[str],
    *,
    out: Path | None = None,
    cache: Annotated[CacheSpec, tyro.conf.arg(name="")] = CACHE,
) -> int:
    """Sizes, formats, classes, bytes and aspect ratios of a set, as a table and a picture.

    Reads only the indexes. The sets of a folder come one after the other.

    Args:
        shards: A path, glob, brace pattern or folder, also a URL with https://, http://, s3:// or
            gs://; or a folder of images, which is packed in the user's cache first.
        out: Draw a picture too, e.g. stats.png; of each set of a folder in a file of its own. Needs
            matplotlib.
        cache: Where shards of a server are kept.
    """
    from fastmoco_pipelines.inspecting.stats import draw_stats, measure_shards
    from fastmoco_pipelines.sets.patterns import sets_of

    with one_line(EXIT_REFUSED, ValueError, OSError):
        for name, pattern in sets_of(set_of_folder(shards)):
            if name:
                show(f"set {name}: {pattern}")
            measured = measure_shards(pattern, cache=cache)
            _print_stats(measured)
            if out is not None:
                show(f"wrote {draw_stats(measured, _of_set(out, name))}")
    return EXIT_FINISHED


def _print_report(report: CheckReport, shown: int) -> None:
    from rich.table import Table
    from rich.text import Text

    from fastmoco.errors.terminal import Terminal

    console = Terminal(soft_wrap=True, highlight=False)
    if report.faults:
        by_kind = Table("faults", "kind")
        for kind, count in report.counts().items():
            by_kind.add_row(str(count), kind)
        console.print(by_kind)
    # Text, not markup: names from a tar may hold square brackets.
    for fault in report.faults[:shown]:
        where = ": ".join(part for part in (fault.path or fault.shard, fault.member) if part)
        where += f" ({fault.file})" if fault.file else ""
        console.print(
            Text(f"{where}: {fault.reason.removeprefix(fault.shard + ': ')} [{fault.outcome}]")
        )
    if len(report.faults) > shown:
        console.print(
            f"... and {len(report.faults) - shown} more "
            "(--show N prints more, --json FILE writes all)"
        )
    for note in report.notes[:shown]:
        console.print(Text(escaped(f"note: {note}")))
    if len(report.notes) > shown:
        console.print(f"... and {counted(len(report.notes) - shown, 'more note')}")
    rate = report.total_bytes / 1e6 / max(report.seconds, 1e-9)
    print(
        f"{counted(report.shards, 'shard')}, {report.total_bytes / 1e6:.1f} MB "
        f"in {report.seconds:.1f} s ({rate:.0f} MB/s)"
    )
    if report.sample is not None:
        _print_sample(report)
    if report.restarts:
        ended = counted(report.restarts, "decoding process")
        print(f"{ended} crashed and {'was' if report.restarts == 1 else 'were'} replaced")
    if report.refused_shards:
        alone = report.refused_shards == report.unindexed
        why = "no index yet" if alone else "tar or index is damaged or missing"
        print(f"{counted(report.refused_shards, 'shard')} that a loader refuses: {why}")
    drawn = " drawn" if report.sample is not None else ""
    promised = counted(report.promised, "sample").replace(" ", f"{drawn} ")
    print(f"{promised} = {report.delivered} delivered + {report.quarantined} quarantined")
    if report.left_out:
        what = counted(report.left_out, "further sample")
        print(f"{what} omitted: no index lists {'it' if report.left_out == 1 else 'them'}")
    for path in report.quarantine_files:
        show(f"wrote {path}")
    for path, url in zip(report.quarantine_files, report.uploads, strict=False):
        show(f"copy {path} to {url}: loaders look there, and fastmoco never writes to a server")
    where = " in the sample" if report.sample is not None else ""
    found = f"{counted(len(report.faults), 'fault')}{where}"
    show(found if report.faults else _nothing_found(report))


def _print_sample(report: CheckReport) -> None:
    """What was drawn, and what it means for the rest."""
    assert report.sample is not None  # noqa: S101 - a type: a report on a sample has it
    assert report.bad is not None  # noqa: S101 - a type: a report on a sample has it
    assert report.bad_share_bound is not None  # noqa: S101 - a type: a report on a sample has it
    print(
        f"a sample: {report.sample} of {counted(report.population or 0, 'indexed image')} were "
        f"checked, from {report.sampled_shards} of {counted(report.shards, 'shard')} "
        f"(seed {report.seed}); {report.bad} are bad"
    )
    if report.sample == report.population:
        print(
            "the sample is every image that an index lists; members that no index lists were not "
            "searched for"
        )
        return
    rule = f" (rule of three: 3 / {report.sample})" if not report.bad else ""
    print(
        f"with 95 % confidence at most {100 * report.bad_share_bound:.3g} % of all indexed images "
        f"are bad{rule}"
    )


def _nothing_found(report: CheckReport) -> str:
    """The last line of a report without faults; it is not "clean" if training
    would refuse the set.
    """
    from fastmoco_pipelines.sets.patterns import is_remote

    if report.sample is not None:
        return "no fault in the sample"
    if not report.unindexed:
        return "clean"
    some = (
        f"{report.unindexed} of {counted(report.shards, 'shard')} "
        if report.unindexed < report.shards
        else ""
    )
    out = " --out FOLDER" if is_remote(report.pattern) else ""
    command = f"fastmoco data index {shlex.quote(report.pattern)}{out}"
    return f"no fault; {some}not indexed yet: run `{command}` before training"


def _print_stats(stats: ShardStats) -> None:
    from rich.table import Table

    from fastmoco.errors.terminal import Terminal

    console = Terminal(highlight=False)
    skipped = f", {counted(stats.skipped, 'member')} skipped" if stats.skipped else ""
    print(
        f"{counted(len(stats), 'image')} in {counted(stats.shards, 'shard')}, "
        f"{stats.tar_bytes / 1e6:.1f} MB{skipped}"
    )
    rows = stats.quantiles()
    table = Table("", *next(iter(rows.values())))
    for name, values in rows.items():
        table.add_row(
            name, *(f"{value:.4g}" if value < 1e4 else f"{value:.0f}" for value in values.values())
        )
    console.print(table)
    print("formats: " + ", ".join(f"{kind} {count}" for kind, count in stats.kinds.items()))
    counts = stats.class_counts()
    unlabelled = int((stats.labels < 0).sum())
    if counts:
        shown = [f"{escaped(name)} {count}" for name, count in counts]
        few = ", ".join(shown if len(shown) <= 12 else [*shown[:6], "...", *shown[-5:]])
        print(
            f"{counted(len(counts), 'class')}: {few}"
            + (f"; {counted(unlabelled, 'image')} without a label" if unlabelled else "")
        )
    else:
        print("no labels")
    side = rows["width (pixels)"]["median"], rows["height (pixels)"]["median"]
    if max(side) > 768:
        print(
            f"images of {side[0]:.0f}x{side[1]:.0f} pixels: "
            "`fastmoco data pack --max-side 512` makes decoding cheaper"
        )
