"""`fastmoco checkpoint verify|list|consolidate`: verify checkpoints, list them,
export one to a single file.
"""

from __future__ import annotations

from pathlib import Path

from tyro.conf import Positional

from fastmoco.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_REFUSED, no_checkpoint, one_line, show


def verify(path: Positional[Path]) -> int:
    """Read every byte of every checkpoint and verify it.

    Exit code 0: all are sound, 1: some are not, 2: there is none.

    Args:
        path: Folder of a run, or of one checkpoint.
    """
    from fastmoco.checkpoint import inspect_checkpoints

    with one_line(EXIT_REFUSED, OSError):
        found = inspect_checkpoints(path)
        # Every reader ignores unfinished saves, so they are no fault of the run; `list` shows them.
        found = [one for one in found if one.committed or one.path == path]
        if not found:
            raise no_checkpoint(path)
    for one in found:
        show(f"{one.path.name}: {one.fault or 'sound'}")
    return EXIT_FAILED if any(one.fault for one in found) else EXIT_FINISHED


def list_all(path: Positional[Path]) -> int:
    """Step, size, time, ranks and status of every checkpoint.

    Also of unfinished saves. Reads every byte.

    Args:
        path: Folder of a run, or of one checkpoint.
    """
    from fastmoco.checkpoint import inspect_checkpoints

    with one_line(EXIT_REFUSED, OSError):
        found = inspect_checkpoints(path)
        if not found:
            raise no_checkpoint(path)
    print(f"{'step':>10} {'MB':>10} {'saved at':<20} {'ranks':>5}  status")
    for one in found:
        ranks = str(one.world_size or "?")
        show(
            f"{one.step:>10} {one.size / 1e6:>10.3f} {one.saved_at or '?':<20} {ranks:>5}  "
            f"{one.fault or 'sound'}"
        )
    return EXIT_FINISHED


def consolidate(path: Positional[Path], *, out: Path, encoder: bool = False) -> int:
    """Write the tensors of a checkpoint, saved on any number of ranks, into one safetensors file.

    Args:
        path: Folder of a run, for its newest sound checkpoint, or of one checkpoint.
        out: The file to write; it must not exist.
        encoder: Write only the trained encoder without its projector; default the full state.
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
            show(f"passed over {skipped.name}: {reason}")
        count = write(checkpoint, out, encoder_only=encoder)
    show(f"wrote {count} tensors of step {checkpoint.step} to {out}")
    return EXIT_FINISHED
