"""`fastmoco curves`: draw the curves of a run at any time."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from fastmoco.errors import EXIT_FINISHED, EXIT_REFUSED, one_line, say, show


def curves(run: Positional[Path], *, out: Path | None = None) -> int:
    """Draw loss, kNN and gradient norms of a run, also while it trains or after an interruption.

    Args:
        run: Folder of the run, as given to `fastmoco train --out`.
        out: The picture; default curves.png in the folder of the run.
    """
    from fastmoco.run.drawing import draw_run
    from fastmoco.run.folder import RunFolder

    with one_line(EXIT_REFUSED, ValueError, OSError):
        show(str(draw_run(RunFolder(run), out, tell=say)))
    return EXIT_FINISHED
