"""Files of the current folder that a library would take its settings from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_OF_MATPLOTLIB = "matplotlibrc"


@contextmanager
def without_settings_here() -> Iterator[None]:
    """A context in which an import of matplotlib reads no `matplotlibrc` of the current folder. That
    file says how texts are drawn, also by which programs, and may be a pipe.

    Files of the user's own folders and of `MATPLOTLIBRC` count as before.
    """
    before = os.path.exists
    # matplotlib asks for this relative name before it asks for others.
    os.path.exists = lambda path: path != _OF_MATPLOTLIB and before(path)
    try:
        yield
    finally:
        os.path.exists = before
