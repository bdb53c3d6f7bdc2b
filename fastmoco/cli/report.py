"""`fastmoco report`: one page about one or several runs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from fastmoco.cli.collection import collection_paused
from fastmoco.errors import EXIT_FINISHED, EXIT_REFUSED, RunError, one_line, say, show

if TYPE_CHECKING:
    from fastmoco.run.report.pictures import Extras, Table
    from fastmoco.run.report.reading import ReportRun

NAME = "report.html"
LEAST_INTERVAL = 5
SHARE = 0.1
"""Largest share of the time of --watch in which the page is being made."""


def report(
    runs: Positional[tuple[Path, ...]],
    *,
    out: Path | None = None,
    watch: bool = False,
    interval: int = 60,
    pictures: bool = True,
    shards: str = "",
    chip: str = "",
) -> int:
    """Write a page about runs, one file that needs no network: health, curves, gradients by layer,
    similarities, speed, pictures, checkpoints and configuration; several runs side by side.

    It may be called while a run trains or after an interruption.

    Args:
        runs: Folders of runs, as given to `fastmoco train --out`.
        out: The page; default report.html in the folder of the run.
        watch: Write it again and again until the runs have ended, or until Ctrl-C; an open page
            loads itself again.
        interval: Seconds from one page to the next.
        pictures: View pairs, nearest neighbours, attention maps and a map of the features, by the
            newest checkpoint. They take some seconds to a minute.
        shards: The training set, if it has moved since.
        chip: The GPU of the runs, for their MFU: A100, H100, H200 or B200.
    """
    with one_line(EXIT_REFUSED, ValueError, OSError):
        if not runs:
            raise ValueError("runs=(): give the folder of at least one run")
        if out is None and len(runs) > 1:
            raise ValueError("out=None: several runs need a file for their page: give --out FILE")
        if interval < LEAST_INTERVAL:
            raise ValueError(f"interval={interval}: must be at least {LEAST_INTERVAL} seconds")
        page = _Page(runs, out or runs[0] / NAME, pictures=pictures, shards=shards, chip=chip)
        if watch:
            page.watch(interval)
        else:
            page.write()
            show(f"wrote {page.out}")
    return EXIT_FINISHED


class _Page:
    """The page of some runs, which may be written again."""

    def __init__(
        self, runs: Sequence[Path], out: Path, *, pictures: bool, shards: str, chip: str
    ) -> None:
        from fastmoco.run.folder import FILES
        from fastmoco.run.report.reading import names_of

        if out.name in FILES:
            raise ValueError(f"out={out}: is the name of a file of a run: choose another one")
        if out.is_dir():
            raise IsADirectoryError(21, "Is a directory", str(out))
        existing = next(folder for folder in out.absolute().parents if folder.exists())
        if not os.access(existing, os.W_OK):
            raise ValueError(f"out={out}: {existing} cannot be written; give --out FILE")
        self.out = out
        self._runs = list(zip(runs, names_of(runs), strict=True))
        self._pictures = pictures
        self._shards = shards
        self._chip = chip
        self._made: dict[Path, tuple[object, Any]] = {}
        self._sizes: dict[Path, int | None] = {}
        self._told: set[str] = set()

    def write(self, refresh_s: int = 0) -> bool:
        """Write the page; returns whether a run may still train."""
        # The library of the charts first: without it nothing else is worth the time.
        import plotly.offline  # noqa: F401

        from fastmoco.run.report.page import write_report
        from fastmoco.run.report.reading import read_run

        sizes = {path: _size(path) for path, _ in self._runs}
        found = [read_run(path, name) for path, name in self._runs]
        for run in found:
            for note in run.notes:
                if note not in self._told:
                    self._told.add(note)
                    say(note)
        # One that neither has ended nor is locked may train on another machine: it does if its
        # metrics have grown since the last page.
        grown = [path for path, size in sizes.items() if self._sizes.get(path) != size]
        self._sizes = sizes
        going = [
            run
            for run in found
            if run.state == "running"
            or (run.state not in ("finished", "stopped") and run.folder.path in grown)
        ]
        extras = [self._extras(run) for run in found]
        write_report(found, extras, self.out, refresh_s=refresh_s if going else 0)
        return bool(going)

    def watch(self, interval: int) -> None:
        """Write the page again and again while a run trains."""
        try:
            while True:
                began = time.monotonic()
                if not self.write(interval):
                    break
                took = time.monotonic() - began
                show(f"wrote {self.out}; again in {max(interval, took / SHARE):.0f} s, Ctrl-C ends")
                time.sleep(max(interval, took / SHARE))
        except KeyboardInterrupt:
            self.write()
            show(f"wrote {self.out} for the last time")
            return
        show(f"wrote {self.out}; no run trains any more")

    def _extras(self, run: ReportRun) -> Extras:
        """Tables and pictures of a run; pictures again only if there is another checkpoint."""
        with collection_paused():
            from fastmoco.run.report.pictures import Extras
            from fastmoco.training import report_facts as facts

        pictures: dict[str, Any] = {}
        if self._pictures:
            with collection_paused():
                from fastmoco.training.report_pictures import make_pictures

            newest = facts.newest_checkpoint(run)
            before = self._made.get(run.folder.path)
            if before is None or before[0] != newest:
                made = make_pictures(
                    run, shards=self._shards, on_cpu=run.state == "running", tell=say
                )
                self._made[run.folder.path] = (newest, made)
            pictures = self._made[run.folder.path][1]._asdict()
        return Extras(
            **pictures,
            checkpoints=facts.checkpoint_table(run),
            differences=_differences(run),
            environment=facts.environment_table(run),
            speed=facts.speed_facts(run, self._chip),
            memory=facts.memory_facts(run),
        )


def _size(run: Path) -> int | None:
    """Bytes of the metrics of a run; None without them."""
    from fastmoco.run.folder import RunFolder

    try:
        return RunFolder(run).metrics.stat().st_size
    except OSError:
        return None


def _differences(run: ReportRun) -> Table:
    """The fields in which the config of a run differs from its recipe."""
    from fastmoco.config.serial import to_json
    from fastmoco.recipes import get_recipe
    from fastmoco.run.report.page import flat_config
    from fastmoco.run.report.pictures import Table

    if not run.config:
        return Table(why="The run has no config.json, so its configuration is unknown.")
    name = str(run.config.get("recipe", ""))
    try:
        recipe = flat_config(to_json(get_recipe(name)))
    except (ValueError, RunError) as error:
        return Table(why=f"There is nothing to compare with: {error}.")
    own = flat_config(run.config)
    rows = [
        [field, recipe.get(field, "-"), own.get(field, "-")]
        for field in dict.fromkeys((*own, *recipe))
        if own.get(field) != recipe.get(field)
    ]
    if not rows:
        return Table(why=f"The configuration is that of the recipe {name}.")
    return Table(head=["field", f"recipe {name}", "this run"], rows=rows)
