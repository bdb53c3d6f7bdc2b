"""`fastmoco runs`: the runs below a folder, one a row."""

from __future__ import annotations

import json as json_module
import time
from pathlib import Path

from tyro.conf import Positional

from fastmoco.errors import EXIT_FINISHED, EXIT_REFUSED, one_line, say
from fastmoco.errors.terminal import Terminal
from fastmoco.run.listing import RunLine, find_runs
from fastmoco_pipelines.text import escaped


def runs(folder: Positional[Path] = Path("runs"), *, json: bool = False) -> int:
    """List the runs below a folder, those that were written last first.

    Running: a process of this machine holds the lock of the run. Elsewhere: it began on another
    machine, where it may still train. Stopped: saved on a signal; the same command continues. Failed:
    neither finished, nor stopped, nor running.

    Args:
        folder: Folder that contains folders of runs, at any depth up to eight; or of one run.
        json: Print a list of JSON instead of a table.
    """
    with one_line(EXIT_REFUSED, OSError):
        found, notes = find_runs(folder)
    for note in notes:
        say(note)
    if json:
        print(json_module.dumps([run.to_json() for run in found], indent=2))
        return EXIT_FINISHED
    if not found:
        print(f"no runs in {escaped(str(folder))} or below")
        return EXIT_FINISHED
    _print(found, folder)
    return EXIT_FINISHED


def _print(found: list[RunLine], folder: Path) -> None:
    """A table for the window; in a narrow one, or elsewhere than on a terminal, no column is cut."""
    from rich.box import SIMPLE
    from rich.table import Table

    console = Terminal(highlight=False, markup=False)  # a name may have brackets
    hosts = len({run.host for run in found}) > 1
    heading = ["run", "state", "step", "kNN", "best", "images/s", "written"]
    heading += ["host"] * hosts + ["recipe"]
    rows = [_row(run, folder, hosts) for run in found]
    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]
    whole = sum(widths) + 2 * len(widths)
    if console.is_terminal and whole > console.width:
        _print_blocks(console, found, folder)
        return
    console.width = max(console.width, whole)
    table = Table(*heading, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for run in found:
        if run.fault:
            console.print(f"{_name(run, folder)}: {run.fault}", soft_wrap=True)


def _print_blocks(console: Terminal, found: list[RunLine], folder: Path) -> None:
    """Some lines a run."""
    for run in found:
        name, state, step, knn, best, speed, written, _, recipe = _row(run, folder, hosts=True)
        console.print(f"{name}  {state}", soft_wrap=True)
        line = ""
        for part in (step, f"kNN {knn} (best {best})", f"{speed} images/s", recipe, written):
            if line and len(line) + 2 + len(part) > console.width:
                console.print(line)
                line = ""
            line += f"  {part}"
        console.print(line)
        if run.fault:
            console.print(f"  {run.fault}")


def _name(run: RunLine, folder: Path) -> str:
    path = Path(run.path)
    inside = path != folder and path.is_relative_to(folder)
    return escaped(str(path.relative_to(folder) if inside else path))


def _row(run: RunLine, folder: Path, hosts: bool) -> list[str]:
    """The cells of a run."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    total = "?" if run.total_steps is None else f"{run.total_steps:,}"
    return [
        _name(run, folder),
        run.state,
        f"{run.step:,}/{total}" if run.step is not None else f"-/{total}",
        share(run.knn),
        share(run.knn_best),
        "-" if run.images_per_s is None else f"{run.images_per_s:,.0f}",
        "-" if run.written is None else _at(run.written),
        *([escaped(run.host or "-")] if hosts else []),
        escaped(run.recipe or "-"),
    ]


def _at(seconds: float) -> str:
    """A time of this machine's zone."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
