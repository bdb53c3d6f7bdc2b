"""Docstrings as the reference shows them."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

TITLED = re.compile(r"^( *)([A-Z][\w ]*: \S.*)\n((?:\1 +\S.*(?:\n|$))+)", re.MULTILINE)
"""A paragraph such as `Numerics: ...` whose further lines are indented."""


class Paragraphs(Extension):
    """Titled paragraphs stay paragraphs: the parser of docstrings makes boxes of them otherwise, with
    half a sentence as their title."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called with each object that has been read."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)


def plain(text: str) -> str:
    """A docstring without the indentation of titled paragraphs."""

    def joined(found: re.Match[str]) -> str:
        margin, first, rest = found.groups()
        return f"{margin}{first}\n" + re.sub(r"^ +", margin, rest, flags=re.MULTILINE)

    return TITLED.sub(joined, text)
