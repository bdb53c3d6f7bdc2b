"""`fastmoco doctor`: what works on this machine, and the cure for what does not."""

from __future__ import annotations

import json as json_text
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastmoco.cli.opening import say_first
from fastmoco.cli.output import width
from fastmoco.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REFUSED, one_line, show
from fastmoco_pipelines.spec import require

if TYPE_CHECKING:
    from fastmoco.training.checkup.findings import Checkup, Finding

WORDS = {"works": "ok", "absent": "-", "weak": "note", "broken": "FAULT"}
"""How a state is shown."""


def doctor(*, json: bool = False, seconds: float = 90.0) -> int:
    """Try what training uses on this machine, and name the cure for what does not work.

    Reports Python, packages, CPU, memory, disks, compiler, torch, GPUs, the decoder, Triton, NCCL,
    attention and the optional libraries. Each is tried by a process of its own, so none that
    crashes or hangs ends this command. Nothing is changed. Exit code 0: training can run here, 1:
    it cannot.

    Args:
        json: Print one JSON object in place of the table.
        seconds: Longest time for each of them.
    """
    from fastmoco.training.checkup import run

    with one_line(EXIT_REFUSED, ValueError):
        require(seconds > 0, "seconds", seconds, "must be above 0")
    say_first("trying each library in a process of its own, about half a minute")
    found = run.check_machine(limit_s=seconds)
    if json:
        print(json_text.dumps(found.as_json(), indent=1))
    else:
        for line in lines(found):
            show(line)
    return EXIT_FAILED if found.obstacles else EXIT_FINISHED


def lines(found: Checkup) -> Iterator[str]:
    """The table, and a line with the result."""
    column = max(len(entry.name) for entry in found.findings) + 2
    for entry in found.findings:
        yield from _entry(entry, column)
    yield ""
    obstacles = [entry.name for entry in found.obstacles]
    where = "the GPU" if found.device == "cuda" else "the CPU"
    yield (
        f"training cannot run here: {', '.join(obstacles)}"
        if obstacles
        else f"training can run here, on {where}"
    )


def _entry(entry: Finding, column: int) -> Iterator[str]:
    """A finding; its cure is a line by itself, which can be copied."""
    margin = " " * (7 + column)
    first, *more = textwrap.wrap(
        entry.text, max(30, width() - len(margin)), break_on_hyphens=False, break_long_words=False
    )
    yield f"{WORDS[entry.state]:<7}{entry.name:<{column}}{first}"
    yield from (margin + line for line in more)
    if entry.cure and entry.state != "works":
        yield f"{margin}cure: {entry.cure}"
