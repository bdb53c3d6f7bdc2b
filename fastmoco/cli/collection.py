"""Start faster: pause Python's garbage collector while a run is imported and built."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Do not look for dead cycles inside.

    The imports of torch and DALI make about a million objects that live as long as the process. The
    collector would walk all of them several times: 9 % of the CPU time of these imports.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
