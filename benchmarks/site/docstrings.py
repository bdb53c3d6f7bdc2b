"""Docstrings as the reference shows them."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension

TITLED = re.compile(r"^([A-Z][\w ]*: \S.*\n)((?: +\S.*(?:\n|$))+)", re.MULTILINE)
"""A paragraph such as `Numerics: ...` whose further lines are indented. Entries of sections such as
`Raises:` are indented themselves."""


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
        first, rest = found.groups()
        return f"{first}{re.sub(r'^ +', '', rest, flags=re.MULTILINE)}"

    return TITLED.sub(joined, text)
