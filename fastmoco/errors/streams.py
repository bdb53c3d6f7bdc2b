"""Standard output and error as a command uses them: whatever is written passes `text.shown`.

Names of files, members of a tar, classes, markers of checkpoints, replies of servers and messages of
libraries are shown, also in tracebacks and warnings. None of them can steer the terminal, and a URL
among them loses its secrets. What a name could do with a line break is prevented where it is shown
(`errors.show`, `errors.say`): here a line break is one.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from fastmoco_pipelines.text import shown

KEPT = "\n\t"
"""Characters that stay although they are not printable."""


def open_closed_streams() -> None:
    """Lead standard input, output and error to the null device where they are closed (`>&-`).

    Else the next file that is opened takes their number, and what a library prints, or a child, is
    written into it.
    """
    streams = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
    # All numbers first: a file opened for one stream would take that of the next.
    for number, (name, _) in enumerate(streams):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)  # another file may have it by now
            except OSError:
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # takes the lowest
    for name, mode in streams:
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode, encoding="utf-8")  # noqa: SIM115 - for good
            setattr(sys, name, stream)


class ShownStream:
    """A text stream whose lines are shown as by `text.shown`; all else is that of the stream."""

    def __init__(self, raw: TextIO) -> None:
        self.raw = raw
        """The stream itself, for what moves the cursor on purpose."""

    def write(self, text: str) -> int:
        """Write a text as it may be shown."""
        self.raw.write(shown(text, keep=KEPT))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write lines as they may be shown."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def as_shown(stream: TextIO) -> TextIO:
    """A stream whose lines are shown as by `text.shown`; the same one if they are already."""
    wrapped: Any = stream if isinstance(stream, ShownStream) else ShownStream(stream)
    found: TextIO = wrapped
    return found


def raw(stream: TextIO) -> TextIO:
    """The stream below, for colors and a table that is drawn in place. What is written there must
    have passed `text.shown` before."""
    found: TextIO = stream.raw if isinstance(stream, ShownStream) else stream
    return found


@contextlib.contextmanager
def shown_streams(*, for_good: bool) -> Iterator[None]:
    """A context in which all that this process writes to standard output and error is shown as by
    `text.shown`.

    Args:
        for_good: also afterwards, because the process ends and may still show a traceback.
    """
    before = sys.stdout, sys.stderr
    # A stream is None where its descriptor is closed.
    sys.stdout, sys.stderr = (as_shown(one) if one is not None else one for one in before)
    try:
        yield
    finally:
        if not for_good:
            sys.stdout, sys.stderr = before
