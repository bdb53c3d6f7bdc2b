"""The child process of `startup.py`: run `fastmoco` to the end of its first step, then report.

`python -P startup_child.py REPORT train ...` writes processor time and imported modules to the file
REPORT. `fastmoco` may be that of any checkout.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import fastmoco.cli.main as command
from fastmoco.errors import EXIT_STOPPED

paused: Any = contextlib.nullcontext
with contextlib.suppress(ImportError):  # an older checkout has no such module
    from fastmoco.cli.collection import collection_paused as paused


def main() -> int:
    """Run the command; returns its exit code."""
    # As `fastmoco train` imports it.
    with paused():
        import fastmoco.cli.train  # noqa: F401
        from fastmoco.training.trainer import Trainer

    run = Trainer.run

    def first_step(trainer: Trainer, **options: Any) -> int:
        del options  # how a whole run ends
        run(trainer, max_steps=1)
        used = os.times()
        report = {"cpu_s": used.user + used.system, "modules": sorted(sys.modules)}
        Path(sys.argv[1]).write_text(json.dumps(report))
        return EXIT_STOPPED  # so that no curves are drawn

    Trainer.run = first_step  # type: ignore[assignment, method-assign]
    return command.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
