"""`fastmoco checkpoint verify|list|consolidate`: verify checkpoints, list them,
export one to a single file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from fastmoco.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REFUSED, no_checkpoint, one_line


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """Read every byte of every checkpoint and verify it. Exit code 0: all are sound, 1: some are
    not, 2: there is none.
    """

    path: Positional[Path]
    """Folder of a run, or of one checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ListArguments:
    """Step, size, time, number of ranks and status of every checkpoint, also of
    unfinished saves. Reads every byte.
    """

    path: Positional[Path]
    """Folder of a run, or of one checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ConsolidateArguments:
    """Write the tensors of a checkpoint, saved on any number of ranks, into
    one safetensors file.
    """

    path: Positional[Path]
    """Folder of a run, for its newest sound checkpoint, or of one checkpoint."""
    out: Path
    """The file to write; it must not exist."""
    encoder: bool = False
    """Write only the trained encoder without its projector; default the full state."""


def verify(args: list[str]) -> int:
    """Verify every byte of every checkpoint."""
    options = tyro.cli(VerifyArguments, prog="fastmoco checkpoint verify", args=args)
    from fastmoco.checkpoint import inspect_checkpoints

    with one_line(EXIT_REFUSED, OSError):
        found = inspect_checkpoints(options.path)
        # Every reader ignores unfinished saves, so they are no fault of the run; `list` shows them.
        found = [one for one in found if one.committed or one.path == options.path]
        if not found:
            raise no_checkpoint(options.path)
    for one in found:
        print(f"{one.path.name}: {one.fault or 'sound'}")
    return EXIT_FAILED if any(one.fault for one in found) else EXIT_FINISHED


def list_all(args: list[str]) -> int:
    """List step, size, time, ranks and status of every checkpoint."""
    options = tyro.cli(ListArguments, prog="fastmoco checkpoint list", args=args)
    from fastmoco.checkpoint import inspect_checkpoints

    with one_line(EXIT_REFUSED, OSError):
        found = inspect_checkpoints(options.path)
        if not found:
            raise no_checkpoint(options.path)
    print(f"{'step':>10} {'MB':>10} {'saved at':<20} {'ranks':>5}  status")
    for one in found:
        ranks = str(one.world_size or "?")
        print(f"{one.step:>10} {one.size / 1e6:>10.3f} {one.saved_at or '?':<20} {ranks:>5}  {one.fault or 'sound'}")
    return EXIT_FINISHED


def consolidate(args: list[str]) -> int:
    """Write the full state, or only the encoder, into one safetensors file."""
    options = tyro.cli(ConsolidateArguments, prog="fastmoco checkpoint consolidate", args=args)
    from fastmoco.checkpoint import consolidate as write
    from fastmoco.checkpoint import load_checkpoint, load_latest

    with one_line(EXIT_REFUSED, OSError):
        if options.path.name.startswith("step_"):
            checkpoint = load_checkpoint(options.path)
        else:
            inner = options.path / "checkpoints"
            newest = load_latest(inner if inner.is_dir() else options.path)
            if newest is None:
                raise no_checkpoint(options.path)
            checkpoint = newest
        for path, reason in checkpoint.skipped:
            print(f"passed over {path.name}: {reason}")
        count = write(checkpoint, options.out, encoder_only=options.encoder)
    print(f"wrote {count} tensors of step {checkpoint.step} to {options.out}")
    return EXIT_FINISHED
