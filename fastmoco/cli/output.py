"""Standard output: long output, of which a person may read the beginning alone, and results alone."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def until_closed() -> Iterator[None]:
    """A context that ends without an error when the reader of a pipe has closed it, e.g. `head`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        # What is still in the buffer would fail again at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def training_beside_result() -> Iterator[None]:
    """A context of a command whose result is on standard output: what the training in it shows is on
    standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
