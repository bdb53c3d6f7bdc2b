"""Tables and progress on a terminal, drawn by rich."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from fastmoco.errors.streams import KEPT, raw
from fastmoco_pipelines.text import shown


class Terminal(Console):
    """A console of rich that writes its own colors and moves of the cursor to a stream, and all
    content as `text.shown` makes it."""

    def __init__(self, stream: TextIO | None = None, **options: Any) -> None:
        """Write to a stream; None: standard output. `options`: of rich's console."""
        super().__init__(file=raw(sys.stdout if stream is None else stream), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Segments of content as they may be shown; rich's own control codes as they are."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(shown(text, keep=KEPT), style)

    def on_broken_pipe(self) -> None:
        """Raise an error, where rich would end the process."""
        raise BrokenPipeError("the terminal is gone")
