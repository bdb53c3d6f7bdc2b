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

    def __init__(
        self, stream: TextIO | None = None, *, keeps_width: bool = False, **options: Any
    ) -> None:
        """Write to a stream.

        Args:
            stream: None: standard output.
            keeps_width: write a `?`, or a `.` for an ellipsis, where the stream's encoding lacks a
                character, and not an escape, which is longer than the place for it.
            options: of rich's console.
        """
        super().__init__(file=raw(sys.stdout if stream is None else stream), **options)
        self._keeps_width = keeps_width

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Segments of content as they may be shown; rich's own control codes as they are."""
        for segment in super().render(renderable, options):
            text, style, control = segment
            yield segment if control else Segment(self._fitting(shown(text, keep=KEPT)), style)

    def _fitting(self, text: str) -> str:
        if not self._keeps_width or text.isascii():
            return text
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            plain = text.replace("…", ".").encode(self.encoding, "replace")
            return plain.decode(self.encoding)
        return text

    def on_broken_pipe(self) -> None:
        """Raise an error, where rich would end the process."""
        raise BrokenPipeError("the terminal is gone")
