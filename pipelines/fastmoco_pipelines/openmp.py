"""How long OpenMP's threads spin while they wait. Imported before torch.

By default a waiting thread of libgomp spins for milliseconds. If other threads, such as those of a
loader or of another process, need the cores, a small model becomes several times slower and takes
more than twice the processor time. No number depends on it.

libgomp reads the variable when it is loaded, which is with torch, and has no function to change it
later: a program that imports torch first sets the variable itself.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPINS = "10000"


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set `GOMP_SPINCOUNT`, unless the user has set it or `OMP_WAIT_POLICY`."""
    if "OMP_WAIT_POLICY" not in environment:
        environment.setdefault("GOMP_SPINCOUNT", SPINS)
