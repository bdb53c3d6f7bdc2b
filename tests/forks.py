"""Processes that are forked from one that has imported what runs and ranks need, and has computed
nothing: these imports take longer than a few steps.
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        *("fastmoco.cli.main", "fastmoco.cli.train", "fastmoco.training.trainer", "nvidia.dali"),
        # What they import later.
        *("torch.utils.tensorboard", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
        *("torch._dynamo", "tests.golden_objective"),
    ]
)


def print_to(log: Path) -> None:
    """What this process prints goes to the end of a file."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
