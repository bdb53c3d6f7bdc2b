"""Check the environment for variables that would disable a safeguard, before
any library reads it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, MutableMapping

from fastmoco_pipelines.processes import without_current_folder
from fastmoco_pipelines.spec import MOST_THREADS

FORBIDDEN = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
DROPPED = ("GOPEN_REWRITE", "GOPEN_VERBOSE", "GOPEN_BUFFER", "WDS_")
"""Variables (or prefixes) of other readers that may be installed; the first
turns a path into a shell command."""

LIMIT = "OMP_THREAD_LIMIT"
"""It starts no threads, so a large number is as good as none."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", LIMIT)
"""Variables with a number of threads. Libraries read them when they are loaded: they print what is no
number as it is, and end the process for a number that the system does not have."""
SEARCHED = ("PYTHONSAFEPATH", "PYTHONPATH", "PATH")
"""Variables that say where modules and programs are looked for."""


def clean_environment(environment: MutableMapping[str, str]) -> None:
    """Refuse the variable that lets torch unpickle any file; remove those of
    readers that fastmoco does not use.

    Raises:
        ValueError: if that variable is set, or if one with a number of threads has none.
    """
    if environment.get(FORBIDDEN, "").lower() in ("1", "y", "yes", "true"):
        raise ValueError(
            f"{FORBIDDEN}={environment[FORBIDDEN]} is set: with it every file that torch loads may "
            "run code as you. "
            f"Start again without it (unset {FORBIDDEN}); fastmoco loads tensors only and never "
            "needs it"
        )
    for name in THREADS:
        text = environment.get(name, "").strip()
        most = 2**31 - 1 if name == LIMIT else MOST_THREADS
        parts = [part.strip() for part in text.split(",")]
        if text and not all(re.fullmatch(r"[0-9]{1,10}", p) and 1 <= int(p) <= most for p in parts):
            raise ValueError(
                f"{name}={environment[name]!r}: must be a whole number from 1 to {most:,}, "
                f"or several with commas between them; correct it, or unset {name}"
            )
    for name in [name for name in environment if name.startswith(DROPPED)]:
        del environment[name]


def require_current_folder() -> None:
    """Refuse to begin in a folder that is gone: names would lead nowhere, and libraries end the
    process when they are loaded.

    Raises:
        ValueError: if the current folder has been removed.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("the current folder has been removed: cd to another one") from None


@contextlib.contextmanager
def without_modules_here(*, for_good: bool) -> Iterator[None]:
    """A context in which what this process starts finds no module and no program in the current
    folder.

    Args:
        for_good: also afterwards, because the process ends. A program that calls a command as a
            function gets its own variables back.
    """
    before = {name: os.environ.get(name) for name in SEARCHED}
    without_current_folder(os.environ)
    try:
        yield
    finally:
        for name, value in ({} if for_good else before).items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
