"""`fastmoco profile`: where the time of a recipe's steps goes on this machine."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fastmoco.config import Config
from fastmoco.config.limits import require_limits
from fastmoco.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REFUSED, one_line, show
from fastmoco_pipelines.files.whole import write_file
from fastmoco_pipelines.spec import require

TRACE, TABLE, FIGURES, LOG = "trace.json.gz", "table.txt", "profile.json", "run.log"
"""Files in the folder of a profile."""


@dataclass(frozen=True, kw_only=True)
class ProfileArguments:
    """Measure some training steps by part, trace them with torch.profiler, and print a table. It
    needs --data.shards, or --data.synthetic; docs/profile.md explains the table.
    """

    steps: int = 10
    """Steps that are measured, after some that warm up."""
    out: Path = Path("profile")
    """Folder for the table, its figures as JSON, the Chrome trace and the log; files of an earlier
    profile are replaced."""
    json: bool = False
    """Print the figures as JSON instead of the table."""
    trace: bool = True
    """Write the trace; open it in https://ui.perfetto.dev or chrome://tracing."""
    config: Annotated[Config, tyro.conf.arg(name="")]

    def __post_init__(self) -> None:
        require_limits(self)
        require(self.steps >= 1, "steps", self.steps, "needs at least 1")


def profile(options: ProfileArguments) -> int:
    """Profile a recipe; returns 0."""
    # Before torch is imported: its profiler would print lines of its own.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    from fastmoco.distributed.mesh import start_world, stop_world
    from fastmoco.training.classes import with_classes
    from fastmoco.training.profiling.profile import output_to, profile_steps
    from fastmoco.training.profiling.table import table

    config = options.config
    with one_line(EXIT_REFUSED, ValueError, OSError):
        require(
            not (config.data.images or config.knn.images),
            "data.images",
            config.data.images or config.knn.images,
            "is not packed here; pack the folder with fastmoco data pack and give --data.shards, "
            "or take --data.synthetic",
        )
        rule = (
            "must name the shards to read, e.g. --data.shards 'data/train-*.tar'; or profile "
            "without a loader: --data.synthetic"
        )
        named = bool(config.data.shards) or config.data.synthetic
        require(named, "data.shards", config.data.shards, rule)
        options.out.mkdir(parents=True, exist_ok=True)
        world = start_world(config.device, timeout_s=config.data.timeout_s + 120)
        require(world.world_size == 1, "processes", world.world_size, "a profile takes one process")
        config = with_classes(config, world, None)
        trace = options.out / TRACE if options.trace else None
        with output_to(options.out / LOG), one_line(EXIT_FAILED):
            found = profile_steps(config, world, steps=options.steps, trace=trace)
        text = table(found)
        figures = found.to_json()
        write_file(options.out / TABLE, f"{text}\n".encode())
        write_file(options.out / FIGURES, f"{json.dumps(figures, indent=1)}\n".encode())
    print(json.dumps(figures, indent=1) if options.json else text)
    if not options.json:
        show(
            f"wrote {options.out}"
            + (f"; open {options.out / TRACE} in https://ui.perfetto.dev" if trace else "")
        )
    stop_world()
    return EXIT_FINISHED
