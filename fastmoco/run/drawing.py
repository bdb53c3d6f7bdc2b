"""Draw the curves of a run while it trains, in a process of its own.

A thread would take the interpreter from the step for as long as matplotlib draws. The process reads
the files of the run, has the lowest priority, and ends by itself whatever happens to the run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from fastmoco.errors import RunError
from fastmoco.run.curves import Panels, draw_curves
from fastmoco.run.folder import RunFolder
from fastmoco_pipelines.processes import child_environment, follow_parent, python_command

FIRST_S = 60.0
"""Seconds of training before the first picture."""
INTERVAL_S = 300.0
"""Least time between two pictures."""
SHARE = 0.01
"""Largest share of the time that a picture is being drawn."""
CPU_LIMIT_S = 120
"""CPU time after which the process is ended."""


def draw_run(
    folder: RunFolder, out: Path | None = None, *, tell: Callable[[str], None] = lambda text: None
) -> Path:
    """Draw the curves of a run, also of one that trains or was interrupted; needs no lock.

    Args:
        folder: of the run.
        out: the picture; default its `curves.png`.
        tell: called with a sentence if the metrics have damaged lines.

    Raises:
        RunError: if the folder has no metrics.
        ValueError: if they contain nothing to draw, or are a link or no regular file.
        ImportError: if matplotlib is not installed.
    """
    if not os.path.lexists(folder.metrics):
        raise RunError(
            f"{folder.path} contains no {folder.metrics.name}; "
            "is it the folder given to fastmoco train --out?"
        )
    saved = folder.read_config()
    config = saved.get("config")
    recipe = config.get("recipe") if isinstance(config, dict) else None
    title = str(recipe or folder.path.absolute().name)
    panels = Panels.of(saved)
    return draw_curves(folder.metrics, out or folder.curves, title, panels, tell=tell)


class CurveDrawer:
    """Pictures of one run during training. Call `poll` at log steps and `close` at the end.

    Args:
        folder: of the run.
        active: whether this process draws; False on ranks above 0.
        clock: seconds, monotonic.
    """

    def __init__(
        self, folder: RunFolder, *, active: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._active = active and importlib.util.find_spec("matplotlib") is not None
        self._clock = clock
        self._child: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._next = clock() + FIRST_S

    def poll(self) -> None:
        """Begin a picture if one is due. Takes a millisecond or two, then microseconds."""
        if not self._active or self._runs() or self._clock() < self._next:
            return
        self.start()

    def start(self) -> None:
        """Begin a picture now, unless one is being drawn. An error leaves the picture out."""
        if not self._active or self._runs():
            return
        self._began = self._clock()
        self._next = self._began + INTERVAL_S
        with contextlib.suppress(OSError):
            # A session of its own: Ctrl-C in the terminal reaches the run alone.
            self._child = subprocess.Popen(  # noqa: S603 - this interpreter and our own module
                python_command("fastmoco.run.drawing", str(self._folder.path), str(os.getpid())),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=child_environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"),
            )

    def close(self, wait_s: float = 0.0) -> None:
        """End the process, after it had some time to finish its picture. Safe to call twice."""
        child, self._child = self._child, None
        self._active = False
        if child is None:
            return
        for seconds, end in ((wait_s, child.terminate), (2.0, child.kill), (None, child.poll)):
            try:
                child.wait(seconds)
                return
            except subprocess.TimeoutExpired:
                end()

    def _runs(self) -> bool:
        if self._child is None:
            return False
        if self._child.poll() is None:
            return True
        self._child = None
        self._next = max(self._next, self._began + (self._clock() - self._began) / SHARE)
        return False


def main(folder: Path, parent: int) -> None:
    """Draw the curves of a run once, as the process of `CurveDrawer`, and end with the run."""
    # An interrupted picture removes its unfinished file.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if os.getppid() != parent:
        return
    follow_parent(parent)
    os.nice(19)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
    os.umask(0o077)
    draw_run(RunFolder(folder))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
