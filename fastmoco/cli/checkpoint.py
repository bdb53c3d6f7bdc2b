"""`fastmoco checkpoint verify|list|consolidate`: which checkpoints can be trusted, and their tensors as one file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from tyro.conf import Positional

from fastmoco.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REFUSED, no_checkpoint, one_line


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """Read every byte and say which checkpoints can be trusted. Exit code 0: all of them, 1: not all, 2: there is none."""

    path: Positional[Path]
    """Folder of a run, or of one checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ListArguments:
    """Step, size, time, number of ranks and verdict of every checkpoint; unfinished saves too. Reads every byte."""

    path: Positional[Path]
    """Folder of a run, or of one checkpoint."""


@dataclass(frozen=True, kw_only=True)
class ConsolidateArguments:
    """Write the tensors of a checkpoint, on however many ranks it was saved, into one safetensors file."""

    path: Positional[Path]
    """Folder of a run, whose newest sound checkpoint is taken, or of one checkpoint."""
    out: Path
    """The file to write; it must not exist."""
    encoder: bool = False
    """Only the trained encoder, without its projector; default the full state."""


def verify(args: list[str]) -> int:
    """Read every byte; exit code 1 if a checkpoint cannot be trusted."""
    options = tyro.cli(VerifyArguments, prog="fastmoco checkpoint verify", args=args)
    from fastmoco.checkpoint import inspect_checkpoints

    with one_line(EXIT_REFUSED, OSError):
        found = inspect_checkpoints(options.path)
        # What a killed save left is ignored by every reader, so it is no fault of the run; `list` shows it.
        verdicts = [verdict for verdict in found if verdict.committed or verdict.path == options.path]
        if not verdicts:
            raise no_checkpoint(options.path)
    for verdict in verdicts:
        print(f"{verdict.path.name}: {verdict.fault or 'sound'}")
    return EXIT_FAILED if any(verdict.fault for verdict in verdicts) else EXIT_FINISHED


def list_all(args: list[str]) -> int:
    """Step, size, time, ranks and verdict of every checkpoint."""
    options = tyro.cli(ListArguments, prog="fastmoco checkpoint list", args=args)
    from fastmoco.checkpoint import inspect_checkpoints

    with one_line(EXIT_REFUSED, OSError):
        verdicts = inspect_checkpoints(options.path)
        if not verdicts:
            raise no_checkpoint(options.path)
    print(f"{'step':>10} {'MB':>10} {'saved at':<20} {'ranks':>5}  verdict")
    for verdict in verdicts:
        ranks = str(verdict.world_size or "?")
        print(
            f"{verdict.step:>10} {verdict.size / 1e6:>10.3f} {verdict.saved_at or '?':<20} {ranks:>5}  "
            f"{verdict.fault or 'sound'}"
        )
    return EXIT_FINISHED


def consolidate(args: list[str]) -> int:
    """One safetensors file of the full state, or of the encoder alone."""
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
