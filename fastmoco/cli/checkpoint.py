"""`fastmoco checkpoint verify|list|consolidate`: which checkpoints can be trusted, and their tensors as one file."""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from fastmoco.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REFUSED, no_checkpoint, one_line


def verify(path: Positional[Path]) -> int:
    """Read every byte and report which checkpoints can be trusted.

    Exit code 0: all of them, 1: not all, 2: there is none.

    Args:
        path: Folder of a run, or of one checkpoint.
    """
    from fastmoco.checkpoint import inspect_checkpoints

    with one_line(EXIT_REFUSED, OSError):
        found = inspect_checkpoints(path)
        # What a killed save left is ignored by every reader, so it is no fault of the run; `list` shows it.
        verdicts = [verdict for verdict in found if verdict.committed or verdict.path == path]
        if not verdicts:
            raise no_checkpoint(path)
    for verdict in verdicts:
        print(f"{verdict.path.name}: {verdict.fault or 'sound'}")
    return EXIT_FAILED if any(verdict.fault for verdict in verdicts) else EXIT_FINISHED


def list_all(path: Positional[Path]) -> int:
    """Step, size, time, ranks and state of every checkpoint.

    Unfinished saves too. Reads every byte.

    Args:
        path: Folder of a run, or of one checkpoint.
    """
    from fastmoco.checkpoint import inspect_checkpoints

    with one_line(EXIT_REFUSED, OSError):
        verdicts = inspect_checkpoints(path)
        if not verdicts:
            raise no_checkpoint(path)
    print(f"{'step':>10} {'MB':>10} {'saved at':<20} {'ranks':>5}  verdict")
    for verdict in verdicts:
        ranks = str(verdict.world_size or "?")
        print(
            f"{verdict.step:>10} {verdict.size / 1e6:>10.3f} {verdict.saved_at or '?':<20} {ranks:>5}  "
            f"{verdict.fault or 'sound'}"
        )
    return EXIT_FINISHED


def consolidate(path: Positional[Path], *, out: Path, encoder: bool = False) -> int:
    """Write the tensors of a checkpoint into one safetensors file, whatever number of ranks saved it.

    Args:
        path: Folder of a run, whose newest sound checkpoint is taken, or of one checkpoint.
        out: The file to write; it must not exist.
        encoder: Only the trained encoder, without its projector; default the full state.
    """
    from fastmoco.checkpoint import consolidate as write
    from fastmoco.checkpoint import load_checkpoint, load_latest

    with one_line(EXIT_REFUSED, OSError):
        if path.name.startswith("step_"):
            checkpoint = load_checkpoint(path)
        else:
            inner = path / "checkpoints"
            newest = load_latest(inner if inner.is_dir() else path)
            if newest is None:
                raise no_checkpoint(path)
            checkpoint = newest
        for skipped, reason in checkpoint.skipped:
            print(f"passed over {skipped.name}: {reason}")
        count = write(checkpoint, out, encoder_only=encoder)
    print(f"wrote {count} tensors of step {checkpoint.step} to {out}")
    return EXIT_FINISHED
